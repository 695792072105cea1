"""What the entry points share: starting up, errors in one sentence, and the model that the user names."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from maskrcnn_jax import api
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.distributed import join, leave
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.weights.published import is_name


def run_app(main: Callable[[], None]) -> None:
    """Parse the command line, run ``main`` and leave with status 1 and one line on stderr if it raises UserError."""

    parsed = False

    def guarded(argv: list[str]) -> None:
        quieten_libraries()
        _enable_compilation_cache()
        nonlocal parsed
        parsed = True
        try:
            if "distributed" in flags.FLAGS:
                options = flags.FLAGS
                join(
                    options.coordinator_address, options.num_processes, options.process_id, search=options.distributed
                )
            if len(argv) > 1:
                raise UserError(f"{argv[1]!r} is not an option; options are written --name=value, see --help")
            _check_config_file()
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            leave(1)

    for flag in flags.FLAGS.flags_by_module_dict().get(__name__, ()):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # --help shows only the program's own
    try:
        app.run(guarded, flags_parser=_parse_flags)
    except (AttributeError, KeyError, TypeError) as error:
        # How ml_collections reports an override of an unknown field while it parses the command line.
        if parsed:
            raise
        said = str(error.args[0]).replace("\\n", " ").replace("\\", "").replace("'", "").strip('"')
        print(f"error: a --config.FIELD does not exist: {said}; configs/base.py lists them all", file=sys.stderr)
        sys.exit(1)


def define_process_flags() -> None:
    """Define the options by which several processes of a command find each other; run_app reads them."""
    flags.DEFINE_bool("distributed", False, "Join the other workers of a Cloud TPU; srun and mpirun need no option.")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where nothing tells it.")
    flags.DEFINE_integer("num_processes", None, "Of this job, likewise.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Of this process, from 0, likewise.", lower_bound=0)


def define_model_flags() -> None:
    """Define the options by which a command is told which model to use; load_model reads them."""
    config_flags.DEFINE_config_file("config", None, "Use instead of the config that the run was trained with.")
    flags.DEFINE_string("workdir", None, "Folder that train.py wrote.")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (by mask AP) or a step.")
    flags.DEFINE_string(
        "weights", None, "Instead of a run: .pth, .safetensors, .pkl or a name, see weights/published.py."
    )
    flags.DEFINE_string("categories", None, "categories.json of a run: what the labels of --weights mean, or COCO's.")


def find_config() -> ConfigDict:
    """Return the config of the model that the user named: --config, that of the run or that of published weights.

    Raises:
      UserError: when these options and --weights contradict each other.
    """
    options = flags.FLAGS
    if (options.workdir is None) == (options.weights is None):
        raise UserError("give either --workdir, a folder that train.py wrote, or --weights together with --config")
    if options.config is None and options.workdir is None and not is_name(options.weights):
        raise UserError("--weights needs the --config that they belong to, such as configs/torchvision_r50_fpn.py")
    return api.find_config(workdir=options.workdir, weights=options.weights, config=options.config)


def load_model(config: ConfigDict) -> tuple[MaskRCNN, Categories]:
    """Load the model that the user named: a run of train.py, or weights from elsewhere; see :func:`.api.load_network`.

    Args:
      config: as find_config returns it.
    """
    options = flags.FLAGS
    return api.load_network(
        config,
        workdir=options.workdir,
        weights=options.weights,
        checkpoint=options.checkpoint,
        categories=options.categories,
    )


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; absl would print its errors over several lines, those of config files with a trace."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        said = str(error).strip().splitlines()[-1].strip()
        print(f"error: {said.removeprefix('maskrcnn_jax.errors.UserError: ')}; see --help", file=sys.stderr)
        sys.exit(1)


def _check_config_file() -> None:
    """Raise a UserError when --config names no file: ml_collections would say so in its own terms only later."""
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        if name.lstrip("-") == "config" and not Path(path.partition(":")[0]).is_file():
            raise UserError(f"--config={path} is no file; give one such as configs/r50_fpn.py")


def quieten_libraries() -> None:
    """Keep Orbax and JAX from telling of things that are as they should be: no TPU here, a checkpoint without metrics.

    Nor may Orbax print a thousand lines about a disk that refuses, whose error it raises too.
    """
    logging.getLogger("jax").setLevel(logging.WARNING)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    print_unraisable = sys.unraisablehook

    def hook(unraisable) -> None:
        # Once the first of many arrays has failed, nobody waits for the others.
        if str(unraisable.exc_value) != "Event loop is closed":
            print_unraisable(unraisable)

    sys.unraisablehook = hook


def _enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has chosen where already."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "maskrcnn_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
