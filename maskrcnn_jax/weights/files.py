"""Reads and writes the weight files of other frameworks as arrays by name, without running code from them.

Three kinds of files: ``.safetensors``; ``.pth`` and ``.pt`` of torch; ``.pkl`` of detectron2's model zoo. Only writing
``.pth`` needs torch.
"""

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - comes with JAX and teaches NumPy the name bfloat16
import numpy as np
import safetensors.numpy

from maskrcnn_jax.errors import UserError, one_line
from maskrcnn_jax.paths import as_path, local_path
from maskrcnn_jax.weights.pickles import ArrayUnpickler, Budget, PickledArray
from maskrcnn_jax.weights.torch_files import read_torch
from maskrcnn_jax.writing import replace_file

_STATE_DICT_KEYS = ("model", "state_dict")
_PLAIN_KINDS = "biuf"  # of dtypes: bool, int, unsigned, float


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of a weight file, from its entry "model" or "state_dict" where it has one.

    Args:
        path: a ``.safetensors``, ``.pth``, ``.pt`` or ``.pkl`` file, from whatever source.

    Returns:
        Name -> array, in the order of the file; bfloat16 and smaller floats come as float32.

    Raises:
        UserError: the file cannot be read, is of another kind, or holds anything but arrays by name.
    """
    path = local_path(path, "the weights")
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from None
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path} is not a readable file of weights; give one with {', '.join(sorted(_READERS))}")
    read = _READERS[path.suffix.lower()]
    try:
        return read(path, Budget(size))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read as weights: {error}; download it again, or save its state dict alone as "
            ".safetensors where it was made"
        ) from None


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a torch state dict (``.pth``) or as ``.safetensors``, replacing the file only when complete.

    Raises:
        UserError: the ending is another one, an entry is no array of numbers, or the file cannot be written.
    """
    path = as_path(path)
    if path.suffix.lower() not in _WRITERS:
        raise UserError(f"{path} cannot be written as weights; give a name with {' or '.join(sorted(_WRITERS))}")
    try:
        plain = _collect(arrays, lambda value: _to_plain(np.asarray(value)))
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {error}; give arrays of numbers by name") from None
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


def _read_safetensors(path: Path, budget: Budget) -> dict[str, np.ndarray]:
    try:
        arrays = safetensors.numpy.load_file(path)
    except Exception as error:  # a SafetensorError, but also what NumPy makes of an odd shape or dtype
        raise ValueError(one_line(error)) from None
    return _collect(arrays, _to_plain)


def _read_torch(path: Path, budget: Budget) -> dict[str, np.ndarray]:
    tree, to_array = read_torch(path.read_bytes(), budget)

    def convert(value: Any) -> np.ndarray | None:
        array = to_array(value)
        return None if array is None else _to_plain(array)

    return _collect(_select_state_dict(tree), convert)


def _to_torch(arrays: dict[str, np.ndarray]) -> bytes:
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch, which writes .pth files, is not installed; install it (pip install torch) or write .safetensors"
        ) from None
    writable = {name: np.require(array, requirements="W") for name, array in arrays.items()}  # torch warns otherwise
    tensors = OrderedDict((name, torch.from_numpy(array)) for name, array in writable.items())
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def _read_pickle(path: Path, budget: Budget) -> dict[str, np.ndarray]:
    tree = ArrayUnpickler(io.BytesIO(path.read_bytes()), budget).load()
    return _collect(_select_state_dict(tree), lambda value: value.value if isinstance(value, PickledArray) else None)


_READERS = {".safetensors": _read_safetensors, ".pth": _read_torch, ".pt": _read_torch, ".pkl": _read_pickle}
_WRITERS: dict[str, Callable[[dict[str, np.ndarray]], bytes]] = {
    ".safetensors": safetensors.numpy.save,
    ".pth": _to_torch,
}
