"""Reads and writes the weight files of other frameworks, as arrays by name, without ever running code from them.

Three kinds of files: ``.safetensors``; ``.pth`` of torch, through torch's own restricted loader; ``.pkl`` of
detectron2's model zoo. Python's unpickler stays out of it, as restricting its ``find_class`` is not enough: nine bytes
make it allocate 2 GB, and tuples within tuples used as a dict's key hang or crash it. The few opcodes that arrays need
are carried out here on plain data, so that whatever else a pickle asks for has nothing that could do it. torch's
loader runs no code of a file either, but nested keys hang or crash it too: from strangers, prefer ``.safetensors``.
"""

import argparse
import contextlib
import io
import os
import pickletools
import re
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - comes with JAX and teaches NumPy the name bfloat16
import numpy as np
import safetensors.numpy

from maskrcnn_jax.errors import UserError

_STATE_DICT_KEYS = ("model", "state_dict")
_PLAIN_KINDS = "biufc"  # of dtypes: bool, int, unsigned, float, complex
_MAX_GROWTH = 4  # arrays may take this many times the bytes of their file; bfloat16 takes 2
_MAX_DIMS = 8
_MAX_OPS = 100_000  # 650 arrays, as of R101-FPN, need 22,000; an opcode costs at most some 100 bytes

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and 2
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_GLOBALS = {
    "_codecs.encode": "encode",  # bytes, in a pickle that Python 2 shall be able to read
    "collections.OrderedDict": "OrderedDict",
    "numpy.dtype": "dtype",
    "numpy.ndarray": "ndarray",
    **{f"{module}._reconstruct": "_reconstruct" for module in _MULTIARRAY},
    **{f"{module}.scalar": "scalar" for module in _MULTIARRAY},
    **{f"{module}._frombuffer": "_frombuffer" for module in _NUMERIC},  # protocol 5
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_OPCODE_NAMES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_OPCODES = {op.code.encode("latin1"): op for op in pickletools.opcodes if op.name in _OPCODE_NAMES.split()}
_DTYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))


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
        return read(path, _Budget(_MAX_GROWTH * size))
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
    write = _WRITERS[path.suffix.lower()](plain)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()  # an OSError, where the libraries raise their own
        write(partial)
        partial.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:  # a full disk raises any of them
        reason = getattr(e, "strerror", None) or _first_line(e)
        raise UserError(f"cannot write {path}: {reason}; check the folder, its permissions and free space") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class _Budget:
    """Bytes that arrays may still take, so that a small file cannot fill the memory."""

    def __init__(self, num_bytes: int):
        self._left = num_bytes

    def charge(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise ValueError("its arrays are said to be far larger than the file")


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
    for key in _STATE_DICT_KEYS:
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            return tree[key]
    return tree


def _to_plain(array: np.ndarray) -> np.ndarray | None:
    """Return a dense array in a dtype and byte order that every library knows, or None where there is none."""
    if array.dtype.kind == "V" and array.dtype.isbuiltin == 2:  # the floats of ml_dtypes
        return array.astype(np.float32, order="C")
    if array.dtype.kind not in _PLAIN_KINDS:
        return None
    return array.astype(array.dtype.newbyteorder("="), order="C", copy=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _read_safetensors(path: Path, budget: _Budget) -> dict[str, np.ndarray]:
    try:
        arrays = safetensors.numpy.load_file(path)
    except Exception as e:  # a SafetensorError, but also what NumPy makes of an odd shape or dtype
        raise ValueError(_first_line(e)) from None
    return _collect(arrays, _to_plain)


def _write_safetensors(arrays: dict[str, np.ndarray]) -> Callable[[Path], None]:
    return lambda path: safetensors.numpy.save_file(arrays, path)


def _import_torch() -> types.ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch, which .pth and .pt files need, is not installed; install it (pip install torch) or convert the "
            "file to .safetensors"
        ) from None
    return torch


def _read_torch(path: Path, budget: _Budget) -> dict[str, np.ndarray]:
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
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("it holds compressed parts")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts are said to be larger than the file")


def _write_torch(arrays: dict[str, np.ndarray]) -> Callable[[Path], None]:
    torch = _import_torch()
    writable = {name: np.require(array, requirements="W") for name, array in arrays.items()}  # torch warns otherwise
    tensors = OrderedDict((name, torch.from_numpy(array)) for name, array in writable.items())
    return lambda path: torch.save(tensors, path)


@dataclass(frozen=True)
class _Global:
    """A name that a pickle refers to; only ``_Pickle`` knows what to do with it."""

    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "="


@dataclass
class _Array:
    value: np.ndarray | None = None


class _Pickle:
    """Carries out the opcodes of a pickle that builds dicts of arrays, calling nothing but the methods below.

    Bytes become ``str`` in pickles of Python 2, one character each, as with ``encoding="latin1"``. Ordered dicts come
    as dicts, without the attributes that torch gives them.
    """

    def __init__(self, data: bytes, budget: _Budget):
        self._file = io.BytesIO(data)  # unlike a file, it allocates no more than it has when asked for more
        self._budget = budget
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        for _ in range(_MAX_OPS):
            code = self._file.read(1)
            if not code:
                raise ValueError("it is cut short")
            op = _OPCODES.get(code)
            if op is None:
                raise ValueError(f"it is no pickle of arrays alone (opcode {code!r})")
            arg = op.arg.reader(self._file) if op.arg and op.name != "GLOBAL" else None
            if op.name == "STOP":
                return self._stack.pop()
            self._run(op.name, arg)
        raise ValueError("it is no pickle of arrays alone (too many opcodes)")

    def _run(self, name: str, arg: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop_many(int(name[-1]))))
            case "MARK":
                self._outer.append(stack)
                self._stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS":
                self._stack = self._outer.pop()
                self._close(name, stack)
            case "APPEND":
                self._close("APPENDS", self._pop_many(1))
            case "SETITEM":
                self._close("SETITEMS", self._pop_many(2))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[arg] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[arg])
            case "GLOBAL":
                stack.append(_find_global(self._read_line(), self._read_line()))
            case "STACK_GLOBAL":
                stack.append(_find_global(*self._pop_many(2)))
            case "REDUCE":
                function, args = self._pop_many(2)
                stack.append(self._call(function, args))
            case "BUILD":
                self._set_state(stack[-2], stack.pop())
            case _:
                stack.append(_CONSTANTS.get(name, arg))  # arg: a number, a string or bytes

    def _read_line(self) -> str:
        # The reader of pickletools would undo escapes, which Python's unpickler does not.
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ValueError("it is cut short")
        return line[:-1].decode()

    def _pop_many(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("the stack is too short")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _close(self, name: str, items: list[Any]) -> None:
        if name == "TUPLE":
            self._stack.append(tuple(items))
            return
        target = self._stack[-1]
        if name == "APPENDS":
            _expect(target, list).extend(items)
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            _expect(target, dict)[_expect(key, str)] = value  # hashing nested tuples takes exponential time

    def _call(self, function: Any, args: Any) -> Any:
        match _expect(function, _Global).name, _expect(args, tuple):
            case "OrderedDict", ():
                return {}
            case "OrderedDict", (list() as items,):  # of Python 2
                self._budget.charge(100 * len(items))  # one list can be made a dict many times; arrays take more
                return {_expect(key, str): value for key, value in items}
            case "encode", (str() as text, "latin1" | "latin-1"):
                return self._to_bytes(text)
            case "dtype", (str() as code, *_) if code in _DTYPES:
                return _Dtype(code)
            case "dtype", _:
                raise ValueError("it holds arrays of something other than numbers")
            case "_reconstruct", (_Global("ndarray"), *_):
                return _Array()  # the shape given here is never the array's own
            case "scalar", (_Dtype() as dtype, raw):
                return _Array(self._to_array(raw, dtype, (), "C"))
            case "_frombuffer", (raw, _Dtype() as dtype, tuple() as shape, "C" | "F" as order):
                return _Array(self._to_array(raw, dtype, shape, order))
        raise ValueError(f"it asks for {function.name} with arguments of another kind")

    def _set_state(self, target: Any, state: Any) -> None:
        match target, state:
            case dict(), _:
                pass  # _metadata of torch: the version of each module
            case _Dtype(), (_, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                target.order = order
            case _Array(), (_, tuple() as shape, _Dtype() as dtype, fortran, raw):
                target.value = self._to_array(raw, dtype, shape, "F" if fortran else "C")
            case _:
                raise ValueError(f"it changes {type(target).__name__.strip('_')} in an unknown way")

    def _to_array(self, raw: Any, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
        raw = self._to_bytes(raw)
        flat = np.frombuffer(raw, np.dtype(dtype.code).newbyteorder(dtype.order))
        if len(shape) > _MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("it holds an array of an impossible shape")
        self._budget.charge(flat.nbytes)
        return flat.reshape(shape, order=order).astype(dtype.code, order="C")

    def _to_bytes(self, raw: Any) -> bytes:
        if isinstance(raw, str):
            self._budget.charge(len(raw))
            return raw.encode("latin1")
        if not isinstance(raw, bytes | bytearray):
            raise ValueError(f"it has {type(raw).__name__} where the bytes of an array are needed")
        return raw


def _find_global(module: Any, name: Any) -> _Global:
    full_name = f"{_expect(module, str)}.{_expect(name, str)}"
    if full_name not in _GLOBALS:
        raise ValueError(f"it refers to {full_name[:80]!r}, which no array needs")
    return _Global(_GLOBALS[full_name])


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it has {type(value).__name__.strip('_')} where {kind.__name__.strip('_')} is needed")
    return value


def _read_pickle(path: Path, budget: _Budget) -> dict[str, np.ndarray]:
    try:
        tree = _Pickle(path.read_bytes(), budget).load()
    except (IndexError, KeyError, TypeError, OverflowError):  # an empty stack, an unknown memo, no pairs, a huge shape
        raise ValueError("it is no pickle, or a damaged one") from None
    return _collect(_select_state_dict(tree), lambda value: value.value if isinstance(value, _Array) else None)


_READERS = {".safetensors": _read_safetensors, ".pth": _read_torch, ".pt": _read_torch, ".pkl": _read_pickle}
_WRITERS = {".safetensors": _write_safetensors, ".pth": _write_torch}
