"""What torchvision assigns and draws for its losses: compared with ours, and in our structures to be injected."""

import copy
from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import torch

from maskrcnn_jax.data.run_lengths import cut_out
from maskrcnn_jax.data.transforms import pack_masks
from maskrcnn_jax.models.proposals import sample_rois
from maskrcnn_jax.ops.matching import BACKGROUND, Sample
from maskrcnn_jax.structures import Batch, GroundTruth, Proposals, RoISamples
from tools.comparison.comparison_page import Comparison
from tools.comparison.pair import Pair, channels_last, our_images, pad
from tools.comparison.stages import compare_sets


class Drawn(NamedTuple):
    """What torchvision's samplers drew for a batch, in our structures."""

    anchors: Sample
    rois: RoISamples


class Assigned(NamedTuple):
    """What torchvision did between its networks and its losses; a list has an entry per image."""

    head: tuple[list[torch.Tensor], list[torch.Tensor]]  # of the RPN: objectness and offsets per level
    anchor_labels: list[np.ndarray]  # [A]: 1 foreground, 0 background, -1 neither
    anchor_objects: list[np.ndarray]  # [A, 4] box of the object that each is assigned to, right where the label is 1
    proposals: list[np.ndarray]  # [P, 4]
    candidates: list[np.ndarray]  # [P + G, 6]: box, label, object of each RoI that could be drawn
    drawn: Drawn


def reference_losses(
    pair: Pair, images: list[torch.Tensor], targets: list[dict], seed: int
) -> tuple[dict[str, torch.Tensor], Assigned]:
    """Return torchvision's losses of a batch, and what it assigned and drew at random for them."""
    reference = pair.reference.train()
    rpn, heads, seen = reference.rpn, reference.roi_heads, {}
    dtype = getattr(torch, pair.dtype)

    def in_dtype(assigned):
        # torchvision's labels of anchors are float32 always, and make the objectness loss of a float64 model float32.
        labels, boxes = assigned
        return [label.to(dtype) for label in labels], boxes

    def spy(owner, name, change=lambda result: result):
        function = getattr(owner, name)

        def call(*args):
            result = change(function(*args))
            seen[name] = _copied(result)
            return result

        return mock.patch.object(owner, name, call)

    with ExitStack() as stack:
        stack.enter_context(spy(rpn.head, "forward"))
        stack.enter_context(spy(rpn, "assign_targets_to_anchors", in_dtype))
        for name in ("fg_bg_sampler", "filter_proposals"):
            stack.enter_context(spy(rpn, name))
        for name in ("add_gt_proposals", "assign_targets_to_proposals", "select_training_samples"):
            stack.enter_context(spy(heads, name))
        torch.manual_seed(seed)
        losses = reference(images, targets)
    objects, labels = seen["assign_targets_to_proposals"]
    candidates = [
        np.concatenate([_numpy(boxes), _numpy(label)[:, None], _numpy(index)[:, None]], axis=1)
        for boxes, label, index in zip(seen["add_gt_proposals"], labels, objects, strict=True)
    ]
    return losses, Assigned(
        seen["forward"],
        [_numpy(label) for label in seen["assign_targets_to_anchors"][0]],
        [_numpy(boxes) for boxes in seen["assign_targets_to_anchors"][1]],
        [_numpy(boxes) for boxes in seen["filter_proposals"][0]],
        candidates,
        _drawn(pair, seen["fg_bg_sampler"], seen["select_training_samples"]),
    )


def _copied(value):
    """Copy lists within lists, which torchvision changes in place; tensors it does not."""
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _drawn(pair: Pair, anchors: tuple, rois: tuple) -> Drawn:
    size = pair.model.options.rpn_batch_size_per_image
    positive, negative = ([torch.where(mask)[0].numpy() for mask in masks] for masks in anchors)
    index = [np.concatenate(both) for both in zip(positive, negative, strict=True)]
    sample = Sample(
        pad(index, size).astype(np.int32),
        pad([np.arange(len(i)) < len(p) for i, p in zip(index, positive, strict=True)], size),
        pad([np.ones(len(i), bool) for i in index], size),
    )
    boxes, matched, labels, _ = ([_numpy(tensor) for tensor in column] for column in rois)
    order = [np.argsort(column == 0, kind="stable") for column in labels]  # foreground first
    size = pair.model.options.box_batch_size_per_image
    samples = RoISamples(
        *(
            pad([row[o] for row, o in zip(column, order, strict=True)], size).astype(dtype)
            for column, dtype in ((boxes, boxes[0].dtype), (labels, np.int32), (matched, np.int32))
        ),
        pad([np.ones(len(o), bool) for o in order], size),
    )
    return Drawn(sample, samples)


