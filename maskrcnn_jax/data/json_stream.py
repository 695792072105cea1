"""Reads a large JSON object without ever holding all of it as Python objects.

``json.load`` needs about 6 GB for COCO's training annotations. Here the bytes of the file are held once, and the
elements of the long lists are decoded one or a few hundred at a time.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import read_bytes

_BATCH = 3 << 15  # bytes; the numbers of more would leave the processor's cache before they are packed
_WINDOW = 1 << 12  # bytes of a value that are decoded; more where it is longer
_DECODER = json.JSONDecoder()
_RAW_DECODER = msgspec.json.Decoder(msgspec.Raw)
_SPACE = re.compile(rb"[ \t\n\r]*")
_FIRST_KEY = re.compile(rb'(?:\{[ \t\n\r]*"\w+")?')
_OTHER_FILES = {b"\x1f\x8b": "it is compressed by gzip", b"\xff\xfe": "it is UTF-16", b"\xfe\xff": "it is UTF-16"}
_NON_ASCII = re.compile(rb"[\x80-\xff]+")


def stream_json(
    path: Path,
    handlers: Mapping[str, Callable[[Any], None]],
    batch_handlers: Mapping[str, Callable[[bytes], bool]] | None = None,
    skip: Collection[str] = (),
) -> dict[str, Any]:
    """Read the object in a file and hand every element of some of its lists to a function.

    Args:
        path: the JSON file; its top level is an object.
        handlers: name of a top-level list -> function called with each of its elements, in order.
        batch_handlers: name of a top-level list -> function called first, with the text of a list of consecutive
            elements. It returns whether it took them; it must not where the text is not valid JSON.
        skip: names of top-level lists that are only checked to be valid JSON. All of COCO's annotations as Python
            objects would take gigabytes.

    Returns:
        The other values of the object by name, decoded whole; the names of handled and skipped lists that were met
        map to None.

    Raises:
        UserError: the file is not valid JSON, its top level is not an object, or a handled or skipped value is not a
            list.
    """
    handlers = dict.fromkeys(skip, _ignore) | dict(handlers)
    batch_handlers = dict.fromkeys(skip, _is_valid) | dict(batch_handlers or {})
    data = _read_utf8(path)
    try:
        return _walk_object(data, handlers, batch_handlers)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at character {error.pos} (line {error.lineno}, column "
            f"{error.colno}) of {len(data.decode())}; it may be cut short, so fetch or write it again"
        ) from None
    except _StructureError as error:
        raise UserError(f"{path} has another structure: {error}") from None


class _StructureError(Exception):
    """Valid JSON of another type than is expected; says what is there and what should be."""


def _read_utf8(path: Path) -> bytes:
    """Read a file of UTF-8 text, without the mark that some editors put before it.

    Raises:
        UserError: the file cannot be read or is no UTF-8.
    """
    try:
        data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
        if not data.isascii():
            for match in _NON_ASCII.finditer(data):
                match[0].decode()
        return data
    except UnicodeDecodeError as error:
        reason = _OTHER_FILES.get(data[:2], error.reason)
        raise UserError(f"{path} is not UTF-8 text: {reason}; JSON must be, so convert or fetch it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from None


def _walk_object(
    data: bytes,
    handlers: Mapping[str, Callable[[Any], None]],
    batch_handlers: Mapping[str, Callable[[bytes], bool]],
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    _check_type(data, 0, "{", f"the file must hold an object with lists such as {', '.join(handlers)}")
    pos = _expect(data, 0, "{")
    while not data.startswith(b"}", pos):
        if values:
            pos = _expect(data, pos, ",")
        name, pos = _decode(data, pos)
        if not isinstance(name, str):
            raise _error("expected a name in double quotes", data, pos)
        if name in values:  # else the elements of two lists would be mixed
            raise _StructureError(f'"{name}" occurs more than once; join them or remove one')
        pos = _expect(data, pos, ":")
        if name in handlers:
            values[name] = None
            _check_type(data, pos, "[", f'make "{name}" a list')
            pos = _walk_list(data, pos, handlers[name], batch_handlers.get(name, _refuse))
        else:
            values[name], pos = _decode(data, pos)
        pos = _skip_space(data, pos)
    if _skip_space(data, pos + 1) != len(data):
        raise _error("unexpected text after the end", data, pos + 1)
    return values


def _walk_list(data: bytes, pos: int, handle: Callable[[Any], None], handle_batch: Callable[[bytes], bool]) -> int:
    pos = _expect(data, pos, "[")
    if data.startswith(b"]", pos):
        return pos + 1
    key = _FIRST_KEY.match(data, pos)[0]  # type: ignore[index]  # always matches; the other elements begin alike
    last_brace = re.compile(rb"\}(?=[ \t\n\r]*,[ \t\n\r]*%b)" % re.escape(key))
    next_batch = pos
    view = memoryview(data)  # its slices are not copied
    while True:
        found = None
        if pos >= next_batch:
            next_batch = pos + _BATCH
            found = last_brace.search(data, next_batch, next_batch + _BATCH)
        # A wrong brace does no harm: what is valid JSON in brackets is a sequence of whole elements.
        if found and handle_batch(b"".join((b"[", view[pos : found.end()], b"]"))):
            pos = next_batch = found.end()
        else:
            element, end = _decode(data, pos)
            if not handle_batch(b"[%b]" % data[pos:end]):
                handle(element)
            pos = end
        pos = _skip_space(data, pos)
        if data.startswith(b"]", pos):
            return pos + 1
        pos = _expect(data, pos, ",")


def _check_type(data: bytes, pos: int, character: str, remedy: str) -> None:
    """Raise _StructureError if the value at a position is whole but does not begin with ``character``.

    Args:
        data: the text.
        pos: where the value begins, after optional white space.
        character: "{" of an object or "[" of a list.
        remedy: what to do.
    """
    pos = _skip_space(data, pos)
    if pos < len(data) and not data.startswith(character.encode(), pos):
        value, _ = _decode(data, pos)
        names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
        found, place = names.get(type(value), "a number"), len(data[:pos].decode(errors="replace"))
        raise _StructureError(f"expected {character!r} at character {place}, but there is {found}; {remedy}")


def _refuse(batch: bytes) -> bool:
    return False


def _ignore(element: object) -> None:
    pass


def _is_valid(batch: bytes) -> bool:
    try:
        _RAW_DECODER.decode(batch)
        return True
    except (ValueError, RecursionError):
        return False


def _decode(data: bytes, pos: int) -> tuple[Any, int]:
    """Return the value at a position and the position of what follows it."""
    size = _WINDOW
    while True:
        window = memoryview(data)[pos : pos + size]
        # Latin-1 has a character for every byte, so that positions are those of the bytes.
        text = str(window, "latin-1")
        try:
            value, length = _DECODER.raw_decode(text)
            if length < len(text) or pos + length == len(data):
                return value if text.isascii() else json.loads(str(window[:length], "utf-8")), pos + length
        except json.JSONDecodeError as error:
            if pos + size >= len(data):
                raise _error(error.msg, data, pos + error.pos) from None
        except RecursionError:
            raise _error("lists or objects lie too deep inside one another", data, pos) from None
        except ValueError:
            raise _error("a number has more digits than Python converts", data, pos) from None
        size *= 16  # the value may pass the end of the window


def _skip_space(data: bytes, pos: int) -> int:
    return _SPACE.match(data, pos).end()  # type: ignore[union-attr]  # matches everywhere


def _expect(data: bytes, pos: int, character: str) -> int:
    """Return the position of what follows ``character``, which must come next after optional white space."""
    pos = _skip_space(data, pos)
    if not data.startswith(character.encode(), pos):
        raise _error(f"expected {character!r}", data, pos)
    return _skip_space(data, pos + 1)


def _error(message: str, data: bytes, pos: int) -> json.JSONDecodeError:
    before = data[:pos].decode(errors="replace")  # the position may lie inside a character
    return json.JSONDecodeError(message, before, len(before))
