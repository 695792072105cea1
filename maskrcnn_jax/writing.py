"""Atomic writes: a file or folder appears complete or not at all, and a disk or bucket that refuses is a UserError."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskrcnn_jax.errors import UserError, one_line
from maskrcnn_jax.paths import as_path, in_bucket, local_path, write_bytes

# What a full, broken or read-only disk answers. Libraries in C++ pass it on as part of a text only.
_ANSWERS = [
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
]
# Of TensorStore's errors.
_CODES = ("PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND", "UNAVAILABLE", "DEADLINE_EXCEEDED")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn a disk's refusal to write below this path into a UserError; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        answer = _answer(error) or (_answer_of_bucket(error) if in_bucket(path) else None)
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


def _answer_of_bucket(error: BaseException) -> str | None:
    """Return what a bucket answered through gcsfs, Google's libraries or TensorStore, or None."""
    from_library = type(error).__module__.startswith(("gcsfs", "google."))
    from_tensorstore = any(code in str(error) for code in _CODES)
    return one_line(error) if isinstance(error, OSError) or from_library or from_tensorstore else None


def make_folder(path: Path) -> None:
    """Create a folder and its parents; a bucket has no folders to create.

    Raises:
        UserError: The disk refuses.
    """
    if not in_bucket(path):
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write a file or folder to, and rename that to ``path`` when the block ends.

    A reader never finds an incomplete file. If the block fails, what is at ``path`` stays as it was. Missing parent
    folders are created.

    Raises:
        UserError: The disk refuses.
    """
    path = local_path(path, "the folder")
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
    """Write a file as :func:`replacing` does, also in a bucket; text is encoded as UTF-8."""
    path, data = as_path(path), content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        with writing(path):
            write_bytes(path, data)
    else:
        with replacing(path) as unfinished:
            unfinished.write_bytes(data)


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = None) -> None:
    """Write JSON to a file as :func:`replace_file` does."""
    replace_file(path, json.dumps(content, indent=indent) + "\n")


class GrowingFiles:
    """A folder for files that are appended to.

    Files in a bucket cannot grow. For one there, this is a temporary folder, which is uploaded from time to time.
    """

    def __init__(self, folder: Path):
        """Make the folder.

        Args:
            folder: Where the files are wanted.

        Raises:
            UserError: The disk refuses.
        """
        self._wanted, self._uploaded, self._sizes = folder, time.monotonic(), dict[Path, int]()
        self.path = Path(tempfile.mkdtemp()) if in_bucket(folder) else folder
        make_folder(self.path)

    def upload(self, *, after: float = 0) -> None:
        """Upload what has grown, to a bucket.

        Args:
            after: Seconds since the last time that must have passed.

        Raises:
            UserError: The bucket refuses.
        """
        if not in_bucket(self._wanted) or time.monotonic() < self._uploaded + after:
            return
        for file in self.path.rglob("*"):
            # Trackers keep files of their own there, and may remove them meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if file.is_file() and self._sizes.get(file) != file.stat().st_size:
                    replace_file(self._wanted / file.relative_to(self.path), file.read_bytes())
                    self._sizes[file] = file.stat().st_size
        self._uploaded = time.monotonic()

    def close(self) -> None:
        """Upload what has grown, and remove the temporary folder; errors as in :meth:`upload`."""
        try:
            self.upload()
        finally:
            if in_bucket(self._wanted):
                shutil.rmtree(self.path)
