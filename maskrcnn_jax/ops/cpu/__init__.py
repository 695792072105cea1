"""Code that exists only because of XLA on CPUs.

``winograd``, ``bfloat16``, ``gradients``, ``depthwise`` and ``nms`` run on CPUs only: ops/convolution.py,
ops/matmul.py and ops/nms.py choose the form by the platform that a program is compiled for. ``relu`` and ``max_pool``
run on every platform: they compute the same as XLA's own, in less memory or time on CPUs. models/layers.py passes them
on to the networks.
"""
