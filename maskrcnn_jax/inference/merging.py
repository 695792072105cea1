"""Which detections of several passes over an image, of its tiles or views, are of the same object. Without JAX."""

import numpy as np


def distinct(
    boxes: np.ndarray,
    labels: np.ndarray,
    source: np.ndarray,
    order: np.ndarray,
    *,
    iou_threshold: float,
    class_agnostic: bool,
) -> np.ndarray:
    """Choose detections that do not overlap a better one of another pass.

    Those of one pass have been through the network's own suppression, which may have been a soft one, and are not
    compared again.

    Args:
        boxes: detections of all passes, [N, 4] in pixels of the image.
        labels: [N] int.
        source: the pass of each, [N] int; -1 if it comes from several, and is compared with all.
        order: rows to choose from, int, best first.
        iou_threshold: overlap above which the worse of two detections goes.
        class_agnostic: compare detections of different classes as well.

    Returns:
        The rows that stay, [K] int, best first.
    """
    left, kept = order, []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        is_rival = class_agnostic | (labels[left] == labels[best])
        is_rival &= (source[left] != source[best]) | (source[best] < 0)
        left = left[~(is_rival & (_iou(boxes[best], boxes[left]) > iou_threshold))]
    return np.array(kept, np.int64)


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the areas [...] that boxes [..., 4] have in common."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.maximum(sides, 0).prod(axis=-1)


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of a box [4] with others [N, 4]."""
    common = intersection(box, boxes)
    return common / np.maximum((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - common, 1e-6)
