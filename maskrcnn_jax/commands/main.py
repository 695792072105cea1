"""The console script ``maskrcnn-jax``: finds the command and runs it."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from maskrcnn_jax import __version__
from maskrcnn_jax.commands.app import run_command

COMMANDS = ("train", "eval", "predict", "check", "convert", "export", "export-torchvision", "serve", "build-tfds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Its name and its options. Defaults to the command line of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"maskrcnn-jax {__version__}")
    elif name in COMMANDS:
        run_command(_find(name), rest, name=f"maskrcnn-jax {name}")
    else:
        close = difflib.get_close_matches(name, COMMANDS) or COMMANDS
        print(f"error: there is no command {name!r}; did you mean {' or '.join(close)}?", file=sys.stderr)
        sys.exit(1)


def _find(name: str) -> ModuleType:
    return import_module(f"maskrcnn_jax.commands.{name.replace('-', '_')}")


def _help() -> str:
    summaries = {name: (_find(name).__doc__ or "").partition("\n")[0] for name in COMMANDS}
    lines = [f"  {name:20}{summary}" for name, summary in summaries.items()]
    return "\n".join(
        ["usage: maskrcnn-jax COMMAND [OPTIONS]", "", *lines, "", "maskrcnn-jax COMMAND --help explains a command."]
    )


if __name__ == "__main__":
    main()
