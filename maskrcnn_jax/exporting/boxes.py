"""Box arithmetic and suppression as ONNX, as in ``ops.boxes`` and ``ops.nms``: boxes are ``x1, y1, x2, y2``."""

import numpy as np

from maskrcnn_jax.exporting.graph import Value
from maskrcnn_jax.ops.boxes import MAX_LOG_RATIO, rounded_down


def decode(deltas: Value, references: Value, weights: tuple[float, float, float, float]) -> Value:
    """Return boxes [..., 4] from offsets [..., 4] and reference boxes that broadcast to them."""
    graph = deltas.graph
    low, high = graph.halves(references)
    size = high - low
    centre = low + size * 0.5
    shift, log_ratio = graph.halves(deltas)
    if set(weights) != {1.0}:
        factors = np.array(weights, np.float32)
        shift, log_ratio = shift / factors[:2], log_ratio / factors[2:]
    centre = shift * size + centre
    half = graph.op("Exp", graph.op("Min", log_ratio, MAX_LOG_RATIO)) * 0.5 * size
    return graph.concat([centre - half, centre + half], -1)


def clip(boxes: Value, limits: Value) -> Value:
    """Clip boxes to images; ``limits`` broadcast to them and are those of ``whole_image``."""
    return boxes.graph.op("Min", boxes.graph.op("Max", boxes, 0.0), limits)


def whole_image(sizes: Value) -> Value:
    """Return width, height, width, height [B, 1, 4] float32 of sizes [B, 2] int32 (height, width)."""
    graph = sizes.graph
    order = np.array([1, 0, 1, 0])
    return graph.unsqueeze(graph.op("Gather", graph.cast(sizes, np.float32), order, axis=1), 1)


def sides(boxes: Value) -> Value:
    """Return width and height [..., 2] of boxes [..., 4]."""
    low, high = boxes.graph.halves(boxes)
    return high - low


def is_large(boxes: Value, min_side: float) -> Value:
    """Return [...] whether both sides of boxes [..., 4] are at least ``min_side`` pixels."""
    return boxes.graph.op("ReduceMin", sides(boxes), axes=[-1], keepdims=0) >= float(min_side)


def suppress(
    boxes: Value,
    ranks: Value,
    scores: Value,
    lowest: float,
    *,
    most: int,
    score_threshold: float,
    iou_threshold: float,
) -> Value:
    """Return the scores of the boxes that are kept, ``lowest`` for the others.

    Args:
        boxes: [P, N, 4], P times N boxes.
        ranks: [P, S, N]: of each of these P times S lists, the boxes suppress those of lower rank.
        scores: [P, S, N].
        lowest: What boxes that are not kept get.
        most: Boxes to keep of each list.
        score_threshold: Rank at or below which a box is never kept.
        iou_threshold: Overlap above which the worse box goes.
    """
    graph, single = boxes.graph, np.dtype(np.float32)
    # OpenVINO also drops boxes whose overlap equals the threshold, so that it gets the next number; no denormal one,
    # which it takes for 0.
    threshold = np.nextafter(rounded_down(iou_threshold, single), np.float32(1))
    threshold = np.maximum(threshold, np.finfo(single).tiny)
    limits = np.array([most]), threshold[None], np.array([score_threshold], np.float32)
    index = graph.op("NonMaxSuppression", boxes, ranks, *limits)  # [K, 3]: P, S, N
    nothing = graph.full([graph.length(scores, axis) for axis in range(3)], lowest)
    return graph.op("ScatterND", nothing, index, graph.op("GatherND", scores, index))
