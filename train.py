"""Train a Mask R-CNN: ``maskrcnn-jax train`` where the package is not installed."""

import sys

from maskrcnn_jax.commands.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
