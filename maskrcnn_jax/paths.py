"""Paths as users write them, and the folder for what is kept between runs."""

import os
from pathlib import Path

from maskrcnn_jax.errors import UserError


def expand(path: str | os.PathLike) -> str:
    """Return a path with ``~`` replaced by the home folder, which shells leave to programs in ``--option=~/folder``.

    Raises:
        UserError: if there is no such home folder.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path) if path.startswith("~") else path
    # A file whose name begins with ~ is given with the folder that it is in.
    if expanded.startswith("~"):
        raise UserError(f"there is no home folder for {path.partition('/')[0]} in {path}; give the whole path")
    return expanded


def cache_dir() -> Path | None:
    """Return the folder for downloads and compiled programs.

    Returns:
        The folder, which need not exist; None without a home folder, as in some containers and batch jobs.
    """
    home = os.path.expanduser("~")
    return Path(home, ".cache", "maskrcnn_jax") if home != "~" else None
