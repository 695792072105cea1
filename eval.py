"""Compute the AP of a model: ``maskrcnn-jax eval`` where the package is not installed."""

import sys

from maskrcnn_jax.commands.main import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
