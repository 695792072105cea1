"""Reads checkpoints of torch without torch: the zip files of today and the older sequences of pickles.

torch's own restricted loader runs no code of a file either, but nested keys can hang or crash it.
"""

import functools
import io
import math
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - comes with JAX and teaches NumPy the name bfloat16
import numpy as np

from maskrcnn_jax.weights.pickles import MAX_DIMS, ArrayUnpickler, Budget, Inert, PickledArray

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {  # class of torch -> dtype of NumPy
    "torch.BoolStorage": "b1",
    "torch.ByteStorage": "u1",
    "torch.CharStorage": "i1",
    "torch.ShortStorage": "i2",
    "torch.IntStorage": "i4",
    "torch.LongStorage": "i8",
    "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "f4",
    "torch.DoubleStorage": "f8",
    "torch.ComplexFloatStorage": "c8",
    "torch.ComplexDoubleStorage": "c16",
    "torch.QUInt8Storage": "u1",
    "torch.QInt8Storage": "i1",
    "torch.QInt32Storage": "i4",
    "torch.storage.UntypedStorage": "u1",
}
# What checkpoints hold beside tensors and names of torch: options, and the state of schedules.
_INERT = ("argparse.Namespace", "collections.Counter", "__builtin__.set", "builtins.set")


# What zipfile and NumPy raise where an archive is damaged.
_DAMAGES = (
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error),
    *(KeyError, EOFError, OverflowError, StopIteration),
)


class _Storage(NamedTuple):
    """The numbers that tensors are views of."""

    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    """Stand-in for a dense tensor: a view of a storage, in elements. Nothing here is checked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _TorchUnpickler(ArrayUnpickler):
    """Reads tensors as ``_Tensor`` and everything else of torch as ``Inert``."""

    def __init__(self, file: io.BytesIO, budget: Budget):
        super().__init__(file, budget)
        self.allowed |= {name: np.dtype(code) for name, code in _STORAGES.items()}
        self.allowed |= dict.fromkeys(_INERT, Inert())
        self.allowed["torch._utils._rebuild_tensor"] = _Tensor
        self.allowed["torch._utils._rebuild_tensor_v2"] = self._rebuild_tensor
        self.allowed["torch._utils._rebuild_parameter"] = lambda tensor, *_options: tensor
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "torch":
            return self.allowed.get(f"{module}.{name}", Inert())
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:  # the older format has None at the end
            case ("storage", np.dtype() as dtype, str() as key, _, int() as length, *views) if views in ([], [None]):
                return self.storages.setdefault(key, _Storage(key, dtype, length))
        raise ValueError("it refers to data in an unknown way")

    def _rebuild_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, metadata: Any = None
    ) -> _Tensor | Inert:
        return Inert() if metadata else _Tensor(storage, offset, size, stride)  # such as a negated view


def read_torch(data: bytes, budget: Budget) -> tuple[Any, Callable[[Any], np.ndarray | None]]:
    """Read a checkpoint.

    Args:
        data: The content of the file.
        budget: What reading may cost.

    Returns:
        What the checkpoint holds, and a function that returns the array of a tensor in it, or None for anything else.

    Raises:
        ValueError: The file is no checkpoint or damaged, or refers to something that no checkpoint needs; the function
            raises it, too.
    """
    open_checkpoint = _open_zip if data.startswith(_ZIP_MAGIC) else _open_legacy
    tree, read_storage = open_checkpoint(data, budget)
    return tree, functools.partial(_to_array, read_storage=functools.cache(read_storage), budget=budget)


def _open_zip(data: bytes, budget: Budget) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        parts = archive.infolist()
        _check_parts(parts, len(data))
        root = next(part.filename.removesuffix("data.pkl") for part in parts if part.filename.endswith("/data.pkl"))
        tree = _TorchUnpickler(io.BytesIO(archive.read(f"{root}data.pkl")), budget).load()
        big_endian = f"{root}byteorder" in archive.NameToInfo and archive.read(f"{root}byteorder") == b"big"
    except _DAMAGES:
        raise ValueError("it is not a checkpoint of torch, or a damaged one") from None

    def read_storage(storage: _Storage) -> np.ndarray:
        try:
            flat = np.frombuffer(archive.read(f"{root}data/{storage.key}"), storage.dtype, storage.length)
        except _DAMAGES:
            raise ValueError(f"its data {storage.key[:80]!r} is missing or damaged") from None
        return flat.byteswap() if big_endian else flat

    return tree, read_storage


def _check_parts(parts: list[zipfile.ZipInfo], file_size: int) -> None:
    """Refuse what torch never writes, such as compressed parts, which can be a thousand times their size."""
    if len({part.filename for part in parts}) < len(parts):
        raise ValueError("it holds two parts of one name")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("it holds compressed parts")
    if sum(part.file_size for part in parts) > file_size:
        raise ValueError("its parts are larger than the file")


def _open_legacy(data: bytes, budget: Budget) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    file = io.BytesIO(data)
    magic, version, system = (_TorchUnpickler(file, budget).load() for _ in range(3))
    if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION or not isinstance(system, dict):
        raise ValueError("it is not a checkpoint of torch, or a damaged one")
    big_endian = not system.get("little_endian", True)
    unpickler = _TorchUnpickler(file, budget)
    tree, keys = unpickler.load(), _TorchUnpickler(file, budget).load()
    # Behind the pickles: the length of each storage in 8 bytes, and its elements.
    places, place = {}, file.tell()
    for key in keys:
        if not isinstance(key, str) or key not in unpickler.storages:
            raise ValueError("it has data that nothing refers to")
        places[key] = place + 8
        place += 8 + unpickler.storages[key].length * unpickler.storages[key].dtype.itemsize

    def read_storage(storage: _Storage) -> np.ndarray:
        try:
            flat = np.frombuffer(data, storage.dtype, storage.length, places[storage.key])
        except _DAMAGES:
            raise ValueError(f"its data {storage.key[:80]!r} is missing or damaged") from None
        return flat.byteswap() if big_endian else flat

    return tree, read_storage


def _to_array(tensor: Any, *, read_storage: Callable[[_Storage], np.ndarray], budget: Budget) -> np.ndarray | None:
    if isinstance(tensor, PickledArray):
        return tensor.value
    if not isinstance(tensor, _Tensor):
        return None
    storage, offset, size, stride = tensor
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("it has a tensor without data")
    if len(size) != len(stride) or len(size) > MAX_DIMS:
        raise ValueError("it has a tensor of an impossible shape")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *size, *stride)):
        raise ValueError("it has a tensor of an impossible shape")
    count = math.prod(size)
    budget.charge(count * storage.dtype.itemsize)  # an expanded tensor has few bytes in the file
    flat = read_storage(storage)
    if count == 0:
        return np.zeros(size, flat.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(flat):
        raise ValueError("it has a tensor that reaches beyond its data")
    strides = [step * flat.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat[offset:], size, strides).copy()
