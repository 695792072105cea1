"""Where strings become paths: ``gs://bucket/folder`` a path of epath, everything else one of pathlib; ~ is expanded.

A bucket is not a disk. Uploads are atomic, so nothing is written beside a file and renamed. Files cannot grow or be
locked, and a folder is only what names begin with. Code to which this matters asks ``in_bucket``.
"""

import contextlib
import errno
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskrcnn_jax.errors import UserError, one_line

_SCHEME = "gs://"


def as_path(path: str | os.PathLike) -> Path:
    """Return a path that the user gave, in a bucket or on a disk.

    Raises:
        UserError: It is a URL of another kind, or the bucket cannot be used.
    """
    text = os.fspath(path)
    if not in_bucket(text):
        if "://" in text:
            raise UserError(f"{text} is not a path; give one on a disk or gs://BUCKET/FOLDER")
        return Path(expand(path))
    _check_bucket(text.removeprefix(_SCHEME).partition("/")[0])
    from etils import epath  # takes long to import, for those who have everything on a disk

    return epath.Path(text)  # type: ignore[return-value]  # has the methods of pathlib's


def expand(path: str | os.PathLike) -> str:
    """Return a path with ``~`` replaced by the home folder, which shells leave to programs in ``--option=~/folder``.

    Raises:
        UserError: There is no such home folder.
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


def local_path(path: str | os.PathLike, what: str) -> Path:
    """Return the path of something that can only be on a disk.

    Args:
        path: As the user gave it.
        what: It is, such as "the video".

    Raises:
        UserError: It is in a bucket.
    """
    if in_bucket(path):
        raise UserError(f"{what} {path} cannot be in a bucket; use a path on a disk, and copy with gcloud storage cp")
    return as_path(path)


def in_bucket(path: str | os.PathLike) -> bool:
    """Return whether a path is in a bucket."""
    return os.fspath(path).startswith(_SCHEME)


def absolute(path: Path) -> Path:
    """Return the absolute path."""
    return path if in_bucket(path) else path.absolute()


def read_bytes(path: Path) -> bytes:
    """Read a file, from a bucket in a single request.

    Raises:
        OSError: It cannot be read. Its ``strerror`` also holds what the bucket answered.
    """
    if not in_bucket(path):
        if path.is_char_device():  # /dev/zero never ends
            raise OSError(errno.EINVAL, "it is a device", path)
        return path.read_bytes()
    with _os_errors(path):
        return _file_system().cat_file(os.fspath(path))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; in a bucket, it appears when it is complete. Errors are those of ``read_bytes``."""
    if not in_bucket(path):
        path.write_bytes(data)
        return
    with _os_errors(path):
        _file_system().pipe_file(os.fspath(path), data)


def file_names(folder: Path) -> set[str]:
    """List the files in a folder; in a bucket also those in its folders, as ``folder/name``."""
    if in_bucket(folder):
        paths = _file_system().find(os.fspath(folder))
        start = len(os.fspath(folder).removeprefix(_SCHEME)) + 1
        return {path[start:] for path in paths}
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn what a bucket answers into the error that a disk would raise."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
    except Exception as error:  # gcsfs and aiohttp have many types
        raise OSError(errno.EIO, one_line(error), path) from None


@functools.cache
def _check_bucket(bucket: str) -> None:
    """Raise a UserError unless the files of a bucket can be listed."""
    if not bucket:
        raise UserError("gs:// names no bucket; give gs://BUCKET/FOLDER")
    # Otherwise epath prefers TensorFlow where it is installed, and gcsfs asks for a permission that few accounts have.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        _file_system().call("GET", "b/{}/o", bucket, maxResults=1)
    except ImportError:
        raise UserError('gs:// needs gcsfs, which is not installed; run pip install ".[gcs]" in the clone') from None
    except FileNotFoundError:
        raise UserError(f"there is no bucket gs://{bucket}; correct the name, or create it") from None
    except Exception as error:
        raise UserError(
            f"gs://{bucket} cannot be read ({one_line(error)}); log in with gcloud auth application-default login, "
            "as an account that may list its objects"
        ) from None


def _file_system() -> Any:
    import fsspec

    # Listings that are kept would miss what TensorStore and other processes write. epath has an instance of its own.
    fsspec.config.conf["gcs"] = fsspec.config.conf.get("gcs", {}) | {"use_listings_cache": False}
    return fsspec.filesystem("gcs")
