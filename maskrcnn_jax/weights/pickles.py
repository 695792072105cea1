"""Reads pickles of arrays without Python's unpickler, which restricting its ``find_class`` does not make safe.

Nine bytes make that allocate 2 GB, and tuples within tuples used as a dict's key hang or crash it. The few opcodes
that arrays need are carried out here on plain data, so that whatever else a pickle asks for has nothing that could do
it.
"""

import io
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def read_pickle(data: bytes, budget: "Budget") -> Any:
    """Return what a pickle holds: dicts, lists, tuples, numbers, strings, bytes, and ``PickledArray``.

    Raises:
      ValueError: it is damaged, or refers to anything but arrays.
    """
    try:
        return _Pickle(data, budget).load()
    except (IndexError, KeyError, TypeError, OverflowError):  # an empty stack, an unknown memo, no pairs, a huge shape
        raise ValueError("it is no pickle, or a damaged one") from None


class Budget:
    """Bytes that arrays may still take, so that a small file cannot fill the memory."""

    def __init__(self, num_bytes: int):
        self._left = num_bytes

    def charge(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise ValueError("its arrays are said to be far larger than the file")


@dataclass(frozen=True)
class _Global:
    """A name that a pickle refers to; only ``_Pickle`` knows what to do with it."""

    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "="


@dataclass
class PickledArray:
    value: np.ndarray | None = None


class _Pickle:
    """Carries out the opcodes of a pickle that builds dicts of arrays, calling nothing but the methods below.

    Bytes become ``str`` in pickles of Python 2, one character each, as with ``encoding="latin1"``. Ordered dicts come
    as dicts, without the attributes that torch gives them.
    """

    def __init__(self, data: bytes, budget: Budget):
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
            # Only strings: hashing nested tuples takes exponential time.
            _add(_expect(target, dict), _expect(key, str), value)

    def _call(self, function: Any, args: Any) -> Any:
        match _expect(function, _Global).name, _expect(args, tuple):
            case "OrderedDict", ():
                return {}
            case "OrderedDict", (list() as items,):  # of Python 2
                self._budget.charge(100 * len(items))  # one list can be made a dict many times; arrays take more
                ordered = {}
                for key, value in items:
                    _add(ordered, _expect(key, str), value)
                return ordered
            case "encode", (str() as text, "latin1" | "latin-1"):
                return self._to_bytes(text)
            case "dtype", (str() as code, *_) if code in _DTYPES:
                return _Dtype(code)
            case "dtype", _:
                raise ValueError("it holds arrays of something other than numbers")
            case "_reconstruct", (_Global("ndarray"), *_):
                return PickledArray()  # the shape given here is never the array's own
            case "scalar", (_Dtype() as dtype, raw):
                return PickledArray(self._to_array(raw, dtype, (), "C"))
            case "_frombuffer", (raw, _Dtype() as dtype, tuple() as shape, "C" | "F" as order):
                return PickledArray(self._to_array(raw, dtype, shape, order))
        raise ValueError(f"it asks for {function.name} with arguments of another kind")

    def _set_state(self, target: Any, state: Any) -> None:
        match target, state:
            case dict(), _:
                pass  # _metadata of torch: the version of each module
            case _Dtype(), (_, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                target.order = order
            case PickledArray(), (_, tuple() as shape, _Dtype() as dtype, fortran, raw):
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


def _add(target: dict, key: str, value: Any) -> None:
    if key in target:
        raise ValueError(f"it has two entries named {key[:80]!r}")
    target[key] = value


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it has {type(value).__name__.strip('_')} where {kind.__name__.strip('_')} is needed")
    return value
