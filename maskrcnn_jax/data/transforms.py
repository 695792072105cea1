"""Transforms of one image and its annotations on the host: resizing, flipping, colour jitter, packing of masks.

Sizes and boxes follow torchvision's GeneralizedRCNNTransform, which resizes by (new size / old size) per axis, unless
images are to be resized as detectron2 does it.
"""

from collections.abc import Iterable

import cv2
import numpy as np
from PIL import Image

from maskrcnn_jax.data.run_lengths import Crop

# Ways to resize an image -> dtype of the result. uint8: OpenCV, rounded to whole grey levels, the fast one; float32:
# the same unrounded, which is torchvision's to a hundredth of a grey level; pillow: smoothed when it shrinks, with
# sizes rounded to the nearest pixel, which is detectron2's to the bit.
RESIZE = {"uint8": np.uint8, "float32": np.float32, "pillow": np.uint8}

_STRIP_PIXELS = 1 << 16
_LUMA = np.array([0.2989, 0.587, 0.114], np.float32)  # of red, green, blue; torchvision's digits


def resized_sizes(sizes: np.ndarray, short_side: int, long_side: int, resize: str = "uint8") -> np.ndarray:
    """Compute the sizes of images after resizing, as torchvision does, or with "pillow" as detectron2 does.

    The shorter side becomes ``short_side`` unless the longer one would exceed ``long_side``. Products are floored in
    double precision, so that a side may end one pixel short: 427x640 at 800/1333 gives 800x1199.

    Args:
        sizes: [N, 2] int (height, width).
        short_side: wanted length of the shorter side, pixels.
        long_side: upper limit of the longer side, pixels.
        resize: one of RESIZE.

    Returns:
        [N, 2] int32.
    """
    sizes = np.asarray(sizes, np.float64)
    scale = np.minimum(short_side / sizes.min(axis=1), long_side / sizes.max(axis=1))
    rounding = 0.5 if resize == "pillow" else 0
    return np.maximum(np.floor(sizes * scale[:, None] + rounding), 1).astype(np.int32)


def resized_size(height: int, width: int, short_side: int, long_side: int, resize: str = "uint8") -> tuple[int, int]:
    """Compute the size of one image after resizing; see ``resized_sizes``."""
    new_height, new_width = resized_sizes(np.array([[height, width]]), short_side, long_side, resize)[0]
    return int(new_height), int(new_width)


