"""Reads image files as RGB bytes and refuses broken ones."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import read_bytes

_TIMES_LARGER = 4  # pixels than annotated: no reason to decode an image only to say so
# Of an image, in pixels; a larger one needs a file of a size to match, at some 100 times what photographs take.
_PIXELS_OF_ANY_FILE = 1 << 25
_PIXELS_OF_A_BYTE = 100
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class BrokenImageError(UserError):
    """An image file that is missing, truncated, not an image, or of another size than the annotations say."""


def read_image_file(path: Path, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Read an image as [h, w, channels] uint8, as ``decode_image`` does.

    Args:
        path: of the file.
        size: (height, width) that it must have.
        channels: wanted.

    Raises:
        BrokenImageError: the file is missing, truncated, not an image, of another size, or has fewer channels.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from None
    except ValueError:  # a null or half of a surrogate pair
        raise _broken(path, "has a name that no file can have") from None
    return check_and_decode(path, data, size, channels)


def check_and_decode(path: Path, data: bytes, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Decode the content of a file as ``read_image_file`` does; ``path`` only names it in errors."""
    if _is_truncated(data):
        raise _broken(path, "is truncated")
    _refuse_bomb(path, data, size)
    image = decode_image(data, channels)
    if image is None:
        raise _broken(path, "is not an image that can be decoded" if data else "is empty")
    if image.shape[:2] != size:
        raise _wrong_size(path, image.shape[:2], size)
    if image.shape[2] < channels:
        raise _broken(path, too_few_channels(image, channels))
    return image


def decode_image(data: bytes, channels: int = 3, *, upright: bool = False) -> np.ndarray | None:
    """Decode the bytes of an image file.

    Args:
        data: of the file.
        channels: wanted. 3 gives RGB whatever the file has. More are read as they are stored, RGB first, such as a PNG
            whose alpha channel holds depth; of 16 bits the upper 8 are kept, as OpenCV does with colours.
        upright: turn an image of 3 channels as its EXIF entry says.

    Returns:
        [h, w, channels] uint8, with fewer channels where the file has fewer; None if it is no image, or one that is
        far too large for its file.
    """
    if _is_bomb(data):
        return None
    if channels > 3:
        flags = cv2.IMREAD_UNCHANGED
    else:
        flags = cv2.IMREAD_COLOR | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        return None
    if image.dtype == np.uint16:
        image = np.right_shift(image, 8).astype(np.uint8)
    image = np.atleast_3d(image)[..., :channels]
    if image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return np.concatenate([image[..., 2::-1], image[..., 3:]], axis=2)


def too_few_channels(image: np.ndarray, channels: int) -> str:
    """Describe an image with fewer channels than the model takes."""
    return f"has {image.shape[2]} channels where model.in_channels is {channels}"


def _broken(path: Path, what: str) -> BrokenImageError:
    return BrokenImageError(Kind.BROKEN.tell(path=path, problem=what))


def _is_truncated(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end; OpenCV decodes such files without an error, filling with grey or black."""
    if data.startswith(b"\xff\xd8"):
        # The marker of the end cannot occur inside compressed data, which stuffs a zero after each 0xff. A thumbnail
        # in the header has an end of its own, so the end must come after the last start of compressed data.
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return data.startswith(b"\x89PNG") and b"IEND" not in data


def _wrong_size(path: Path, found: tuple[int, int], wanted: tuple[int, int]) -> BrokenImageError:
    """Make the error for an image of another (height, width) than the annotations say."""
    what = f"has {found[0]}x{found[1]} pixels (height x width) where the annotations say {wanted[0]}x{wanted[1]}"
    if found == wanted[::-1]:
        what += "; the annotations seem to follow its EXIF orientation, which is ignored"
    return _broken(path, what)


def _refuse_bomb(path: Path, data: bytes, size: tuple[int, int]) -> None:
    """Raise for a file that would decode to many times the annotated pixels, such as a few kB of black."""
    found = _pixels_in_header(data) or 0
    if found > _TIMES_LARGER * size[0] * size[1]:
        raise _broken(path, f"has {found:,} pixels where the annotations say {size[0]}x{size[1]} (height x width)")


def _is_bomb(data: bytes) -> bool:
    """Whether OpenCV might fill the memory with what a header claims; it decodes even where the header is damaged."""
    found = _pixels_in_header(data)
    if found is None:
        return not data.startswith(_TIFF)  # whose many channels Pillow does not know
    if data.startswith(b"\x89PNG") and not _chunks_fit(data):
        return True
    return found > max(_PIXELS_OF_ANY_FILE, _PIXELS_OF_A_BYTE * len(data))


def _chunks_fit(data: bytes) -> bool:
    """Whether the parts of a PNG lie within the file; libpng takes the memory for one before it reads it."""
    start = 8
    while start + 12 <= len(data) and not data.startswith(b"IEND", start + 4):
        start += 12 + int.from_bytes(data[start : start + 4], "big")  # length, name and checksum
    return start + 12 <= len(data)


def _pixels_in_header(data: bytes) -> int | None:
    """Return the number of pixels in the header of an image, or None if Pillow does not know the format."""
    try:
        with Image.open(io.BytesIO(data)) as opened:  # reads the header only
            return opened.height * opened.width
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        return int(re.findall(r"\d+", str(error))[0])  # "Image size (1000000000 pixels) exceeds ..."
    except Exception:  # Pillow raises all sorts of things at broken files
        return None
