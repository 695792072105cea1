"""What the header of an image file says, and whether the file is complete, without decoding it.

Pillow refuses headers of files that OpenCV decodes, such as PNGs with more than a megabyte of text. The formats of
cameras, scanners and microscopes are therefore read here, and Pillow reads only the others.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator

from PIL import Image

from maskrcnn_jax.data.orientation import ORIENTATIONS

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_LONGEST_CHUNK = 8_000_000  # bytes of what is no pixels in a PNG, with which OpenCV still reads it
# A marker of JPEG that begins or ends something: a stuffed zero, a restart, a fill byte and TEM do not.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_APP1 = 0xE1  # of EXIF, among others
_FIRST_DEFINED = 0xC0  # markers below are reserved: what follows is damaged, or no longer the JPEG
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # baseline, progressive, ...; the three are tables
_TIFF = {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}  # classic, and BigTIFF
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # type of a tag -> its code in struct
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_EXIF_ORIENTATION = 274  # and of a TIFF


def image_size(data: bytes) -> tuple[int, int] | None:
    """Return the (height, width) in the header of an image file; None if there is none, or a damaged one."""
    try:
        if data.startswith(_JPEG):
            return _jpeg_size(data)
        if data.startswith(_PNG):
            return struct.unpack_from(">II", data, 16)[::-1] if data[12:16] == b"IHDR" else None
        if data[:4] in _TIFF:
            return _tiff_size(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp_size(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return struct.unpack_from("<HH", data, 6)[::-1]
        if data.startswith(b"BM"):
            core = data[14:18] == b"\x0c\0\0\0"  # the header of OS/2
            width, height = struct.unpack_from("<HH" if core else "<ii", data, 18)
            return abs(height), abs(width)  # rows of a negative height come from above
    except (struct.error, OverflowError):  # the file ends before
        return None
    return _size_by_pillow(data)


def is_complete(data: bytes) -> bool:
    """Return whether a JPEG or PNG has its end; OpenCV fills what is missing with grey or black, without an error.

    What follows the end does not matter: phones append videos, and cameras previews.
    """
    if data.startswith(_JPEG):
        return [code for code, _ in _jpeg_segments(data)][-1:] == [_END]
    return not data.startswith(_PNG) or _png_ends(data)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker and the start of each segment of a JPEG, up to the end of its image.

    Segments are skipped by their length, so that a thumbnail in one of them is not taken for the image. Compressed
    data follow a segment without a length; the next marker is found because none occurs inside them.
    """
    place = len(_JPEG)
    while marker := _MARKER.search(data, place):
        code, place = marker[0][1], marker.end()
        yield code, place
        if code in (_START, _END) or code < _FIRST_DEFINED:
            return
        length = int.from_bytes(data[place : place + 2], "big")
        if code == _SCAN and b"\xff" in data[place : place + length]:
            return  # the small numbers before compressed data are cut off, and another file follows
        place += length


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    for code, place in _jpeg_segments(data):
        if code in _FRAMES:
            return struct.unpack_from(">HH", data, place + 3)  # after the length and the bits of a sample
    return None


def _png_ends(data: bytes) -> bool:
    """Return whether the chunks of a PNG lie within the file; libpng allocates one before it reads it."""
    return any(name == b"IEND" for name, _ in _png_chunks(data))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, slice]]:
    """Yield the name and the place of each chunk of a PNG, up to its end; the last may pass the end of the file."""
    place = len(_PNG)
    while place + 12 <= len(data):
        start = place
        place += 12 + int.from_bytes(data[place : place + 4], "big")  # length, name and checksum
        name = data[start + 4 : start + 8]
        yield name, slice(start, place)
        if name == b"IEND":
            return