def resize_image(image: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """Resize an image bilinearly.

    Args:
        image: [h, w, I] uint8.
        size: (height, width) wanted.
        resize: one of RESIZE.

    Returns:
        [height, width, I] of the dtype that RESIZE says, 0..255.
    """
    height, width = size
    if resize == "pillow":
        # Not all at once: a fourth channel would count as opacity, by which Pillow weighs the others.
        parts = [image[..., :3], *np.moveaxis(image[..., 3:], -1, 0)]
        parts = [Image.fromarray(part).resize((width, height), Image.Resampling.BILINEAR) for part in parts]
        return np.dstack(parts)
    return cv2.resize(image.astype(RESIZE[resize], copy=False), (width, height), interpolation=cv2.INTER_LINEAR)


def scale_boxes(boxes: np.ndarray, old_size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """Scale boxes [n, 4] float32 by the ratio of (height, width) sizes; in float32, as torchvision does."""
    y, x = np.asarray(new_size, np.float32) / np.asarray(old_size, np.float32)
    return boxes * np.array([x, y, x, y], np.float32)


def hflip_image(image: np.ndarray) -> np.ndarray:
    """Mirror an image [h, w, I] left to right."""
    return np.ascontiguousarray(image[:, ::-1])


def hflip_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Mirror boxes [n, 4] in an image ``width`` pixels wide."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def color_jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation of the first three channels, in random order.

    Each factor is drawn from [1 - strength, 1 + strength]. Values are limited to 0..255 and lose their fraction
    after every change, as with torchvision's ColorJitter on an image of bytes.

    Args:
        image: [h, w, I] uint8, RGB first.
        strength: 0..1.
        rng: consumed: one permutation, three factors.

    Returns:
        [h, w, I] uint8.
    """
    colors, others = image[..., :3], image[..., 3:]
    pixels = colors.reshape(-1, 3)
    order = rng.permutation(3)
    factors = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    for change in order:
        factor = factors[change]
        if change == 0:  # brightness: towards black
            pixels = _blend(pixels, factor, np.float32(0))
        elif change == 1:  # contrast: towards the mean of the grey image
            total = sum(_grey(strip).sum(dtype=np.float64) for strip in _strips(pixels))
            pixels = _blend(pixels, factor, np.float32(total / max(len(pixels), 1)))
        else:  # saturation: towards the grey image
            pixels = np.concatenate([_saturate(strip, factor) for strip in _strips(pixels)])
    return np.concatenate([pixels.reshape(colors.shape), others], axis=2)


def _strips(pixels: np.ndarray) -> Iterable[np.ndarray]:
    """Cut pixels [n, 3] into parts that stay in the caches, which makes photographs several times as fast."""
    return np.split(pixels, range(_STRIP_PIXELS, len(pixels), _STRIP_PIXELS))


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Return the grey values [n] float32 of pixels [n, 3]."""
    return np.floor(pixels.astype(np.float32) @ _LUMA)


def _blend(pixels: np.ndarray, factor: np.float32, other: np.float32) -> np.ndarray:
    """Move all pixels [n, 3] uint8 towards one value, or away from it."""
    values = np.arange(256, dtype=np.float32)
    return cv2.LUT(pixels, np.clip(factor * values + (1 - factor) * other, 0, 255).astype(np.uint8))


def _saturate(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    """Move pixels [n, 3] uint8 towards their own grey values, or away from them."""
    blended = factor * pixels.astype(np.float32) + ((1 - factor) * _grey(pixels))[:, None]
    return np.clip(blended, 0, 255, out=blended).astype(np.uint8)


def pack_masks(
    crops: Iterable[Crop | None], image_size: tuple[int, int], size: tuple[int, int], side: int, *, flip: bool = False
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Put each mask on a square canvas of its own, eight pixels a byte.

    Masks of images that are enlarged stay as they are; others are reduced as ``shrink_mask`` does. Those that are then
    still longer than the canvas along an axis are sampled in the middles of its cells.

    Args:
        crops: n masks at the resolution of the image; None for no mask. Only one at a time is in memory if they are
            an iterator.
        image_size: (height, width) of the image.
        size: (height, width) of the resized image.
        side: of the canvas in pixels, a multiple of 8.
        flip: mirror the masks left to right.

    Returns:
        The canvases [n, side, side / 8] uint8, lowest bit first, filled from the top left; their windows [n, 4] int32
        y, x, height, width on the raster; and the (height, width) of the raster, which covers the whole image.
    """
    raster = min(image_size[0], size[0]), min(image_size[1], size[1])
    packed, windows = [], []
    for crop in crops:
        packed.append(canvas := np.zeros((side, side // 8), np.uint8))
        windows.append(window := np.zeros(4, np.int32))
        if crop is None:
            continue
        if flip:
            crop = Crop(crop.mask[:, ::-1], crop.y, image_size[1] - crop.x - crop.mask.shape[1])
        mask, y, x = crop if raster == image_size else shrink_mask(crop, image_size, raster)
        window[:] = y, x, *mask.shape
        if max(mask.shape) > side:
            rows, columns = (_sources(length, min(length, side), centred=True) for length in mask.shape)
            mask = mask[rows[:, None], columns]
        bits = np.packbits(mask, axis=1, bitorder="little")
        canvas[: bits.shape[0], : bits.shape[1]] = bits
    return np.array(packed, np.uint8).reshape(-1, side, side // 8), np.array(windows, np.int32).reshape(-1, 4), raster


def shrink_mask(crop: Crop, image_size: tuple[int, int], size: tuple[int, int]) -> Crop:
    """Reduce a mask with its image, by torchvision's rule of nearest interpolation: source = floor(i * old / new)."""
    shown, corner = [], []
    for old, new, start, length in zip(image_size, size, crop[1:], crop.mask.shape, strict=True):
        lines = _sources(old, new)
        first, stop = np.searchsorted(lines, (start, start + length)).tolist()
        shown.append(lines[first:stop] - start)
        corner.append(first)
    return Crop(crop.mask[shown[0][:, None], shown[1]], *corner)


def _sources(old: int, new: int, *, centred: bool = False) -> np.ndarray:
    """Return which of ``old`` lines each of ``new`` lines shows, [new] int64; in float32, as torch computes it."""
    ratio = np.float32(old) / np.float32(max(new, 1))
    lines = np.arange(new, dtype=np.float32) + np.float32(0.5 if centred else 0)
    return np.minimum((lines * ratio).astype(np.int64), old - 1)
