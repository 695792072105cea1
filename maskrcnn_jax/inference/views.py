"""Test-time augmentation: detections in several views of an image, resized and mirrored, are merged.

The rule is that of detectron2's ``GeneralizedRCNNWithTTA``: of boxes in different views that overlap by more than the
network allows, the best stays, and its mask is the average of its masks in all views. Unlike there, the features of a
view are computed once, for its boxes and its masks.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from maskrcnn_jax.data.plan import buckets_for
from maskrcnn_jax.data.transforms import hflip_boxes, hflip_image
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.detect import make_stages
from maskrcnn_jax.inference.inputs import to_batch
from maskrcnn_jax.inference.merging import distinct
from maskrcnn_jax.inference.results import Instances, to_image_pixels
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import Options
from maskrcnn_jax.structures import Batch

_LARGEST_SIDE = 8192  # pixels of a short side, ten times that of COCO configs; more is a typing error


class Augmentation(NamedTuple):
    """The views of an image."""

    flip: bool  # each view mirrored left to right, too
    short_sides: tuple[int, ...]  # pixels, a view for each; () means that of the training alone

    @classmethod
    def parse(cls, text: "str | int | Iterable[str | int] | Augmentation") -> "Augmentation":
        """Read what ``--tta`` says.

        Args:
            text: "flip", sizes, or both, such as "flip,400,600"; or its parts.

        Raises:
            UserError: if it says something else, or the same twice.
        """
        if isinstance(text, Augmentation):
            return text
        parts = str(text).split(",") if isinstance(text, str | int) else [str(part) for part in text]
        sizes = [part for part in parts if part != "flip"]
        known = all(size.isdecimal() and 0 < int(size) <= _LARGEST_SIDE for size in sizes)
        if not parts or len(set(parts)) < len(parts) or not known:
            raise UserError(
                f"test-time augmentation is {text!r}; use flip, short sides of 1 to {_LARGEST_SIDE} pixels, or both, "
                "such as flip,400,600"
            )
        return cls("flip" in parts, tuple(int(size) for size in sizes))


class _View(NamedTuple):
    """An image at one size, and mirrored if asked for, after the first stage: V = 1 or 2."""

    batch: Batch  # [V, ...]
    features: Any  # pyramid on the device
    boxes: np.ndarray  # [V, D, 4] in pixels of the image
    scores: np.ndarray  # [V, D]
    labels: np.ndarray  # [V, D]
    valid: np.ndarray  # [V, D]


class AugmentedDetection:
    """Detects in one image after another, each in several views."""

    def __init__(self, network: MaskRCNN, options: Options, augmentation: Augmentation):
        """Prepare a network. Its parameters are copied.

        Args:
            network: as of a ``Predictor``.
            options: of the training, which say how images are resized.
            augmentation: the views.
        """
        self._stages = make_stages(network)
        self._options, self._flip = network.options, augmentation.flip
        data = options.data
        self._sizes = []
        for side in augmentation.short_sides or (data.short_side,):
            # In proportion, or the longest images would have the same size in all views.
            sized = dataclasses.replace(
                data,
                short_side=side,
                long_side=max(side, round(data.long_side * side / data.short_side)),
                short_sides=(),
            )
            self._sizes.append((sized, buckets_for(sized)))

    def find(self, images: Iterable[np.ndarray]) -> Iterator[Instances]:
        """Yield the detections of each image [h, w, I] uint8, in its pixels, best first."""
        for image in images:
            views = [self._view(to_batch(image, *size)) for size in self._sizes]
            boxes, scores, labels, valid = self._merge(views)
            masks = np.mean([mask for view in views for mask in self._masks(view, boxes, labels, valid)], axis=0)
            yield Instances(boxes[valid], scores[valid], labels[valid], masks[valid])

    def _view(self, batch: Batch) -> _View:
        """Run the first stage on an image [1, ...]."""
        if self._flip:
            height, width = batch.sizes[0]
            batch = jax.tree.map(lambda rows: np.repeat(rows, 2, axis=0), batch)
            batch.images[1, :height, :width] = hflip_image(batch.images[1, :height, :width])
        features, *found = self._stages.boxes(batch.images, batch.sizes)
        boxes, scores, labels, valid = jax.device_get(found)
        return _View(batch, features, self._to_image(np.asarray(boxes, np.float32), batch), scores, labels, valid)

    def _to_image(self, boxes: np.ndarray, batch: Batch) -> np.ndarray:
        """Turn boxes [V, D, 4] in pixels of the network input to pixels of the image."""
        boxes = boxes.copy()
        if self._flip:
            boxes[1] = hflip_boxes(boxes[1], batch.sizes[1, 1])
        return to_image_pixels(boxes, batch.sizes[0], batch.original_sizes[0])

    def _merge(self, views: list[_View]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Choose among the boxes of all views: boxes [D, 4], scores, labels and valid [D], best first."""
        boxes, scores, labels, valid = (
            np.concatenate([values.reshape(-1, *values.shape[2:]) for values in of_views])
            for of_views in zip(*((view.boxes, view.scores, view.labels, view.valid) for view in views), strict=True)
        )
        options, rows = self._options, np.flatnonzero(valid)
        most = options.box_detections_per_img
        kept = distinct(
            boxes,
            labels,
            np.arange(len(boxes)) // most,
            rows[np.argsort(-scores[rows], kind="stable")],
            iou_threshold=options.box_nms_thresh,
            class_agnostic=options.box_nms_class_agnostic,
        )[:most]
        padded = np.pad(kept, (0, most - len(kept)))
        return boxes[padded], scores[padded], labels[padded], np.arange(most) < len(kept)

    def _masks(self, view: _View, boxes: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the masks [D, M, M] of boxes [D, 4] in pixels of the image, as each image of a view shows them."""
        batch = view.batch
        ratio = batch.sizes[0, ::-1].astype(np.float32) / np.asarray(batch.original_sizes[0, ::-1], np.float32)
        boxes = boxes * np.tile(ratio, 2)
        every = np.stack([boxes, hflip_boxes(boxes, batch.sizes[1, 1])] if self._flip else [boxes]).astype(np.float32)
        rows = [np.tile(values, (len(every), 1)) for values in (labels, valid)]
        masks = jax.device_get(self._stages.masks(view.features, every, *rows, batch.images.shape[1:3]))
        yield masks[0]
        if self._flip:
            yield masks[1, :, :, ::-1]
