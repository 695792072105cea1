"""The whole of ``MaskRCNN.detect`` as an ONNX graph: what happens before, between and after the parts with parameters.

Any number of images is detected at once. The boxes of all images are pooled together, level by level, and only those
that are valid; the heads see them in this order, and their outputs are scattered back to [B * N].
"""

from typing import NamedTuple

import numpy as np

from maskrcnn_jax.anchor_shapes import cell_anchors
from maskrcnn_jax.exporting.boxes import clip, decode, is_large, sides, suppress, whole_image
from maskrcnn_jax.exporting.graph import Value
from maskrcnn_jax.exporting.network import backbone, box_outputs, mask_logits, pyramid, rpn_outputs, sigmoid
from maskrcnn_jax.models.box_head import BOX_WEIGHTS
from maskrcnn_jax.models.mask_rcnn import BOX_POOL_SIZE, MASK_POOL_SIZE, MaskRCNN
from maskrcnn_jax.models.normalize import channel_statistics
from maskrcnn_jax.models.proposals import RPN_BOX_WEIGHTS
from maskrcnn_jax.options import ModelOptions

FINEST = 2  # the first level, of stride 4, of all backbones that can be exported
_LOWEST = -1e30  # objectness of boxes that do not count


class Found(NamedTuple):
    """What the graph returns for B images, with D detections each, best first."""

    boxes: Value  # [B, D, 4] float32 in pixels of the original images
    scores: Value  # [B, D] float32
    labels: Value  # [B, D] int32
    masks: Value  # [B, D, M, M] float32
    valid: Value  # [B, D] bool


def detect(network: MaskRCNN, images: Value, sizes: Value, original_sizes: Value) -> Found:
    """Add everything from padded images to detections.

    Args:
        network: In evaluation mode.
        images: [B, H, W, I] uint8 or float32, 0..255; H and W are multiples of 32.
        sizes: [B, 2] int32 (height, width) inside the padding.
        original_sizes: [B, 2] int32, before the images were resized.
    """
    graph, options = images.graph, network.options
    maps = backbone(network.backbone, normalize(images, sizes, options.in_channels))
    levels, limits = pyramid(network.fpn, maps), whole_image(sizes)
    proposals, valid = propose(network, levels, images, limits)

    pooled, rows = pool(options, levels[:-1], proposals, valid, BOX_POOL_SIZE)
    logits, deltas = box_outputs(network.box_head, pooled)
    scores = sigmoid(logits) if options.classification_loss == "focal" else graph.op("Softmax", logits, axis=-1)
    scores, deltas = (scatter_rows(values, rows, proposals) for values in (scores, deltas))
    boxes, scores, labels = select(options, proposals, scores, deltas, limits)

    valid = scores > 0.0
    pooled, rows = pool(options, levels[:-1], boxes, valid, MASK_POOL_SIZE)
    chosen = graph.op("Gather", graph.reshape(labels, -1), rows)
    masks = scatter_rows(sigmoid(mask_logits(network.mask_head, pooled, chosen)), rows, boxes)
    original = whole_image(original_sizes)
    # One ratio per axis, as inference.results.unpad.
    boxes = clip(boxes * (original / graph.op("Max", limits, 1.0)), original)
    return Found(boxes, scores, graph.cast(labels, np.int32), masks, valid)


def normalize(images: Value, sizes: Value, in_channels: int) -> Value:
    """Standardise images to [B, I, H, W]; the padding is zero."""
    graph = images.graph
    # Channels first, which is fast to compute with where there are three.
    mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) * 255 for values in channel_statistics(in_channels))
    x = (graph.cast(graph.transpose(images, 0, 3, 1, 2), np.float32) - mean) * (1 / std)
    inside = []
    for axis in range(2):
        places = graph.op("Range", 0, graph.reshape(graph.length(images, 1 + axis)), 1)
        limit = graph.op("Gather", graph.cast(sizes, np.int64), np.array([axis]), axis=1)  # [B, 1]
        inside.append(graph.cast(places < limit, np.float32))  # [B, H], [B, W]
    return x * (graph.unsqueeze(inside[0], 1, 3) * graph.unsqueeze(inside[1], 1, 2))


