"""Reads and writes the weight files of other frameworks, as arrays by name, without ever running code from them.

Three kinds of files: ``.safetensors``; ``.pth`` of torch, through torch's own restricted loader; ``.pkl`` of
detectron2's model zoo, see pickles.py. torch's loader runs no code of a file, but nested keys can hang or crash it:
from strangers, prefer ``.safetensors``.
"""

import argparse
import io
import os
import re
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - comes with JAX and teaches NumPy the name bfloat16
import numpy as np
import safetensors.numpy

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.weights.pickles import Budget, PickledArray, read_pickle
from maskrcnn_jax.writing import replace_file

_STATE_DICT_KEYS = ("model", "state_dict")
_PLAIN_KINDS = "biuf"  # of dtypes: bool, int, unsigned, float
_MAX_GROWTH = 4  # arrays may take this many times the bytes of their file; bfloat16 takes 2


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of a weight file, from its entry "model" or "state_dict" where it has one.

    Args:
        path: a ``.safetensors``, ``.pth``, ``.pt`` or ``.pkl`` file, from whatever source.

    Returns:
        Name -> array, in the order of the file; bfloat16 and smaller floats come as float32.

    Raises:
        UserError: the file cannot be read, is of another kind, or holds anything but arrays by name.
    """
    path = Path(path)
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; check the path and its permissions") from None
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path} is no weight file that can be read; give a file with {', '.join(sorted(_READERS))}")
    read = _READERS[path.suffix.lower()]
    try:
        return read(path, Budget(_MAX_GROWTH * size))
    except UserError:
        raise
    except ValueError as e:
        raise UserError(
            f"{path} cannot be read as weights: {e}; fetch it again if it came over a network, or save its state dict "
            "alone, where it was made, as .safetensors"
        ) from None


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a torch state dict (``.pth``) or as ``.safetensors``, replacing the file only when complete.

    Raises:
        UserError: the ending is another one, an entry is no array of numbers, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise UserError(f"{path} cannot be written as weights; give a name with {' or '.join(sorted(_WRITERS))}")
    try:
        plain = _collect(arrays, lambda value: _to_plain(np.asarray(value)))
    except ValueError as e:
        raise UserError(f"{path} cannot be written: {e}; give arrays of numbers by name") from None
    replace_file(path, _WRITERS[path.suffix.lower()](plain))


def _collect(tree: Any, convert: Callable[[Any], np.ndarray | None]) -> dict[str, np.ndarray]:
    if not isinstance(tree, Mapping):
        raise ValueError(f"it holds {type(tree).__name__} where arrays by name are needed")
    arrays = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(f"it has an entry named by {type(key).__name__} where str is needed")
        array = convert(value)
        if array is None:
            raise ValueError(f"its entry {key[:80]!r} ({type(value).__name__.strip('_')}) is no array of numbers")
        arrays[key] = array
    if not arrays:
        raise ValueError("it holds no arrays")
    return arrays


def _select_state_dict(tree: Any) -> Any:
    found = [key for key in _STATE_DICT_KEYS if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping)]
    if len(found) > 1:
        raise ValueError(f"it holds weights under {' and '.join(map(repr, found))}, and it is unclear which are meant")
    return tree[found[0]] if found else tree


def _to_plain(array: np.ndarray) -> np.ndarray | None:
    """Return a dense array in a dtype and byte order that every library knows, or None where there is none."""
    if array.dtype.kind == "V" and array.dtype.isbuiltin == 2:  # the floats of ml_dtypes
        return array.astype(np.float32, order="C")
    if array.dtype.kind not in _PLAIN_KINDS:
        return None
    return array.astype(array.dtype.newbyteorder("="), order="C", copy=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _read_safetensors(path: Path, budget: Budget) -> dict[str, np.ndarray]:
    try:
        arrays = safetensors.numpy.load_file(path)
    except Exception as e:  # a SafetensorError, but also what NumPy makes of an odd shape or dtype
        raise ValueError(_first_line(e)) from None
    return _collect(arrays, _to_plain)


def _import_torch() -> types.ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch, which .pth and .pt files need, is not installed; install it (pip install torch) or convert the "
            "file to .safetensors"
        ) from None
    return torch


def _read_torch(path: Path, budget: Budget) -> dict[str, np.ndarray]:
    torch = _import_torch()
    _check_zip(path)

    def convert(value: Any) -> np.ndarray | None:
        if not isinstance(value, torch.Tensor):
            return None
        narrow = value.is_floating_point() and value.dtype not in (torch.float16, torch.float32, torch.float64)
        budget.charge(value.numel() * (4 if narrow else value.element_size()))  # an expanded tensor has few bytes
        try:
            return _to_plain((value.detach().float() if narrow else value.detach()).numpy())
        except (TypeError, RuntimeError):  # sparse, quantized, without data
            return None

    # The references of torchvision keep their command line in the checkpoint; a Namespace only holds attributes.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # about protocols and storages of old files
        try:
            tree = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # which ones torch does not say; RuntimeError, EOFError and KeyError are among them
            refused = re.search(r"GLOBAL (\S+)", str(e))
            if refused:
                raise ValueError(f"it refers to {refused[1][:80]!r}, which no array needs") from None
            raise ValueError("it is no checkpoint of torch, or a damaged one") from None
    return _collect(_select_state_dict(tree), convert)


def _check_zip(path: Path) -> None:
    """Refuse compressed parts, which torch reads but never writes, and which can be a thousand times their size."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # torch's older format
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as e:
        raise ValueError(_first_line(e)) from None
    if len({part.filename for part in parts}) < len(parts):
        raise ValueError("it holds two parts of one name")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("it holds compressed parts")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts are said to be larger than the file")


def _to_torch(arrays: dict[str, np.ndarray]) -> bytes:
    torch = _import_torch()
    writable = {name: np.require(array, requirements="W") for name, array in arrays.items()}  # torch warns otherwise
    tensors = OrderedDict((name, torch.from_numpy(array)) for name, array in writable.items())
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def _read_pickle(path: Path, budget: Budget) -> dict[str, np.ndarray]:
    tree = read_pickle(path.read_bytes(), budget)
    return _collect(_select_state_dict(tree), lambda value: value.value if isinstance(value, PickledArray) else None)


_READERS = {".safetensors": _read_safetensors, ".pth": _read_torch, ".pt": _read_torch, ".pkl": _read_pickle}
_WRITERS = {".safetensors": safetensors.numpy.save, ".pth": _to_torch}
