"""From a batch's detections to the detections of each image file, in its pixels, and to COCO results.

Without JAX, of which processes that only paste and encode masks have no use.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from maskrcnn_jax.inference.paste import encode_rle, paste_mask
from maskrcnn_jax.structures import Detections


class Instances(NamedTuple):
    """Detections of one image in the pixels of its file, best first, without padding (K rows, all of them valid)."""

    boxes: np.ndarray  # [K, 4] float32, clipped to the image
    scores: np.ndarray  # [K] float32
    labels: np.ndarray  # [K] int32, 1..C
    masks: np.ndarray  # [K, 28, 28] float32, probability inside the box


def unpad(detections: Detections, sizes: np.ndarray, original_sizes: np.ndarray) -> list[Instances]:
    """Drop invalid rows and scale the boxes from the network input to the image files.

    Args:
        detections: numpy arrays [B, D, ...], boxes in pixels of the padded network input.
        sizes: [B, 2] (height, width) of the resized images inside the padding.
        original_sizes: [B, 2] (height, width) of the image files.

    Returns:
        B ``Instances``. The masks are relative to their boxes, so that they stay as they are.
    """
    instances = []
    for i, valid in enumerate(np.asarray(detections.valid)):
        boxes = to_image_pixels(np.asarray(detections.boxes[i])[valid], sizes[i], original_sizes[i])
        rows = (np.asarray(rows[i])[valid] for rows in (detections.scores, detections.labels, detections.masks))
        instances.append(Instances(boxes, *rows))
    return instances


def to_image_pixels(boxes: np.ndarray, size: np.ndarray, original_size: np.ndarray) -> np.ndarray:
    """Scale boxes [..., 4] from the network input to the image file, and clip them to it; float32.

    Args:
        boxes: in pixels of the padded network input.
        size: [2] (height, width) of the resized image inside the padding.
        original_size: [2] (height, width) of the image file.

    Source: ``resize_boxes``, torchvision 0.28: one ratio per axis, in float32.
    """
    original = np.asarray(original_size, np.float32)[::-1]
    ratio = original / np.maximum(np.asarray(size, np.float32)[::-1], 1)
    return np.clip(np.asarray(boxes, np.float32) * np.tile(ratio, 2), 0, np.tile(original, 2))


def to_coco_results(
    instances: Instances,
    *,
    image_id: int,
    image_size: tuple[int, int],
    category_ids: Mapping[int, int],
    aligned_masks: bool = False,
) -> list[dict]:
    """Write one image's detections as COCO results.

    Nothing is rounded: Python writes the shortest decimal that reads back as the same number, so that metrics
    computed from the written file are the metrics computed from these results.

    Args:
        instances: detections in pixels of the image.
        image_id: COCO's id of the image.
        image_size: (height, width) of the image.
        category_ids: COCO's id of every label. Detections with another label are left out: torchvision's 91 classes
            contain numbers that stand for no category.
        aligned_masks: how masks are pasted, as in ``paste_mask``.

    Returns:
        A dict per detection: image_id, category_id, bbox [x, y, width, height], score, segmentation (RLE).
    """
    image_size = (int(image_size[0]), int(image_size[1]))
    results = []
    for box, score, label, mask in zip(*instances, strict=True):
        if int(label) not in category_ids:
            continue
        x1, y1, x2, y2 = box
        results.append(
            {
                "image_id": int(image_id),
                "category_id": int(category_ids[int(label)]),
                "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                "score": float(score),
                "segmentation": encode_rle(*paste_mask(mask, box, image_size, aligned=aligned_masks), image_size),
            }
        )
    return results