def without_long_chunks(data: bytes) -> bytes:
    """Return an image file without what makes OpenCV refuse a PNG: long texts, profiles and other notes."""
    if not data.startswith(_PNG) or len(data) <= _LONGEST_CHUNK:
        return data
    places = [place for name, place in _png_chunks(data) if not _is_long_note(name, place)]
    return b"".join([_PNG, *(data[place] for place in places)])


def _is_long_note(name: bytes, place: slice) -> bool:
    """Return whether a chunk is long and not needed for the pixels, as the case of its first letter tells."""
    return name[:1].islower() and place.stop - place.start > _LONGEST_CHUNK


def _tiff_numbers(data: bytes) -> dict[int, tuple[str, int]]:
    """Return the tags of a TIFF's first page that are one number: its format for struct, and its place."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = b"+" in data[2:4]
    (start,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    (number,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, start)
    first, length, value = (start + 8, 20, 12) if is_big else (start + 2, 12, 8)
    numbers = {}
    for place in range(first, first + min(number, 0xFFFF) * length, length):
        tag, kind = struct.unpack_from(order + "HH", data, place)
        if kind in _TIFF_NUMBERS:
            numbers[tag] = (order + _TIFF_NUMBERS[kind], place + value)
    return numbers


def _tiff_size(data: bytes) -> tuple[int, int] | None:
    numbers = _tiff_numbers(data)
    if _TIFF_WIDTH not in numbers or _TIFF_HEIGHT not in numbers:
        return None
    (height,), (width,) = (
        struct.unpack_from(form, data, place) for form, place in (numbers[_TIFF_HEIGHT], numbers[_TIFF_WIDTH])
    )
    return height, width


def as_stored(data: bytes) -> bytes:
    """Return an image file without the orientation of a TIFF, which OpenCV follows even when told to ignore it."""
    if data[:4] not in _TIFF:
        return data
    form, place = _tiff_numbers(data).get(_EXIF_ORIENTATION, ("", 0))
    if not form or struct.unpack_from(form, data, place) == (1,):
        return data
    changed = bytearray(data)
    struct.pack_into(form, changed, place, 1)
    return bytes(changed)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if data[12:16] == b"VP8X":  # extended: one less than the sides, in 24 bits
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if data[12:16] == b"VP8L":  # lossless: likewise, in 14 bits
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return (height & 0x3FFF, width & 0x3FFF) if data[12:16] == b"VP8 " else None


def _size_by_pillow(data: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(data)) as opened:  # reads the header only
            return opened.height, opened.width
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        return int(re.findall(r"\d+", str(error))[0]), 1  # "Image size (1000000000 pixels) exceeds ..."
    except Exception:  # Pillow raises all sorts of things at broken files
        return None


def orientation(data: bytes) -> int:
    """Return the orientation in EXIF, or in the header of a TIFF or AVIF; 1 if there is none from 1 to 8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if data[:4] in _TIFF:
                form, place = _tiff_numbers(data)[_EXIF_ORIENTATION]
                (found,) = struct.unpack_from(form, data, place)
            else:
                exif = Image.Exif()
                exif.load(_exif_block(data))
                found = exif.get(_EXIF_ORIENTATION)
        except Exception:  # Pillow raises all sorts of things at broken files
            return 1
    return found if isinstance(found, int) and found in ORIENTATIONS else 1


def _exif_block(data: bytes) -> bytes:
    """Return the first block of EXIF in an image file; empty if there is none."""
    if data.startswith(_JPEG):
        for code, place in _jpeg_segments(data):
            end = place + int.from_bytes(data[place : place + 2], "big")
            if code == _APP1 and data[place + 2 : end].startswith(b"Exif\0\0"):
                return data[place + 2 : end]
            if code == _SCAN:
                break
        return b""
    if data.startswith(_PNG):  # Pillow would decode it, because EXIF may lie at its end
        return next((data[place][8:-4] for name, place in _png_chunks(data) if name == b"eXIf"), b"")
    with Image.open(io.BytesIO(data)) as opened:
        return opened.info.get("exif", b"")
