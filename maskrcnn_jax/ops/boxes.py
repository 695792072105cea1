"""Box arithmetic: area, overlap, the offsets that the network regresses, clipping.

Boxes are ``x1, y1, x2, y2`` with width = x2 - x1, without the +1 of the original Caffe code; as torchvision 0.28.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# A regressed side may grow at most 62.5-fold; beyond, exp() would overflow. 1000 / 16 is Detectron's choice.
MAX_LOG_RATIO = math.log(1000.0 / 16)


def box_area(boxes: jax.Array) -> jax.Array:
    """Return the areas [...] of boxes [..., 4] in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the intersection over union [N, M] of every box of ``a`` [N, 4] with every box of ``b`` [M, 4].

    Two boxes without area have overlap 0, where torchvision has NaN.
    """
    return paired_iou(*jnp.broadcast_arrays(a[:, None], b[None, :]))


def box_coverage(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the share [N, M] of every box of ``a`` [N, 4] that each box of ``b`` [M, 4] covers."""
    a, b = jnp.broadcast_arrays(a[:, None], b[None, :])
    return _ratio(_intersection_and_union(a, b)[0], box_area(a))


def paired_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the intersection over union [...] of boxes [..., 4] with boxes [..., 4], one by one."""
    intersection, union = _intersection_and_union(a, b)
    return _ratio(intersection, union)


def paired_giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the generalised IoU [...], in -1..1, of boxes [..., 4] with boxes [..., 4], one by one.

    The IoU less the share of the smallest box around both that neither covers. Source: Algorithm 1, Generalized
    Intersection over Union.
    """
    intersection, union = _intersection_and_union(a, b)
    around = jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1)
    hull = box_area(around)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def _intersection_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    sides = jnp.maximum(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0)
    intersection = sides[..., 0] * sides[..., 1]
    return intersection, box_area(a) + box_area(b) - intersection


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Divide, with 0 for parts of nothing and a finite gradient there."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def overlaps_any(box: jax.Array, corners: jax.Array, iou_threshold: float) -> jax.Array:
    """Return [N] whether the boxes of ``corners`` [4, N] overlap one box [4] by more than the threshold.

    Each coordinate of all boxes lies in one piece: from boxes [N, 4], in a loop, XLA's code for CPUs reads number by
    number and takes 3 to 20 times as long, by the version.
    """
    x1, y1, x2, y2 = corners
    width = jnp.maximum(jnp.minimum(box[2], x2) - jnp.maximum(box[0], x1), 0)
    height = jnp.maximum(jnp.minimum(box[3], y2) - jnp.maximum(box[1], y1), 0)
    intersection = width * height
    # Divided, as torchvision does: a product with the threshold would round differently at the border.
    union = box_area(box) + (x2 - x1) * (y2 - y1) - intersection
    return intersection / jnp.where(union > 0, union, 1) > _rounded_down(iou_threshold, corners.dtype)


def _rounded_down(threshold: float, dtype: jnp.dtype) -> np.ndarray:
    """Return the largest number of a dtype that is not above a threshold.

    torchvision compares float32 overlaps with a float64 threshold. An overlap of 3 / 10 is above 0.3 then, because in
    float32 it is; 0.3 in float32 would be the same number, and not below it.
    """
    rounded = np.asarray(threshold, dtype)
    return np.nextafter(rounded, np.asarray(-np.inf, dtype)) if float(rounded) > threshold else rounded


def encode_boxes(boxes: jax.Array, references: jax.Array, weights: tuple[float, ...]) -> jax.Array:
    """Express boxes as offsets from reference boxes.

    Args:
      boxes: [..., 4] targets.
      references: [..., 4] anchors or proposals.
      weights: (wx, wy, ww, wh), factors that bring the offsets to about unit variance.

    Returns:
      [..., 4] dx, dy in reference sides and log ratios dw, dh, times the weights. Where either box has no area the
      offset is 0, so that padding stays finite.

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


def decode_boxes(deltas: jax.Array, references: jax.Array, weights: tuple[float, ...]) -> jax.Array:
    """Invert :func:`encode_boxes`.

    Args:
      deltas: [..., 4] weighted offsets.
      references: [..., 4], broadcast against deltas by the caller.
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


def _like(weights: tuple[float, ...], deltas: jax.Array) -> jax.Array:
    """Return the weights with the rank and dtype of deltas [..., 4]."""
    return jnp.asarray(weights, deltas.dtype).reshape((1,) * (deltas.ndim - 1) + (4,))


def clip_boxes(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Clip boxes [..., 4] to an image of ``size`` (height, width)."""
    height, width = size[0], size[1]
    limits = jnp.stack([width, height, width, height]).astype(boxes.dtype)
    limits = limits.reshape((1,) * (boxes.ndim - 1) + (4,))
    return jnp.clip(boxes, 0, limits)


def is_large(boxes: jax.Array, min_side: float) -> jax.Array:
    """Return [...] whether both sides of boxes [..., 4] are at least ``min_side`` pixels."""
    return jnp.all(boxes[..., 2:] - boxes[..., :2] >= min_side, axis=-1)
