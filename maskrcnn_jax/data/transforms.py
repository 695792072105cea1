"""Transforms of one image and its annotations on the host: resizing, flipping, colour jitter, packing of masks.

Sizes and boxes follow torchvision's GeneralizedRCNNTransform, which resizes by (new size / old size) per axis, unless
images are to be resized as detectron2 does it.
"""

import cv2
import numpy as np
from PIL import Image

# Ways to resize an image -> dtype of the result. uint8: OpenCV, rounded to whole grey levels, the fast one; float32:
# the same unrounded, which is torchvision's to a hundredth of a grey level; pillow: smoothed when it shrinks, with
# sizes rounded to the nearest pixel, which is detectron2's to the bit.
RESIZE = {"uint8": np.uint8, "float32": np.float32, "pillow": np.uint8}

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


def hflip_masks(masks: np.ndarray) -> np.ndarray:
    """Mirror masks [n, h, w]."""
    return masks[:, :, ::-1]


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
    image, others = image[..., :3], image[..., 3:]
    order = rng.permutation(3)
    factors = rng.uniform(1 - strength, 1 + strength, 3)
    for change in order:
        factor = np.float32(factors[change])
        pixels = image.astype(np.float32)
        if change == 0:  # brightness: towards black
            other = np.float32(0)
        elif change == 1:  # contrast: towards the mean of the grey image
            other = np.floor(pixels @ _LUMA).mean()
        else:  # saturation: towards the grey image
            other = np.floor(pixels @ _LUMA)[:, :, None]
        image = np.clip(factor * pixels + (1 - factor) * other, 0, 255).astype(np.uint8)
    return np.concatenate([image, others], axis=2)


def pack_masks(masks: np.ndarray, mask_side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Put masks into the top-left corner of a square canvas, eight pixels a byte.

    Rasters that are larger than the canvas are reduced: pixel i of the reduced axis is pixel floor(i * old / new) of
    the old one, the rule of nearest interpolation in torchvision.

    Args:
        masks: [n, h, w] uint8 or bool, nonzero inside the object.
        mask_side: side of the canvas in pixels, a multiple of 8.

    Returns:
        The canvases [n, mask_side, mask_side / 8] uint8, lowest bit first, and the (height, width) of the raster on
        them.
    """
    num, height, width = masks.shape
    longest = max(height, width, mask_side)  # integers, so that nothing is lost to rounding
    new_height, new_width = max(1, height * mask_side // longest), max(1, width * mask_side // longest)
    if longest > mask_side:
        rows = np.arange(new_height) * height // new_height
        columns = np.arange(new_width) * width // new_width
        masks = masks[:, rows[:, None], columns]
    packed = np.zeros((num, mask_side, mask_side // 8), np.uint8)
    bits = np.packbits(masks, axis=2, bitorder="little")
    packed[:, :new_height, : bits.shape[2]] = bits
    return packed, (new_height, new_width)
