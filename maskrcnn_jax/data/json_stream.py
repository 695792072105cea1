"""Reads a large JSON object with Python's ``json``, without ever holding all of it as Python objects.

``json.load`` needs about 6 GB for COCO's training annotations. Here the text is held once, one byte a character, and
the elements of the long lists are decoded one at a time.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskrcnn_jax.errors import UserError

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_NON_ASCII = re.compile(rb"[\x80-\xff]+")


def stream_json(path: Path, handlers: dict[str, Callable[[Any], None]]) -> dict[str, Any]:
    """Read the object in a file and hand every element of some of its lists to a function.

    Args:
        path: the JSON file; its top level is an object.
        handlers: name of a top-level list -> function called with each of its elements, in order.

    Returns:
        The other values of the object by name, decoded whole; the names in ``handlers`` that were met map to None.

    Raises:
        UserError: the file is not valid JSON, its top level is no object, or a value in ``handlers`` is no list.
    """
    data = read_utf8(path)
    # One character beyond Latin-1 would make Python store the whole text in two or four bytes a character. JSON has
    # such characters only inside strings, where an escape means the same.
    text = _NON_ASCII.sub(lambda match: json.dumps(match[0].decode())[1:-1].encode(), data).decode("ascii")
    del data
    try:
        return _walk_object(text, handlers)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at character {error.pos} (line {error.lineno}, column "
            f"{error.colno}) of {len(text)}; it may be cut short, so fetch or write it again"
        ) from None


def read_utf8(path: Path) -> bytes:
    """Read a file of UTF-8 text, without the mark that some editors put before it.

    Raises:
        UserError: the file cannot be read or is no UTF-8.
    """
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        if not data.isascii():
            for match in _NON_ASCII.finditer(data):
                match[0].decode()
        return data
    except UnicodeDecodeError as error:
        reason = error.reason
        raise UserError(f"{path} is not UTF-8 text: {reason}; JSON must be, so convert or fetch it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from None


def _walk_object(text: str, handlers: dict[str, Callable[[Any], None]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    pos = _expect(text, 0, "{")
    while not text.startswith("}", pos):
        if values:
            pos = _expect(text, pos, ",")
        name, pos = _decode(text, pos)
        if not isinstance(name, str):
            raise json.JSONDecodeError("expected a name in double quotes", text, pos)
        pos = _expect(text, _skip_space(text, pos), ":")
        if name in handlers:
            values[name] = None
            pos = _walk_list(text, pos, handlers[name])
        else:
            values[name], pos = _decode(text, pos)
        pos = _skip_space(text, pos)
    if _skip_space(text, pos + 1) != len(text):
        raise json.JSONDecodeError("unexpected text after the end", text, pos + 1)
    return values


def _walk_list(text: str, pos: int, handle: Callable[[Any], None]) -> int:
    pos = _expect(text, pos, "[")
    if text.startswith("]", pos):
        return pos + 1
    while True:
        element, pos = _decode(text, pos)
        handle(element)
        pos = _skip_space(text, pos)
        if text.startswith("]", pos):
            return pos + 1
        pos = _expect(text, pos, ",")


def _decode(text: str, pos: int) -> tuple[Any, int]:
    """Return the value at a position and the position of what follows it."""
    try:
        return _DECODER.raw_decode(text, pos)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("lists or objects lie too deep inside one another", text, pos) from None
    except ValueError:
        raise json.JSONDecodeError("a number has more digits than Python converts", text, pos) from None


def _skip_space(text: str, pos: int) -> int:
    return _SPACE.match(text, pos).end()  # type: ignore[union-attr]  # matches everywhere


def _expect(text: str, pos: int, character: str) -> int:
    """Return the position of what follows ``character``, which must come next after optional white space."""
    pos = _skip_space(text, pos)
    if not text.startswith(character, pos):
        raise json.JSONDecodeError(f"expected {character!r}", text, pos)
    return _skip_space(text, pos + 1)
