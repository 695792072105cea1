"""Prediction: a trained model takes images and returns objects in pixels of the image, with names and category ids."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.plan import buckets_for
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.detect import Detect, detect_ahead, make_detect, with_options
from maskrcnn_jax.inference.detections import ImageDetections
from maskrcnn_jax.inference.inputs import Image, is_image, to_array, to_batch
from maskrcnn_jax.inference.results import Instances, unpad
from maskrcnn_jax.inference.selection import MIN_SCORE, MinScore, keep, minimum_scores
from maskrcnn_jax.inference.tiles import DEFAULT_OVERLAP, Find, Tiling, in_tiles
from maskrcnn_jax.inference.views import Augmentation, AugmentedDetection
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import Options
from maskrcnn_jax.structures import Batch

_log = logging.getLogger(__name__)

_MANY_SIZES = 5  # padded sizes; data.buckets=auto has at most four
_DETECTION_OPTIONS = (
    *("box_score_thresh", "box_nms_thresh", "box_nms_method", "box_nms_sigma", "box_nms_class_agnostic"),
    *("box_min_size", "box_detections_per_img", "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test"),
)


class Prepared(NamedTuple):
    """An image, and what the model gets of it."""

    image: np.ndarray  # [h, w, I] uint8, as it was given
    batch: Batch  # of this image alone, resized and padded

    @property
    def padded_size(self) -> tuple[int, int]:
        """The (height, width) of the padded image; images of one size can be predicted together."""
        height, width = self.batch.images.shape[1:3]
        return height, width


class Predictor:
    """A trained model, ready to predict.

    Attributes:
        categories: Its classes.
        options: The options of its training.
    """

    def __init__(
        self, network: MaskRCNN | None, categories: Categories, options: Options, *, detect: Detect | None = None
    ):
        """Prepare a network for prediction. Its parameters are copied; later training does not change predictions.

        Args:
            network: With as many classes as ``categories``; None if there is only ``detect``.
            categories: Names and ids of its labels.
            options: Of its training; they determine how images are resized and masks are pasted.
            detect: Used instead of the network, such as an exported file in another runtime.
        """
        self._network, self.categories, self.options = network, categories, options
        self._detect = make_detect(self.network) if detect is None else detect
        self._buckets = buckets_for(options.data)
        self._compiled: set[tuple[int, int]] = set()
        self._augmentations: dict[Augmentation, AugmentedDetection] = {}

    def __reduce__(self) -> tuple:
        """Pickle the network with its parameters; programs are compiled again where it is unpickled."""
        if self._network is None:
            return functools.partial(Predictor, detect=self._detect), (None, self.categories, self.options)
        return Predictor, (self._network, self.categories, self.options)

    @property
    def detect(self) -> Detect:
        """What finds the objects in padded images, by the network or by an exported file."""
        return self._detect

    @property
    def has_network(self) -> bool:
        """Whether there is a network, and not only an exported file."""
        return self._network is not None

    @property
    def network(self) -> MaskRCNN:
        """The ``MaskRCNN``, in evaluation mode.

        Raises:
            UserError: if the model is an exported file.
        """
        if self._network is None:
            raise UserError(
                "an exported file detects only as it was exported: with its number of detections and its suppression, "
                "without test-time augmentation; for anything else, load the run or the weights that it is from"
            )
        return self._network

    def with_options(self, **changes: Any) -> "Predictor":
        """Return a predictor with the same parameters that detects by other options.

        Args:
            changes: Options of the network that only detection uses, such as ``box_nms_method="gaussian"``:
                ``box_score_thresh``, ``box_detections_per_img``, ``box_min_size``, those that begin with ``box_nms``,
                and ``rpn_pre_nms_top_n_test`` and ``rpn_post_nms_top_n_test``.

        Raises:
            UserError: if there is no such option, or it has a value that is not allowed.
        """
        for name in changes:
            if name not in _DETECTION_OPTIONS:
                raise UserError(f"{name} is not an option of detection; those are {', '.join(_DETECTION_OPTIONS)}")
        options = dataclasses.replace(self.options, model=dataclasses.replace(self.options.model, **changes))
        return Predictor(with_options(self.network, options.model), self.categories, options)

    def predict(
        self,
        images: Image | Iterable[Image],
        *,
        min_score: MinScore = MIN_SCORE,
        classes: Collection[str] | None = None,
        tile: int | None = None,
        overlap: float = DEFAULT_OVERLAP,
        whole_image: bool = False,
        tta: str | int | Iterable[str | int] | None = None,
    ) -> ImageDetections | list[ImageDetections]:
        """Find the objects in one image or in several.

        A program is compiled for each padded size when it first occurs. With ``data.buckets`` "auto" there are at most
        four; with "exact", which the configs of published weights have, almost every shape of photographs has its own.

        Args:
            images: An image, or several: a path or URL, the content of an image file as bytes, a Pillow image, a
                NumPy or JAX array [h, w, 3] uint8 in RGB (OpenCV reads BGR), or a torch tensor [3, h, w]. With
                ``model.in_channels`` above 3 images have that many channels, RGB first.
            min_score: Objects with lower scores are left out. A number, or a dict with a number for each class by
                name, such as ``{"person": 0.7, None: 0.4}``; None stands for the other classes, whose number is 0.5
                without it. The model itself leaves out those below ``model.box_score_thresh``.
            classes: Names of the classes to keep, or one name. Defaults to all. The model counts
                ``model.box_detections_per_img`` before.
            tile: Detect in tiles of so many pixels of the image and merge the results: for objects that would be too
                small in a large image as it is resized. A tile is resized as an image is.
            overlap: Share of a tile that neighbouring tiles have in common, at least. Objects that fit are found as in
                one image, larger ones are joined from parts.
            whole_image: Detect in the whole image besides, for objects that are larger than tiles.
            tta: Test-time augmentation: "flip" detects in the mirrored image, too, and "flip,400,600" in images and
                mirrored images whose shorter sides have 400 and 600 pixels.

        Returns:
            The ``ImageDetections`` of one image, or a list of them in the order of the images.

        Raises:
            UserError: if an image cannot be read, an array has another shape or dtype, or there is no such class.
        """
        found = self.stream(
            [images] if is_image(images) else images,
            min_score=min_score,
            classes=classes,
            tile=tile,
            overlap=overlap,
            whole_image=whole_image,
            tta=tta,
        )
        return next(found) if is_image(images) else list(found)

    def stream(
        self,
        images: Iterable[Image],
        *,
        min_score: MinScore = MIN_SCORE,
        classes: Collection[str] | None = None,
        tile: int | None = None,
        overlap: float = DEFAULT_OVERLAP,
        whole_image: bool = False,
        tta: str | int | Iterable[str | int] | None = None,
    ) -> Iterator[ImageDetections]:
        """Yield what ``predict`` returns, image by image, for more images than fit in memory.

        The device processes the next image while the caller uses the result, so one image more is read than results
        are yielded.
        """
        if tile is None and whole_image:
            raise UserError("whole_image goes with tile; without tiles, the whole image is detected in anyway")
        if tile is None and overlap != DEFAULT_OVERLAP:
            raise UserError(f"the overlap {overlap} is that of tiles; give their size too, such as tile=1024")
        model = self.options.model
        least = minimum_scores(self.categories, min_score)
        least_of_wanted = minimum_scores(self.categories, min_score, classes)
        find = self._find if tta is None else self._augmented(Augmentation.parse(tta)).find

        def find_likely(arrays: Iterable[np.ndarray]) -> Iterator[Instances]:
            return (keep(found, least) for found in find(arrays))

        # Unwanted classes are left out after the tiles are merged: their objects tell which detections are pieces.
        find_all: Find = find_likely
        if tile is not None:
            find_all = in_tiles(
                find_likely,
                Tiling(tile, overlap, whole_image),
                iou_threshold=model.box_nms_thresh,
                class_agnostic=model.box_nms_class_agnostic,
            )
        read: collections.deque[np.ndarray] = collections.deque()

        def arrays() -> Iterator[np.ndarray]:
            for image in images:
                read.append(to_array(image, model.in_channels))
                yield read[-1]

        for found in find_all(arrays()):
            chosen = keep(found, least_of_wanted)
            yield ImageDetections(read.popleft(), chosen, self.categories, aligned_masks=model.roi_aligned)

    @property
    def padded_sizes(self) -> list[tuple[int, int]]:
        """The (height, width) of padded images; empty if ``data.buckets`` is exact, as any size is possible then."""
        return list(self._buckets)

    def prepare(self, image: Image) -> Prepared:
        """Read, resize and pad an image for :meth:`predict_prepared`; several threads may do so at a time.

        Args:
            image: As for :meth:`predict`.

        Raises:
            UserError: if the image cannot be read, or an array has another shape or dtype.
        """
        array = to_array(image, self.options.model.in_channels)
        return Prepared(array, self._prepare(array))

    def predict_prepared(
        self, images: Sequence[Prepared], *, min_score: MinScore = MIN_SCORE
    ) -> list[ImageDetections]:
        """Find the objects in several images together, as one batch.

        A program is compiled for each padded size and number of images.

        Args:
            images: At least one, all of one ``padded_size``.
            min_score: As for :meth:`predict`.
        """
        rows = (image.batch[:-1] for image in images)  # all but gt, which is None
        arrays, sizes, original_sizes, index, valid = map(np.concatenate, zip(*rows, strict=True))
        batch = Batch(arrays, sizes, original_sizes, index, valid, None)
        ((_, detections),) = detect_ahead(self._detect, [(batch,)])
        least, aligned = minimum_scores(self.categories, min_score, None), self.options.model.roi_aligned
        return [
            ImageDetections(prepared.image, keep(found, least), self.categories, aligned_masks=aligned)
            for prepared, found in zip(images, unpad(detections, sizes, original_sizes), strict=True)
        ]

    def _find(self, images: Iterable[np.ndarray]) -> Iterator[Instances]:
        """Yield all detections of each image [h, w, I] uint8, in its pixels."""
        for batch, detections in detect_ahead(self._detect, ((self._prepare(image),) for image in images)):
            yield unpad(detections, batch.sizes, batch.original_sizes)[0]

    def _augmented(self, augmentation: Augmentation) -> AugmentedDetection:
        if augmentation not in self._augmentations:
            self._augmentations[augmentation] = AugmentedDetection(self.network, self.options, augmentation)
        return self._augmentations[augmentation]

    def _prepare(self, image: np.ndarray) -> Batch:
        """Resize and pad an image, and warn when many programs are compiled."""
        batch = to_batch(image, self.options.data, self._buckets)
        padded = batch.images.shape[1:3]
        if self.has_network and padded not in self._compiled:
            self._compiled.add(padded)
            if len(self._compiled) == _MANY_SIZES:
                _log.warning(
                    "a program was compiled for each of %d shapes of images, because data.buckets is exact; load the "
                    "model with a config that has data.buckets=auto, unless results must equal the reference's",
                    _MANY_SIZES,
                )
        return batch
