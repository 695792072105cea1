"""Final detections in the pixels of the images, masks pasted."""

import copy
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from maskrcnn_jax.data.transforms import resize_image
from maskrcnn_jax.inference.paste import paste_mask
from maskrcnn_jax.inference.results import unpad
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from tools.comparison.comparison_page import Comparison
from tools.comparison.pair import Pair, our_images, to_torch


class DetectionLimits(NamedTuple):
    """How far final detections may be apart, in any dtype."""

    pixels: float
    score: float
    mask_iou: float


DETECTIONS = DetectionLimits(0.05, 1e-4, 0.995)
DETECTIONS_FROM_FILES = DetectionLimits(0.05, 1e-3, 0.97)


@torch.no_grad()
def compare_detections(result: Comparison, pair: Pair, batches: list[list[np.ndarray]]) -> None:
    """Compare final detections in the pixels of the images: from the same resized pixels on, then from the files on.

    The reference always computes in float64: its own rounding in float32 moves scores by more than the limit on some
    processors.
    """
    reference = copy.deepcopy(pair.reference).eval().double()
    detect = pair.compiled(MaskRCNN.detect)
    for batch in tqdm(batches, desc="detections", unit="batch", leave=False):
        tensors = to_torch(batch, "float64")
        image_list, _ = reference.transform(tensors)
        images, sizes = our_images(image_list)
        images = images.astype(pair.dtype)
        original = np.array([image.shape[:2] for image in batch], np.int32)
        wanted = reference(tensors)

        def compare(section, images, limits, wanted=wanted, sizes=sizes, original=original):
            found = unpad(detect(images, sizes), sizes, original)
            for ours, theirs, size in zip(found, wanted, original, strict=True):
                _compare_instances(result, section, ours, theirs, tuple(map(int, size)), limits)

        compare("detections, from torchvision's resized pixels on", images, DETECTIONS)
        if pair.dtype == "float32":
            images = np.zeros_like(images)
            for i, (height, width) in enumerate(sizes):
                images[i, :height, :width] = resize_image(batch[i], (int(height), int(width)), "float32")
            compare("detections, from the files on", images, DETECTIONS_FROM_FILES)


def _compare_instances(result: Comparison, section: str, ours, wanted: dict, size, limits: DetectionLimits) -> None:
    scores, labels = wanted["scores"].numpy(), wanted["labels"].numpy()
    result.add(section, "number", len(ours.scores), len(scores), 0.0)
    result.add(section, "some are there", min(len(scores), 1), 1, 0.0)
    if len(ours.scores) != len(scores):
        return
    order = _order_up_to_ties(ours, wanted)
    misplaced = np.abs(ours.scores[order] - ours.scores) > limits.score
    result.add(section, "out of order, ties aside", misplaced.sum(), 0.0, 0.0, absolute=True)
    result.add(section, "labels", ours.labels[order], labels, 0.0)
    result.add(section, "boxes, pixels", ours.boxes[order], wanted["boxes"], limits.pixels, absolute=True)
    result.add(section, "scores", ours.scores[order], scores, limits.score, absolute=True)
    overlaps = []
    for i, box, mask in zip(order, wanted["boxes"].numpy(), wanted["masks"].numpy()[:, 0] >= 0.5, strict=True):
        pasted = np.zeros(size, bool)
        # Into the reference's box: pasting cuts boxes to whole pixels, so that of two boxes 1e-5 pixels apart one can
        # lose a row that the other has. How far boxes are apart is the row above.
        crop, y, x = paste_mask(ours.masks[i], box, size)
        pasted[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        union = (pasted | mask).sum()
        overlaps.append((pasted & mask).sum() / union if union else 1.0)
    apart = 1 - np.array(overlaps)
    result.add(section, "1 - mask IoU", apart, np.zeros_like(apart), 1 - limits.mask_iou, absolute=True)


def _order_up_to_ties(ours, wanted: dict) -> np.ndarray:
    """Return, for each detection of the reference, ours of the same label with the nearest box, each used once."""
    boxes, labels = wanted["boxes"].numpy(), wanted["labels"].numpy()
    free = np.ones(len(ours.boxes), bool)
    order = np.arange(len(labels))
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        distance = np.abs(ours.boxes - box).max(axis=1) + np.where(free & (ours.labels == label), 0, np.inf)
        best = int(np.argmin(distance))
        order[i] = best if np.isfinite(distance[best]) else int(np.argmax(free))
        free[order[i]] = False
    return order
