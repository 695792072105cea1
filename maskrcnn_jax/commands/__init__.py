"""The commands of ``maskrcnn-jax``: a module each.

A command is a module with ``add_options(parser)`` and ``main(options)``; its docstring is the text of its ``--help``.
It imports what takes long inside ``main``, so that help and mistyped options are answered at once.
"""
