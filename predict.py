"""Draw what a model finds: ``maskrcnn-jax predict`` where the package is not installed."""

import sys

from maskrcnn_jax.commands.main import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
