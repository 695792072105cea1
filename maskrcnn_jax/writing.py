"""Atomic writes: a file or folder appears complete or not at all, and a disk that refuses is a UserError."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskrcnn_jax.errors import UserError

# What a full, broken or read-only disk answers. Libraries in C++ pass it on as part of a text only.
_ANSWERS = [
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
]


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn a disk's refusal to write below this path into a UserError; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        answer = _answer(error)
        if answer is None:
            raise
        raise UserError(
            f"{path} cannot be written ({answer}); make room or change the permissions, then run it again"
        ) from None


def _answer(error: BaseException) -> str | None:
    """Return what the disk answered, or None for an error of another kind."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((answer for answer in _ANSWERS if answer in str(error)), None)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write a file or folder to, and rename that to ``path`` when the block ends.

    A reader never finds an incomplete file. If the block fails, what is at ``path`` stays as it was. Missing parent
    folders are created.

    Raises:
        UserError: The disk refuses.
    """
    path = Path(path)
    # The process number keeps two runs that write to one folder from sharing the unfinished file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            if unfinished.is_dir():
                shutil.rmtree(unfinished, ignore_errors=True)
            else:
                unfinished.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file as :func:`replacing` does; text is encoded as UTF-8."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = None) -> None:
    """Write JSON to a file as :func:`replacing` does."""
    replace_file(path, json.dumps(content, indent=indent) + "\n")
