"""Test-time augmentation: detections in several views of an image, resized and mirrored, are merged.

The rule is that of detectron2's ``GeneralizedRCNNWithTTA``: the boxes of all views are suppressed together as those of
one view are, and the mask of each box that stays is the average of its masks in all views. Unlike there, the features
of a view are computed once, for its boxes and its masks.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskrcnn_jax.data.plan import buckets_for
from maskrcnn_jax.data.transforms import hflip_boxes, hflip_image
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.detect import make_stages
from maskrcnn_jax.inference.inputs import to_batch
from maskrcnn_jax.inference.results import Instances, to_image_pixels
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.models.postprocess import suppress_detections
from maskrcnn_jax.ops.nms import Picks
from maskrcnn_jax.options import ModelOptions, Options
from maskrcnn_jax.structures import Batch


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
        if not parts or len(set(parts)) < len(parts) or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise UserError(f"test-time augmentation is {text!r}; use flip, short sides in pixels, or flip,400,600")
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

    def __init__(self, network: MaskRCNN, num_classes: int, options: Options, augmentation: Augmentation):
        """Prepare a network. Its parameters are copied.

        Args:
            network: as of a ``Predictor``.
            num_classes: C + 1.
            options: of the training, which say how images are resized.
            augmentation: the views.
        """
        self._stages = make_stages(network)
        self._num_classes, self._options, self._flip = num_classes, network.options, augmentation.flip
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
        """Suppress the boxes of all views together: boxes [D, 4], scores, labels and valid [D]."""
        boxes = np.concatenate([view.boxes.reshape(-1, 4) for view in views])
        scores, labels, valid = (
            np.concatenate([getattr(view, name).ravel() for view in views]) for name in ("scores", "labels", "valid")
        )
        picks = jax.device_get(
            _suppress(boxes, np.where(valid, scores, 0), labels, num_classes=self._num_classes, options=self._options)
        )
        return boxes[picks.box_index], picks.scores, picks.class_index + 1, picks.valid

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


@functools.partial(jax.jit, static_argnames=("num_classes", "options"))
def _suppress(
    boxes: jax.Array, scores: jax.Array, labels: jax.Array, *, num_classes: int, options: ModelOptions
) -> Picks:
    """Suppress boxes [P, 4] by the options of the network; scores [P] are 0 where there is no box."""
    by_class = scores[:, None] * (labels[:, None] == jnp.arange(1, num_classes)[None])  # [P, C]
    return suppress_detections(jnp.broadcast_to(boxes[:, None], (*by_class.shape, 4)), by_class, options)
