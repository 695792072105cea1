"""Box arithmetic: area, overlap, the offsets that the network regresses, clipping.

Boxes are ``x1, y1, x2, y2`` with width = x2 - x1, without the +1 of the original Caffe code; as torchvision 0.28.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

# A regressed side may grow at most 62.5-fold; beyond, exp() would overflow. 1000 / 16 is Detectron's choice.
MAX_LOG_RATIO = math.log(1000.0 / 16)


def box_area(boxes: Float[Array, "*shape 4"]) -> Float[Array, "*shape"]:
    """Return the areas [...] of boxes [..., 4] in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(a: Float[Array, "N 4"], b: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Return the intersection over union [N, M] of every box of ``a`` [N, 4] with every box of ``b`` [M, 4].

    Two boxes without area have overlap 0, where torchvision has NaN.
    """
    # One coordinate at a time: TPUs pad the last axis of [N, M, 4] to 128.
    return _ratio(*_intersection_and_union(a.T[:, :, None], b.T[:, None, :]))


def box_coverage(a: Float[Array, "N 4"], b: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Return the share [N, M] of every box of ``a`` [N, 4] that each box of ``b`` [M, 4] covers."""
    intersection, _ = _intersection_and_union(a.T[:, :, None], b.T[:, None, :])
    return _ratio(intersection, jnp.broadcast_to(box_area(a)[:, None], intersection.shape))


def paired_iou(a: Float[Array, "*shape 4"], b: Float[Array, "*shape 4"]) -> Float[Array, "*shape"]:
    """Return the intersection over union [...] of boxes [..., 4] with boxes [..., 4], one by one."""
    return _ratio(*_intersection_and_union(jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, -1, 0)))


def paired_giou(a: Float[Array, "*shape 4"], b: Float[Array, "*shape 4"]) -> Float[Array, "*shape"]:
    """Return the generalised IoU [...], in -1..1, of boxes [..., 4] with boxes [..., 4], one by one.

    The IoU less the share of the smallest box around both that neither covers. Source: Algorithm 1, Generalized
    Intersection over Union.
    """
    intersection, union = _intersection_and_union(jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, -1, 0))
    around = jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1)
    hull = box_area(around)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def _intersection_and_union(
    a: Float[Array, "4 *#shape"], b: Float[Array, "4 *#shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    width = jnp.maximum(jnp.minimum(a[2], b[2]) - jnp.maximum(a[0], b[0]), 0)
    height = jnp.maximum(jnp.minimum(a[3], b[3]) - jnp.maximum(a[1], b[1]), 0)
    intersection = width * height
    area_a, area_b = ((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return intersection, area_a + area_b - intersection


def _ratio(part: Float[Array, "*shape"], whole: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Divide; 0 / 0 is 0 and has a finite gradient."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def iou_with(box: Float[Array, "4"], corners: Float[Array, "4 N"]) -> Float[Array, " N"]:
    """Return the IoU [N] of one box with each of the others, given by ``corners`` as in :func:`exceeds_iou`."""
    return _ratio(*_intersection_and_union(box[:, None], corners))


def exceeds_iou(box: Float[Array, "4"], corners: Float[Array, "4 N"], iou_threshold: float) -> Bool[Array, " N"]:
    """Return whether the IoU of one box with each of the others, given by ``corners``, exceeds the threshold.

    Each coordinate of the others is contiguous: with boxes [N, 4] in a loop, XLA's code for CPUs is not vectorised and
    takes 3 to 20 times as long, depending on the version.
    """
    intersection, union = _intersection_and_union(box[:, None], corners)
    # Divided, as torchvision does: a product with the threshold would round differently at the border.
    return intersection / jnp.where(union > 0, union, 1) > rounded_down(iou_threshold, corners.dtype)


def rounded_down(threshold: float, dtype: np.dtype) -> np.ndarray | np.floating:
    """Return the largest number of a dtype that is not above a threshold.

    torchvision compares float32 overlaps with a float64 threshold. Rounding the threshold up would change results: an
    overlap of 3 / 10 in float32 is above 0.3, but not above 0.3 rounded to float32.
    """
    rounded = np.asarray(threshold, dtype)
    return np.nextafter(rounded, np.asarray(-np.inf, dtype)) if float(rounded) > threshold else rounded


def encode_boxes(
    boxes: Float[Array, "*shape 4"], references: Float[Array, "*shape 4"], weights: tuple[float, float, float, float]
) -> Float[Array, "*shape 4"]:
    """Express boxes as offsets from reference boxes.

    Args:
        boxes: [..., 4] targets.
        references: [..., 4] anchors or proposals.
        weights: (wx, wy, ww, wh), factors that bring the offsets to about unit variance.

    Returns:
        [..., 4] dx, dy in sides of the reference and log ratios dw, dh, times the weights; 0 where either box has no
        area, so that padding stays finite.

    Source: Eqn. 2, Faster R-CNN. Example: a box twice as wide as its reference and with the same centre has
    dx = 0, dw = log 2.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    reference_size = references[..., 2:] - references[..., :2]
    proper = jnp.all((size > 0) & (reference_size > 0), axis=-1, keepdims=True)
    size = jnp.where(proper, size, 1)
    reference_size = jnp.where(proper, reference_size, 1)
    # Corner plus half a side, the order of torchvision's additions: the mean of the corners rounds differently.
    centre = boxes[..., :2] + 0.5 * size
    reference_centre = references[..., :2] + 0.5 * reference_size
    deltas = jnp.concatenate([(centre - reference_centre) / reference_size, jnp.log(size / reference_size)], axis=-1)
    return jnp.where(proper, deltas * _like(weights, deltas), 0)


def decode_boxes(
    deltas: Float[Array, "*shape 4"],
    references: Float[Array, "*#shape 4"],
    weights: tuple[float, float, float, float],
) -> Float[Array, "*shape 4"]:
    """Invert :func:`encode_boxes`.

    Args:
        deltas: [..., 4] weighted offsets.
        references: [..., 4], of the shape of deltas or one that broadcasts to it.
        weights: as in encoding.

    Returns:
        [..., 4] boxes, not clipped to the image.
    """
    size = references[..., 2:] - references[..., :2]
    centre = references[..., :2] + 0.5 * size
    deltas = deltas / _like(weights, deltas)
    new_centre = deltas[..., :2] * size + centre
    half = 0.5 * jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_RATIO)) * size
    return jnp.concatenate([new_centre - half, new_centre + half], axis=-1)


def _like(weights: tuple[float, float, float, float], deltas: Float[Array, "*shape 4"]) -> Float[Array, "..."]:
    """Return the weights with the rank and dtype of deltas [..., 4]."""
    return jnp.asarray(weights, deltas.dtype).reshape((1,) * (deltas.ndim - 1) + (4,))


def clip_boxes(boxes: Float[Array, "*shape 4"], size: Num[Array | np.ndarray, "2"]) -> Float[Array, "*shape 4"]:
    """Clip boxes [..., 4] to an image of ``size`` (height, width)."""
    height, width = size[0], size[1]
    limits = jnp.stack([width, height, width, height]).astype(boxes.dtype)
    limits = limits.reshape((1,) * (boxes.ndim - 1) + (4,))
    return jnp.clip(boxes, 0, limits)


def is_large(boxes: Float[Array, "*shape 4"], min_side: float) -> Bool[Array, "*shape"]:
    """Return [...] whether both sides of boxes [..., 4] are at least ``min_side`` pixels."""
    return jnp.all(boxes[..., 2:] - boxes[..., :2] >= min_side, axis=-1)
