"""What the entry points share: starting up, errors in one sentence, and the model that the user names."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app
from flax import nnx
from ml_collections import ConfigDict

from maskrcnn_jax.data.coco import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.training.checkpoint import load_config, restore_model
from maskrcnn_jax.weights.convert import load_weights
from maskrcnn_jax.weights.download import resolve
from maskrcnn_jax.weights.files import read_arrays


def run_app(main: Callable[[], None]) -> None:
    """Parse the command line, run ``main`` and leave with status 1 and one line on stderr if it raises UserError."""

    parsed = False

    def guarded(argv: list[str]) -> None:
        # Orbax and JAX tell of things that are as they should be: no TPU here, a checkpoint without metrics.
        logging.getLogger("absl").setLevel(logging.ERROR)
        logging.getLogger("jax").setLevel(logging.WARNING)
        _enable_compilation_cache()
        nonlocal parsed
        parsed = True
        try:
            if len(argv) > 1:
                raise UserError(f"{argv[1]!r} is not an option; options are written --name=value, see --help")
            _check_config_file()
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    try:
        app.run(guarded)
    except (AttributeError, KeyError, TypeError) as error:
        # How ml_collections reports an override of an unknown field while it parses the command line.
        if parsed:
            raise
        said = str(error.args[0]).replace("\\n", " ").replace("\\", "").replace("'", "").strip('"')
        print(f"error: a --config.FIELD does not exist: {said}; configs/base.py lists them all", file=sys.stderr)
        sys.exit(1)


def find_config(config: ConfigDict | None, *, workdir: str | None, weights: str | None) -> ConfigDict:
    """Return the config of the model that a command was asked to use: --config, or that of the run in --workdir.

    Raises:
      UserError: when these options and --weights contradict each other.
    """
    if (workdir is None) == (weights is None):
        raise UserError("give either --workdir, a folder that train.py wrote, or --weights together with --config")
    if weights is not None and config is None:
        raise UserError("--weights needs the --config that they belong to, such as configs/torchvision_r50_fpn.py")
    return config or load_config(workdir)


def load_model(
    config: ConfigDict, *, workdir: str | None, checkpoint: str, weights: str | None, categories: str | None
) -> tuple[MaskRCNN, Categories]:
    """Load the model that a command was asked to use: a run of train.py, or weights from elsewhere.

    Args:
      config: as find_config returns it.
      workdir: of --workdir, the folder of a run.
      checkpoint: of --checkpoint, which one of the run.
      weights: of --weights, a file or a name that weights.download knows.
      categories: of --categories, what the labels of the weights mean; None means COCO's.

    Returns:
      The model in evaluation mode, and what its labels mean.

    Raises:
      UserError: when the config, the checkpoint and the categories do not fit each other.
    """
    if workdir is not None:
        return restore_model(workdir, config.model, which=checkpoint)
    known = Categories.load(categories) if categories else Categories.coco(config.data.contiguous_labels)
    model = MaskRCNN(known.num_classes, **config.model, rngs=nnx.Rngs(0))
    print(load_weights(model, read_arrays(resolve(weights)), source=weights))
    model.eval()
    return model, known


def _check_config_file() -> None:
    """Raise a UserError when --config names no file: ml_collections would say so in its own terms only later."""
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        if name.lstrip("-") == "config" and not Path(path.partition(":")[0]).is_file():
            raise UserError(f"--config={path} is no file; give one such as configs/r50_fpn.py")


def _enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has chosen where already."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "maskrcnn_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
