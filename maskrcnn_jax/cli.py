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

    def guarded(argv: list[str]) -> None:
        # Orbax and JAX tell of things that are as they should be: no TPU here, a checkpoint without metrics.
        logging.getLogger("absl").setLevel(logging.ERROR)
        logging.getLogger("jax").setLevel(logging.WARNING)
        _enable_compilation_cache()
        try:
            if len(argv) > 1:
                raise UserError(f"{argv[1]!r} is not an option; options are written --name=value, see --help")
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    try:
        app.run(guarded)
    except (AttributeError, KeyError, TypeError, OSError) as error:
        # How ml_collections reports a config file that is missing and an override of an unknown or mistyped field.
        if "ml_collections" not in _origin(error):
            raise
        print(f"error: --config: {' '.join(str(error.args[0]).split())}", file=sys.stderr)
        sys.exit(1)


def _origin(error: Exception) -> str:
    """Return the file that raised an exception."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_filename


def _enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has chosen where already."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "maskrcnn_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
