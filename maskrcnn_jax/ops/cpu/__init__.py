"""Code that exists only because of XLA on CPUs.

``winograd``, ``gradients``, ``depthwise`` and ``nms`` run on CPUs only: ops/convolution.py and ops/nms.py choose the
form by the platform that a program is compiled for. ``relu`` and ``max_pool`` run on every platform: they are as good as
XLA's own elsewhere, and take less memory or time on CPUs. models/layers.py hands them to the networks.
"""