def propose(network: MaskRCNN, levels: list[Value], images: Value, limits: Value) -> tuple[Value, Value]:
    """Return proposals [B, N, 4] and whether they are valid [B, N], best first; as ``select_proposals``."""
    graph, options = images.graph, network.options
    most = options.rpn_pre_nms_top_n_test
    best = [best_of_level(network, level, i, images) for i, level in enumerate(levels)]
    scores, deltas, anchors = (
        graph.concat([graph.unsqueeze(of_level, 1) for of_level in values], 1) for values in zip(*best, strict=True)
    )
    boxes = clip(decode(deltas, anchors, RPN_BOX_WEIGHTS), graph.unsqueeze(limits, 1))  # [B, L, most, 4]
    valid = (scores > _LOWEST / 2) & is_large(boxes, options.rpn_min_size)
    # Ranked by their places, among which there are no ties.
    ranks = graph.op("Where", valid, np.arange(most, 0, -1, dtype=np.float32), -1.0)
    kept = suppress(
        graph.reshape(boxes, -1, most, 4),
        graph.reshape(ranks, -1, 1, most),
        graph.reshape(scores, -1, 1, most),
        _LOWEST,
        most=most,
        score_threshold=0.0,
        iou_threshold=options.rpn_nms_thresh,
    )
    kept = graph.reshape(kept, -1, len(levels) * most)
    scores, index = graph.ops("TopK", 2, kept, np.array([_num_proposals(options)]), axis=-1)
    return graph.take(graph.reshape(boxes, 0, -1, 4), index), scores > _LOWEST / 2


def _num_proposals(options: ModelOptions) -> int:
    return min(options.rpn_post_nms_top_n_test, len(options.anchor_sizes) * options.rpn_pre_nms_top_n_test)


