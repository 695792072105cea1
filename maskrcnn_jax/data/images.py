"""Reads image files as RGB bytes and refuses broken ones."""

import math
from pathlib import Path

import cv2
import numpy as np

from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.data.image_headers import (
    as_stored,
    image_size,
    is_complete,
    orientation,
    without_long_chunks,
)
from maskrcnn_jax.data.orientation import turn_upright, upright_size
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import read_bytes

# Of files in a folder that are taken for images.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)

_TIMES_LARGER = 4  # pixels than annotated: no reason to decode an image only to say so
# Of an image whose size no annotation states; a plan in A0 at 300 dpi has 140 million. A larger one needs a file of a
# size to match, at some 100 times the pixels that photographs have in a byte.
_PIXELS_OF_ANY_FILE = 150_000_000
_PIXELS_OF_A_BYTE = 100


class BrokenImageError(UserError):
    """An image file that is missing, truncated, not an image, or of another size than the annotations say."""


class UndecodableError(UserError):
    """Why bytes cannot be decoded as an image, as the rest of a sentence that begins with the name of the file."""


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
    found = image_size(data)
    if found and found[0] * found[1] > _TIMES_LARGER * size[0] * size[1]:
        raise _broken(path, _other_size(data, found, size))
    try:
        image = decode_image(data, channels, stated_size=size)
    except UndecodableError as error:
        raise _broken(path, str(error)) from None
    if image.shape[:2] != size:
        raise _broken(path, _other_size(data, image.shape[:2], size))
    if image.shape[2] < channels:
        raise _broken(path, too_few_channels(image, channels))
    return image


def decode_image(
    data: bytes, channels: int = 3, *, upright: bool = False, stated_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode the bytes of an image file; of several pages or frames, the first.

    Args:
        data: of the file.
        channels: wanted. 3 gives RGB whatever the file has. More are read as they are stored, RGB first, such as a PNG
            whose alpha channel holds depth; of 16 bits the upper 8 are kept, as OpenCV does with colours.
        upright: turn the image as its EXIF entry says.
        stated_size: (height, width) by the annotations. An image of this size is decoded however few bytes it has.

    Returns:
        [h, w, channels] uint8, with fewer channels where the file has fewer.

    Raises:
        UndecodableError: it is empty, truncated, no image, of an unknown format, or far too large for its file.
    """
    _refuse(data, stated_size)
    data = without_long_chunks(data)
    # OpenCV turns neither AVIFs nor images of more than three channels, so it is told to turn none.
    flags = cv2.IMREAD_UNCHANGED if channels > 3 else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = _decode(as_stored(data), flags)
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise UndecodableError(_unreadable_form(data))
    if image.dtype == np.uint16:
        image = np.right_shift(image, 8).astype(np.uint8)
    if upright:
        image = turn_upright(image, orientation(data))
    image = np.atleast_3d(image)[..., :channels]
    if image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return np.concatenate([image[..., 2::-1], image[..., 3:]], axis=2)


def too_few_channels(image: np.ndarray, channels: int) -> str:
    """Describe an image with fewer channels than the model takes."""
    return f"has {image.shape[2]} channels where model.in_channels is {channels}"


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _unreadable_form(data: bytes) -> str:
    """Describe what was not decoded, which may be an image of numbers that are no colours."""
    stored = _decode(data, cv2.IMREAD_UNCHANGED)
    if stored is None:
        return "is not an image that can be decoded"
    return f"has pixels of type {stored.dtype}; 8 or 16 bits in 1, 3 or 4 channels can be read, so convert it"


def _broken(path: Path, what: str) -> BrokenImageError:
    return BrokenImageError(Kind.BROKEN.tell(path=path, problem=what))


def _refuse(data: bytes, stated_size: tuple[int, int] | None) -> None:
    """Raise for what OpenCV would decode to a picture that is partly grey, or to gigabytes.

    Without a header that can be read, OpenCV might fill the memory with what it takes for a size.
    """
    size = image_size(data)
    if size is None:
        raise UndecodableError("is not an image that can be decoded" if data else "is empty")
    if not is_complete(data):
        raise UndecodableError("is truncated or damaged")
    limit = max(_PIXELS_OF_ANY_FILE, _PIXELS_OF_A_BYTE * len(data))
    # Pillow tells only the number of pixels of large images in the formats that it reads.
    if limit < size[0] * size[1] != math.prod(stated_size or ()):
        raise UndecodableError(
            f"has {size[0]}x{size[1]} pixels (height x width) in {len(data):,} bytes; unless annotations state this "
            f"size, a file of so few bytes may have {limit:,} pixels, so reduce it or cut it into parts"
        )


def _other_size(data: bytes, found: tuple[int, int], wanted: tuple[int, int]) -> str:
    """Describe an image of another (height, width) than the annotations say."""
    what = f"has {found[0]}x{found[1]} pixels (height x width) where the annotations say {wanted[0]}x{wanted[1]}"
    if found != wanted[::-1]:
        return what
    if upright_size(found, orientation(data)) == wanted:
        return f"{what}; the annotations seem to follow its EXIF orientation, which is ignored"
    return f"{what}; the annotations seem to have height and width exchanged"
