"""Reads pickles of arrays without running any code that they ask for.

``find_class`` returns inert stand-ins for the few functions that arrays need and refuses every other name. The class
behind it is ``pickle._Unpickler``, the unpickler that the standard library has in Python. ``pickle.Unpickler``, in C,
cannot be made safe: it hashes the keys of dicts itself, so nested tuples hang it or overflow its stack, and a distant
memo index makes it allocate gigabytes for a file of nine bytes.
"""

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

MAX_DIMS = 8
_DTYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
# Those that arrays, dicts, lists, tuples, numbers, strings and bytes need. None imports or calls by other means than
# ``find_class``.
_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE
    BINPERSID
"""

# What the unpickler raises where a pickle is cut short, or an opcode finds an empty stack or the wrong operands.
_DAMAGES = (
    *(EOFError, struct.error, pickle.UnpicklingError),
    *(IndexError, KeyError, TypeError, AttributeError, OverflowError),
)


class Budget:
    """What reading a file may cost, so that a small one can neither fill the memory nor take forever."""

    def __init__(self, file_size: int):
        self._bytes = 4 * file_size  # of arrays: bfloat16 takes twice as many as in the file
        self._opcodes = 100_000 + file_size // 100  # the 650 arrays of R101-FPN need 22,000; each takes some 100 bytes

    def charge(self, num_bytes: int) -> None:
        """Count the bytes of an array.

        Raises:
            ValueError: There are too many for the size of the file.
        """
        self._bytes -= num_bytes
        if self._bytes < 0:
            raise ValueError("its arrays are far larger than the file")

    def count_opcode(self) -> None:
        """Count an opcode of a pickle.

        Raises:
            ValueError: There are too many for the size of the file.
        """
        self._opcodes -= 1
        if self._opcodes < 0:
            raise ValueError("it holds more than arrays (too many opcodes)")


class PickledArray:
    """Stand-in for ``numpy.ndarray``; ``value`` is None until the pickle sets the state of the array."""

    def __init__(self):
        self.value: np.ndarray | None = None


class Inert:
    """Stand-in for a function or an object that may be in a file but is not read."""

    def __call__(self, *_args: Any) -> "Inert":
        return self


class _Dtype:
    """Stand-in for ``numpy.dtype``."""

    def __init__(self, code: Any, *_align_and_copy: Any):
        if not isinstance(code, str) or code not in _DTYPES:
            raise ValueError("it holds arrays of something other than numbers")
        self.code = code
        self.order: Literal["<", ">", "|", "="] = "="


class _Dict(dict):
    """A dict whose keys are distinct strings or integers: hashing anything else could take exponential time."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int):
            raise ValueError(f"it has an entry named by {type(key).__name__} where str is needed")
        if key in self:
            raise ValueError(f"it has two entries named {str(key)[:80]!r}")
        super().__setitem__(key, value)


class _Dispatch(dict):
    """The allowed opcodes and their methods. Each look-up counts as one opcode of the pickle."""

    def __init__(self, budget: Budget):
        codes = [getattr(pickle, name)[0] for name in _OPCODES.split()]
        inherited = pickle._Unpickler.dispatch
        super().__init__({code: inherited[code] for code in codes})
        self[pickle.BYTEARRAY8[0]] = inherited[pickle.BINBYTES8[0]]  # load_bytearray8 allocates before it reads
        self[pickle.NEWOBJ[0]] = inherited[pickle.REDUCE[0]]  # stand-ins are called, which calls no __new__
        self[pickle.EMPTY_DICT[0]] = ArrayUnpickler.load_empty_dictionary
        self[pickle.BUILD[0]] = ArrayUnpickler.load_build
        self._budget = budget

    def __getitem__(self, code: int) -> Any:
        self._budget.count_opcode()
        if code not in self:
            raise ValueError(f"it holds more than arrays (opcode {bytes([code])!r})")
        return super().__getitem__(code)