@torch.no_grad()
def our_batch(pair: Pair, images: list[torch.Tensor], targets: list[dict]) -> Batch:
    """Return the batch as torchvision resized it, with the masks at the resolution of their images."""
    image_list, resized = pair.reference.train().transform(images, copy.deepcopy(targets))
    pixels, sizes = our_images(image_list)
    original = np.array([image.shape[1:] for image in images], np.int32)
    side, count = -(-int(original.max()) // 8) * 8, max(len(t["labels"]) for t in targets)
    packed = [
        pack_masks([cut_out(mask) for mask in target["masks"].numpy()], size, size, side)
        for target, size in zip(targets, map(tuple, original.tolist()), strict=True)
    ]
    gt = GroundTruth(
        boxes=pad([target["boxes"].numpy() for target in resized], count),
        labels=pad([target["labels"].numpy() for target in targets], count).astype(np.int32),
        masks=pad([masks for masks, *_ in packed], count),
        mask_windows=pad([windows for _, windows, _ in packed], count),
        mask_sizes=original,
        valid=pad([np.ones(len(target["labels"]), bool) for target in targets], count),
    )
    rows = np.arange(len(images), dtype=np.int32)
    return Batch(pixels, sizes, original, rows, np.ones(len(images), bool), gt)


def compare_sampling(result: Comparison, pair: Pair, assigned: Assigned, batch: Batch) -> None:
    """Compare the proposals of training, what anchors and RoIs are assigned to, and how many of each are drawn."""
    section = "assignment and sampling, fed with torchvision's proposals"
    shape = batch.images.shape[1:3]

    objectness, deltas = ([channels_last(level.detach()) for level in levels] for levels in assigned.head)
    propose = pair.compiled(lambda m, o, d, sizes, cells: m.propose(o, d, m.anchors(cells, shape), sizes, train=True))
    count = len(batch.images)
    scores = [level.reshape(count, -1) for level in objectness]
    offsets = [level.reshape(count, -1, 4) for level in deltas]
    found = propose(scores, offsets, batch.sizes, objectness)
    for i, wanted in enumerate(assigned.proposals):
        compare_sets(result, section, found.boxes[i][found.valid[i]], wanted, pair)

    match = pair.compiled(lambda m, gt, cells: m.match_anchors(m.anchors(cells, shape), gt))
    matches = match(batch.gt, objectness)
    labels = np.where(matches >= 0, 1, np.where(matches == BACKGROUND, 0, -1))
    result.add(section, "labels of anchors", labels, np.stack(assigned.anchor_labels), 0.0)
    for i, wanted in enumerate(assigned.anchor_objects):
        foreground = labels[i] == 1
        ours = batch.gt.boxes[i][matches[i][foreground]]
        result.add(section, "objects of foreground anchors", ours, wanted[foreground], 0.0)

    # Asked for every candidate, sampling shows what each is assigned to.
    most = max(map(len, assigned.proposals))
    boxes = pad(assigned.proposals, most)
    valid = pad([np.ones(len(p), bool) for p in assigned.proposals], most)
    proposals = Proposals(boxes, np.zeros(valid.shape, boxes.dtype), valid)
    key = jax.random.key(0)
    everything = {"size": most + batch.gt.boxes.shape[1], "positive_fraction": 1.0}
    thresholds = {"iou_thresh": pair.model.options.box_fg_iou_thresh}
    sample = jax.vmap(lambda p, gt: sample_rois(key, p, gt, **everything, **thresholds))
    rois = pair.compiled(lambda m, p, gt: sample(p, gt))(proposals, batch.gt)
    for i, wanted in enumerate(assigned.candidates):
        columns = np.concatenate([rois.boxes[i], rois.labels[i][:, None], rois.gt_index[i][:, None]], axis=1)
        result.add(section, "RoIs: box, label, object", _sorted(columns[rois.valid[i]]), _sorted(wanted), 0.0)

    anchors = pair.compiled(lambda m, key, matches: m.sample_anchors(key, matches))(key, matches)
    rois = pair.compiled(lambda m, key, p, gt: m.sample_rois(key, p, gt))(key, proposals, batch.gt)
    kinds = np.where(anchors.valid, np.take_along_axis(labels, anchors.index, axis=1), anchors.foreground)
    result.add(section, "anchors drawn: kind", kinds, anchors.foreground, 0.0)
    drawn = assigned.drawn
    for name, ours, wanted in (
        ("anchors drawn", anchors.valid, drawn.anchors.valid),
        ("anchors drawn, foreground", anchors.foreground, drawn.anchors.foreground),
        ("RoIs drawn", rois.valid, drawn.rois.valid),
        ("RoIs drawn, foreground", rois.valid & (rois.labels > 0), drawn.rois.labels > 0),
    ):
        result.add(section, name, ours.sum(axis=1), wanted.sum(axis=1), 0.0)


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]
