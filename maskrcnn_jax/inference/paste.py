"""Put a detection's 28 x 28 mask into its image and write it as COCO's run-length encoding.

Two rules exist. torchvision's ``paste_masks_in_image`` pads the mask by one pixel, widens the box by the same factor,
cuts its corners down to integers and resizes the mask bilinearly to that box, which makes small masks about a pixel
too large. detectron2's, ``aligned``, looks up the mask at the centre of every pixel. Both keep what is at least 0.5.
Unlike in either, nothing here touches the pixels outside the box: a 640 x 480 image with a hundred detections would
otherwise be cleared and scanned a hundred times.
"""

import cv2
import numpy as np
from pycocotools import mask as coco_mask

MASK_THRESHOLD = 0.5  # "binarized at a threshold of 0.5" (Sec. 3.1, Mask R-CNN)


def paste_mask(
    mask: np.ndarray, box: np.ndarray, image_size: tuple[int, int], *, aligned: bool = False
) -> tuple[np.ndarray, int, int]:
    """Resize one mask to its box and cut it off at the borders of the image.

    Args:
        mask: [M, M] float32 probabilities inside the box.
        box: [4] float32 ``x1, y1, x2, y2`` in pixels of the image, and not far outside of it: the whole box is
            resized before it is cut.
        image_size: (height, width) of the image.
        aligned: detectron2's rule instead of torchvision's; right for models trained with ``roi_aligned``.

    Returns:
        crop: [h, w] uint8, 0 or 1, the visible part of the (widened) box, in Fortran order, because run lengths go
            down the columns. It is empty where the box lies outside the image.
        y0: row of the image at which the crop starts.
        x0: column of the image at which the crop starts.

    Source: ``paste_masks_in_image``, torchvision 0.28 and detectron2.
    """
    if aligned:
        return _paste_aligned(mask, box, image_size)
    side = mask.shape[0]
    padded = np.zeros((side + 2, side + 2), np.float32)
    padded[1:-1, 1:-1] = mask.T  # transposed, so that the columns of the crop lie contiguous
    x1, y1, x2, y2 = _widen(box, (side + 2) / side)
    height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    probabilities = cv2.resize(padded, (height, width), interpolation=cv2.INTER_LINEAR)  # [width, height]
    y0, x0 = max(y1, 0), max(x1, 0)
    y_end, x_end = max(min(y2 + 1, image_size[0]), y0), max(min(x2 + 1, image_size[1]), x0)
    visible = probabilities[x0 - x1 : x_end - x1, y0 - y1 : y_end - y1]
    return (visible >= MASK_THRESHOLD).view(np.uint8).T, y0, x0


def _paste_aligned(mask, box, image_size):
    """Interpolate the mask, zero outside, at the centres of the pixels that the box touches."""
    starts, weights = [], []
    for low, high, limit in zip(box[[1, 0]], box[[3, 2]], image_size, strict=True):
        # Half a mask cell beyond the box the mask fades to zero, but it is below the threshold from the edge on.
        first = int(np.clip(np.floor(low), 0, limit))
        last = int(np.clip(np.ceil(high), first, limit))
        side = mask.shape[0]
        cells = (np.arange(first, last, dtype=np.float32) + 0.5 - low) / max(high - low, 1e-6) * side - 0.5
        distance = np.abs(cells[:, None] - np.arange(side, dtype=np.float32))
        starts.append(first)
        weights.append(np.maximum(1 - distance, 0))
    probabilities = weights[0] @ mask @ weights[1].T
    return np.asfortranarray(probabilities >= MASK_THRESHOLD).view(np.uint8), *starts


def encode_rle(crop: np.ndarray, y0: int, x0: int, image_size: tuple[int, int]) -> dict:
    """Encode a mask that is zero outside a crop, without building the whole image.

    Args:
        crop: [h, w] uint8 or bool, inside the image.
        y0: row of the image at which the crop starts.
        x0: column of the image at which the crop starts.
        image_size: (height, width) of the image.

    Returns:
        ``{"size": [height, width], "counts": str}``, equal to ``pycocotools.mask.encode`` of the whole image.
    """
    height, width = int(image_size[0]), int(image_size[1])
    stride = crop.shape[0] + 2
    columns = np.zeros((crop.shape[1], stride), np.uint8)  # one zero above and below every column of the crop
    columns[:, 1:-1] = crop.T
    flat = columns.reshape(-1)
    # Every column starts and ends outside the mask, so that these alternate: start, end, start, end, ...
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), stride)
    edges = (column + x0) * height + row + y0
    # A run down to the last row may go on in the first row of the next column: there, end = start and neither is one.
    apart = edges[1:-1:2] != edges[2::2]
    if not apart.all():
        keep = np.ones(len(edges), bool)
        keep[1:-1:2] = keep[2::2] = apart
        edges = edges[keep]
    counts = np.diff(edges, prepend=0, append=height * width)  # zeros, ones, zeros, ...
    if len(edges) and counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _widen(box: np.ndarray, scale: float) -> tuple[int, int, int, int]:
    """Scale a box about its centre and cut its corners to integers, in float32 and in torchvision's order."""
    x1, y1, x2, y2 = np.asarray(box, np.float32)
    half, factor = np.float32(0.5), np.float32(scale)
    half_width, half_height = (x2 - x1) * half * factor, (y2 - y1) * half * factor
    x_centre, y_centre = (x2 + x1) * half, (y2 + y1) * half
    # int() cuts towards zero, also for negative corners.
    return (
        int(x_centre - half_width),
        int(y_centre - half_height),
        int(x_centre + half_width),
        int(y_centre + half_height),
    )