def best_of_level(network: MaskRCNN, level: Value, index: int, images: Value) -> tuple[Value, Value, Value]:
    """Return objectness [B, K], offsets [B, K, 4] and anchors [B, K, 4] of the best K boxes of a level.

    K is ``rpn_pre_nms_top_n_test``; rows that a small level does not have score lowest.
    """
    graph, options = level.graph, network.options
    outputs = rpn_outputs(network.rpn, level)  # [B, h, w, 5 * A]
    cells = cell_anchors(
        [options.anchor_sizes[index] * scale for scale in options.anchor_scales],
        options.aspect_ratios,
        options.exact_anchors,
    )
    logits, deltas = graph.ops("Split", 2, outputs, np.array([len(cells), 4 * len(cells)]), axis=-1)
    logits, deltas = graph.reshape(logits, 0, -1), graph.reshape(deltas, 0, -1, 4)

    most = options.rpn_pre_nms_top_n_test
    number = graph.op("Min", graph.length(logits, 1), np.array([most]))
    scores, chosen = graph.ops("TopK", 2, logits, number, axis=-1)
    place = chosen // len(cells)
    height, width = graph.length(outputs, 1), graph.length(outputs, 2)
    shifts = []
    for axis, cell, length in ((2, place % width, width), (1, place // width, height)):
        # As ops.anchors.grid_anchors.
        stride = 2 ** (FINEST + index) if options.exact_anchors else graph.length(images, axis) // length
        shifts.append(graph.unsqueeze(graph.cast(cell * stride, np.float32), -1))
    anchors = graph.concat(shifts * 2, -1) + graph.op("Gather", cells, chosen % len(cells))

    missing = graph.op("Sub", np.array([most]), number)
    scores = graph.op("Pad", scores, graph.concat([np.zeros(3, np.int64), missing], 0), _LOWEST)
    pads = graph.concat([np.zeros(4, np.int64), missing, np.zeros(1, np.int64)], 0)
    return scores, graph.op("Pad", graph.take(deltas, chosen), pads), graph.op("Pad", anchors, pads)


def pool(
    options: ModelOptions, levels: list[Value], boxes: Value, valid: Value, output_size: int
) -> tuple[Value, Value]:
    """Pool the valid ones of boxes [B, N, 4], each from the level that fits its size; as ``multiscale_roi_align``.

    Returns:
        [R, K, output_size, output_size], level by level, and the rows [R] of [B * N] that they belong to.
    """
    graph = boxes.graph
    number, valid, boxes = graph.length(boxes, 1), graph.reshape(valid, -1), graph.reshape(boxes, -1, 4)
    area = graph.op("ReduceProd", sides(boxes), axes=[-1], keepdims=0)
    side = graph.op("Sqrt", graph.op("Max", area, 0.0))
    pooled, rows = [], []
    for i, level in enumerate(levels):
        wanted = valid
        if i > 0:
            wanted = wanted & (side >= _smallest_side(FINEST + i, options.roi_aligned))
        if i < len(levels) - 1:
            wanted = wanted & (side < _smallest_side(FINEST + i + 1, options.roi_aligned))
        row = graph.reshape(graph.op("NonZero", wanted), -1)
        pooled.append(_pool_level(options, level, graph.op("Gather", boxes, row), row // number, i, output_size))
        rows.append(row)
    return graph.concat(pooled, 0), graph.concat(rows, 0)


def _smallest_side(level: int, aligned: bool) -> float:
    """Return the side from which boxes belong to a level; the inverse of ``ops.pyramid.assign_levels``."""
    return 224 * (2.0 ** (level - 4) - 1e-8) if aligned else 224 * 2.0 ** (level - 4 - 1e-6)


def _pool_level(
    options: ModelOptions, level: Value, boxes: Value, image: Value, index: int, output_size: int
) -> Value:
    """Pool boxes [R, 4] from a map [B, K, h, w]; ``image`` [R] is the row of each."""
    graph, scale = level.graph, 2.0 ** -(FINEST + index)
    if options.roi_operator == "pool":
        # Rounded here, halves up: runtimes differ.
        cells = graph.op("Floor", boxes * scale + 0.5)
        rois = graph.concat([graph.unsqueeze(graph.cast(image, np.float32), 1), cells], 1)
        return graph.op("MaxRoiPool", level, rois, pooled_shape=[output_size] * 2)
    return graph.op(
        "RoiAlign",
        *(level, boxes, image),
        output_height=output_size,
        output_width=output_size,
        sampling_ratio=options.roi_sampling_ratio,
        spatial_scale=scale,
        coordinate_transformation_mode="half_pixel" if options.roi_aligned else "output_half_pixel",
    )


def scatter_rows(values: Value, rows: Value, boxes: Value) -> Value:
    """Return [B, N, ...] with values [R, ...] at rows [R] of the B * N boxes [B, N, 4], and 0 elsewhere."""
    graph = values.graph
    shape = graph.op("Shape", boxes, end=2)
    inner = graph.op("Shape", values, start=1)
    number = graph.op("ReduceProd", shape, keepdims=1)
    nothing = graph.full([number, inner], 0.0)
    scattered = graph.op("ScatterND", nothing, graph.unsqueeze(rows, 1), values)
    return graph.op("Reshape", scattered, graph.concat([shape, inner], 0))


def select(
    options: ModelOptions, proposals: Value, scores: Value, deltas: Value, limits: Value
) -> tuple[Value, Value, Value]:
    """Return boxes [B, D, 4], scores and labels [B, D] of the detections; as ``postprocess.select_detections``.

    Args:
        options: Of the network.
        proposals: [B, N, 4].
        scores: [B, N, C + 1], 0 for proposals that are not valid.
        deltas: [B, N, 4 * (C + 1)], or [B, N, 4] for all classes.
        limits: [B, 1, 4], as ``whole_image`` returns them.
    """
    graph, number = proposals.graph, _num_proposals(options)
    deltas = graph.op("Reshape", deltas, np.array([0, number, -1, 4]))
    if not options.cls_agnostic_bbox_reg:
        deltas = _without_background(deltas)
    boxes = decode(deltas, graph.unsqueeze(proposals, 2), BOX_WEIGHTS)
    boxes = graph.transpose(clip(boxes, graph.unsqueeze(limits, 1)), 0, 2, 1, 3)  # [B, C, N, 4], or [B, 1, N, 4]
    scores = graph.transpose(_without_background(scores), 0, 2, 1)  # [B, C, N]
    scores = graph.op("Where", is_large(boxes, options.box_min_size), scores, 0.0)
    shape = graph.op("Shape", scores)
    lists, shares_boxes = graph.reshape(boxes, -1, number, 4), options.cls_agnostic_bbox_reg
    if options.box_nms_class_agnostic:  # among the boxes of all classes, in the order of the classes
        boxes, shares_boxes = graph.op("Expand", boxes, graph.concat([shape, np.array([4])], axis=0)), False
        lists, scores = graph.reshape(boxes, 0, -1, 4), graph.reshape(scores, 0, 1, -1)
    elif not shares_boxes:
        scores = graph.reshape(scores, -1, 1, number)
    kept = suppress(
        lists,
        *(scores, scores, 0.0),
        most=options.box_detections_per_img,
        score_threshold=options.box_score_thresh,
        iou_threshold=options.box_nms_thresh,
    )
    # Ordered by class and then by box, of which those of equal scores come in this order.
    kept = graph.op("Flatten", graph.op("Reshape", kept, shape))
    most = graph.op("Min", graph.length(kept, 1), np.array([options.box_detections_per_img]))
    scores, index = graph.ops("TopK", 2, kept, most, axis=-1)
    row = index % number if shares_boxes else index
    return graph.take(graph.reshape(boxes, 0, -1, 4), row), scores, index // number + 1


def _without_background(values: Value) -> Value:
    """Return [B, N, C + 1, ...] without the first class."""
    return values.graph.op("Slice", values, np.array([1]), np.array([np.iinfo(np.int64).max]), np.array([2]))