class ArrayUnpickler(pickle._Unpickler):
    """Reads dicts, lists, tuples, numbers, strings, bytes and ``PickledArray``.

    Strings of Python 2 become ``str``, one character per byte. Ordered dicts become dicts without attributes.
    """

    # Set by the inherited methods.
    append: Callable[[Any], None]
    stack: list[Any]

    def __init__(self, file: io.BytesIO, budget: Budget):
        """Prepare to read a pickle.

        Args:
            file: Other files may allocate more than they hold when a pickle asks for more.
            budget: What reading may cost.
        """
        super().__init__(file, encoding="latin1")
        self.dispatch = _Dispatch(budget)  # type: ignore[misc]  # hides the class attribute
        self.allowed = {
            "_codecs.encode": self._encode,  # bytes in protocol 2
            "collections.OrderedDict": self._ordered_dict,
            "numpy.dtype": _Dtype,
            "numpy.ndarray": PickledArray,
        }
        for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
            self.allowed[f"{core}.multiarray._reconstruct"] = self._reconstruct
            self.allowed[f"{core}.multiarray.scalar"] = self._scalar
            self.allowed[f"{core}.numeric._frombuffer"] = self._frombuffer  # protocol 5
        self._budget = budget

    def load(self) -> Any:
        """Return what the pickle holds.

        Raises:
            ValueError: The pickle is damaged, or refers to anything but arrays.
        """
        try:
            return super().load()
        except _DAMAGES:
            raise ValueError("it is not a pickle, or a damaged one") from None

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self.allowed:
            raise ValueError(f"it refers to {full_name[:80]!r}, which no array needs")
        return self.allowed[full_name]

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_build(self) -> None:
        """Set the state of the object on top of the stack; the inherited method could set any attribute."""
        state = self.stack.pop()
        match self.stack[-1], state:
            case _Dict() | Inert(), _:
                pass  # such as _metadata of a torch state dict: the version of each module
            case _Dtype() as dtype, (_, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                dtype.order = order
            case PickledArray() as array, (_, shape, dtype, fortran, raw):
                array.value = self._to_array(raw, dtype, shape, "F" if fortran else "C")
            case target, _:
                raise ValueError(f"it changes {type(target).__name__.strip('_')} in an unknown way")

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError("it has bytes in an unknown encoding")
        return self._to_bytes(text)

    def _ordered_dict(self, pairs: Any = ()) -> _Dict:
        self._budget.charge(100 * len(pairs))  # a pickle can make one list into many dicts
        ordered = _Dict()
        for key, value in pairs:
            ordered[key] = value
        return ordered

    def _reconstruct(self, kind: Any, *_shape_and_code: Any) -> PickledArray:
        if kind is not PickledArray:
            raise ValueError("it has arrays of an unknown class")
        return kind()  # the state brings the shape

    def _scalar(self, dtype: Any, raw: Any) -> PickledArray:
        return self._frombuffer(raw, dtype, (), "C")

    def _frombuffer(self, raw: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
        array = PickledArray()
        array.value = self._to_array(raw, dtype, shape, order)
        return array

    def _to_array(self, raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        if not isinstance(dtype, _Dtype) or order not in ("C", "F"):
            raise ValueError("it has an array without a dtype or an order")
        if not isinstance(shape, tuple) or len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("it has an array of an impossible shape")
        flat = np.frombuffer(self._to_bytes(raw), np.dtype(dtype.code).newbyteorder(dtype.order))
        self._budget.charge(flat.nbytes)
        return flat.reshape(shape, order=order).astype(dtype.code, order="C")

    def _to_bytes(self, raw: Any) -> bytes:
        if isinstance(raw, str):
            self._budget.charge(len(raw))
            return raw.encode("latin1")
        if not isinstance(raw, bytes):
            raise ValueError(f"it has {type(raw).__name__.strip('_')} where the bytes of an array are needed")
        return raw
