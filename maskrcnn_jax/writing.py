"""Writing the files of a run: each whole or not at all, and a sentence where the disk refuses."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from maskrcnn_jax.errors import UserError

# What a full, broken or read-only disk answers. Libraries that write in C++ tell of it in a text only.
_ANSWERS = [
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
]


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn the refusal of a disk to write below this path into a UserError; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        answer = _answer(error)
        if answer is None:
            raise
        raise UserError(
            f"{path} cannot be written ({answer}); make room there or let it be written, then the same command goes "
            "on from what is there"
        ) from None


def _answer(error: BaseException) -> str | None:
    """Return what the disk said, if that is what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((answer for answer in _ANSWERS if answer in str(error)), None)


def replace_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file beside its final name and rename it, so that a reader never meets half of one.

    Args:
        path: in a folder that exists.
        content: text is written as UTF-8.

    Raises:
        UserError: the disk refuses; an older file is left as it was.
    """
    path = Path(path)
    # The process number keeps two runs that write to one directory from sharing the unfinished file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def write_json(path: Path, content, *, indent: int | None = None) -> None:
    """Write JSON into a file, whose folder is made if it does not exist; a reader never meets half of it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=indent) + "\n")
