"""Images in whatever form the user has them, as the arrays that a model takes."""

import io
import os
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageOps

from maskrcnn_jax.data.images import BrokenImageError, UndecodableError, decode_image, too_few_channels
from maskrcnn_jax.data.plan import padded_size
from maskrcnn_jax.data.transforms import RESIZE, resize_image, resized_size
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions
from maskrcnn_jax.paths import as_path, read_bytes
from maskrcnn_jax.structures import Batch

# A path or URL, the content of an image file, a Pillow image, or an array of NumPy, JAX or torch.
Image = Any

_URL_SCHEMES = ("http://", "https://")
_URL_TIMEOUT = 30  # seconds
_URL_MAX_BYTES = 1 << 28


def is_image(value: object) -> bool:
    """Return whether a value is one image, and not an iterable of images."""
    return isinstance(value, str | os.PathLike | bytes | PillowImage.Image) or hasattr(value, "__array__")


def to_array(image: Image, channels: int = 3) -> np.ndarray:
    """Return an image as an array.

    Args:
        image: The path or URL of an image file, its content as bytes, a Pillow image, a NumPy or JAX array
            [h, w, channels] uint8, or a torch tensor [channels, h, w], uint8 or floating point in 0..1. Colours are
            RGB (OpenCV reads BGR). Files and Pillow images are turned upright as their EXIF entry says.
        channels: Of the result, RGB first.

    Returns:
        [h, w, channels] uint8.

    Raises:
        UserError: if it cannot be read, or has another shape, dtype or fewer channels.
    """
    if isinstance(image, str | os.PathLike):
        source = os.fspath(image)
        is_url = source.startswith(_URL_SCHEMES)
        return _decode(_download(source), channels, source) if is_url else read_image(source, channels)
    if isinstance(image, bytes):
        return _decode(image, channels, f"{len(image)} bytes")
    if isinstance(image, PillowImage.Image):
        array = _from_pillow(image, channels)
    elif hasattr(image, "detach"):
        array = _from_torch(image)
    else:
        array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise UserError(
            f"an array of {array.dtype} {array.shape} is not an image for this model; give uint8 "
            f"(height, width, {channels}) in RGB, 0..255"
        )
    return array


def to_batch(image: np.ndarray, data: DataOptions, buckets: list[tuple[int, int]]) -> Batch:
    """Resize an image [h, w, I] uint8 as in training and pad it to one of a few sizes; a batch of one."""
    height, width, channels = image.shape
    size = resized_size(height, width, data.short_side, data.long_side, data.resize)
    images = np.zeros((1, *padded_size(*size, buckets), channels), RESIZE[data.resize])
    images[0, : size[0], : size[1]] = resize_image(image, size, data.resize)
    return Batch(
        images=images,
        sizes=np.array([size], np.int32),
        original_sizes=np.array([(height, width)], np.int32),
        image_index=np.zeros(1, np.int32),
        valid=np.ones(1, bool),
        gt=None,
    )


def read_image(path: str | os.PathLike, channels: int = 3) -> np.ndarray:
    """Read a file as uint8 [h, w, channels], RGB, upright as its EXIF entry says.

    Raises:
        BrokenImageError: if it cannot be read as an image.
        UserError: if it has fewer channels.
    """
    path = as_path(path)
    try:
        data = read_bytes(path)
    except OSError as error:
        raise BrokenImageError(f"{path} cannot be read as an image ({error.strerror}); check the path") from None
    except ValueError:  # a null or half of a surrogate pair
        raise BrokenImageError(f"{str(path)!r} cannot be read as an image; no file can have this name") from None
    return _decode(data, channels, str(path))


def _download(url: str) -> bytes:
    content = io.BytesIO()
    try:
        with urllib.request.urlopen(url, timeout=_URL_TIMEOUT) as response:
            content.write(response.read(_URL_MAX_BYTES + 1))
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise UserError(f"{url} cannot be downloaded ({getattr(error, 'reason', error)}); check the address") from None
    if content.tell() > _URL_MAX_BYTES:
        raise UserError(f"{url} has more than {_URL_MAX_BYTES >> 20} MB; download it, and give the path of the file")
    return content.getvalue()


def _decode(data: bytes, channels: int, name: str) -> np.ndarray:
    try:
        image = decode_image(data, channels, upright=True)
    except UndecodableError as error:
        raise BrokenImageError(f"{name} cannot be read as an image: it {error}") from None
    if image.shape[2] < channels:
        raise UserError(f"image {name} {too_few_channels(image, channels)}; give files like those of the training")
    return image


def _from_pillow(image: PillowImage.Image, channels: int) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # the upper 8 bits, as of files; Pillow would make all above 255 white
        grey = (np.asarray(upright) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.mode in ("I", "F"):
        raise UserError(f"a Pillow image of mode {upright.mode} has no defined white value; convert it to L or RGB")
    if channels > 3 and upright.mode == "CMYK":
        raise UserError("a Pillow image of mode CMYK has no channel beside the colours; give RGBA or an array")
    return np.asarray(upright.convert("RGB") if channels == 3 else upright)


def _from_torch(tensor: Any) -> np.ndarray:
    """Return a torch tensor [channels, h, w] as torchvision has images, uint8 or floating point in 0..1."""
    array = tensor.detach().cpu().numpy()
    if np.issubdtype(array.dtype, np.floating):
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise UserError("a torch image of floating point must lie in 0..1; give uint8 for 0..255")
        array = np.rint(array * 255).astype(np.uint8)
    return np.moveaxis(array, 0, -1) if array.ndim == 3 else array
