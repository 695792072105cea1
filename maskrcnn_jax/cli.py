"""What the entry points share: starting up, and telling the user about an error in one sentence."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app

from maskrcnn_jax.errors import UserError


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
