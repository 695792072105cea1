"""Prediction: a trained model takes images and returns objects in pixels of the image, with names and category ids."""

import functools
import logging
import os
from collections.abc import Iterable, Iterator

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.plan import buckets_for, padded_size
from maskrcnn_jax.data.transforms import RESIZE, resize_image, resized_size
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.detect import Detect, detect_ahead, make_detect
from maskrcnn_jax.inference.draw import MIN_SIDE, draw_instances, write_picture
from maskrcnn_jax.inference.inputs import Image, is_image, to_array
from maskrcnn_jax.inference.results import Instances, to_coco_results, unpad
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import as_path
from maskrcnn_jax.structures import Batch
from maskrcnn_jax.writing import make_folder

_log = logging.getLogger(__name__)

_MANY_SIZES = 5  # padded sizes; data.buckets=auto has at most four
MIN_SCORE = 0.5  # detections below are left out unless others are asked for


class ImageDetections:
    """The K objects that a model found in one image, by descending score.

    ``len(detections)`` is K. Indexing selects objects: ``detections[0]`` or ``detections[detections.scores > 0.9]``.
    Iterating yields the objects one by one. Both give ``ImageDetections`` again.

    Attributes:
        image: [h, w, I] uint8, the image, RGB first.
        boxes: [K, 4] float32 ``x1, y1, x2, y2`` in pixels of the image, clipped to it; width = x2 - x1.
        scores: [K] float32, probability of the class, 0..1.
        labels: [K] int32, class inside the model, 1..C.
        category_ids: [K] int64, category id in the annotations that the model was trained on.
        names: K names of the classes.
    """

    def __init__(self, image: np.ndarray, instances: Instances, categories: Categories, *, aligned_masks: bool):
        """Attach names and category ids to the detections of an image.

        Args:
            image: [h, w, I] uint8, RGB first.
            instances: K detections in pixels of the image.
            categories: Names and ids of the labels.
            aligned_masks: How masks are pasted, as in ``paste_mask``.
        """
        self.image = image
        self.boxes, self.scores, self.labels, _ = instances
        self.category_ids = np.array([categories.category_id(label) for label in self.labels], np.int64)
        self.names = [categories.name(label) for label in self.labels]
        self._instances, self._categories, self._aligned_masks = instances, categories, aligned_masks

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: int | slice | np.ndarray) -> "ImageDetections":
        rows = np.atleast_1d(np.arange(len(self))[rows])
        chosen = Instances(*(values[rows] for values in self._instances))
        return ImageDetections(self.image, chosen, self._categories, aligned_masks=self._aligned_masks)

    def __iter__(self) -> Iterator["ImageDetections"]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True))
        return f"ImageDetections({found})"

    @functools.cached_property
    def masks(self) -> np.ndarray:
        """Masks at the size of the image, [K, h, w] bool; computed when first used."""
        masks = np.zeros((len(self), *self.image.shape[:2]), bool)
        for mask, result in zip(masks, self._results, strict=True):
            mask[...] = coco_mask.decode(result["segmentation"])
        return masks

    def draw(self, *, min_score: float = 0.0, min_side: int = MIN_SIDE) -> np.ndarray:
        """Draw the masks, boxes, names and scores over the image.

        Args:
            min_score: Objects with lower scores are left out.
            min_side: Images whose longer side is smaller are enlarged by a whole factor, so that the captions are
                readable; 0 keeps the size.

        Returns:
            [h * factor, w * factor, 3] uint8 RGB.
        """
        found = self if not min_score else self[self.scores >= min_score]
        masks = [result["segmentation"] for result in found._results]
        return draw_instances(self.image, found.boxes, found.names, found.scores, masks, min_side=min_side)

    def save(self, path: str | os.PathLike, *, min_score: float = 0.0) -> None:
        """Write the picture that :meth:`draw` returns.

        Args:
            path: Of the file, whose ending tells the format, such as .jpg or .png. Its folder is created.
            min_score: Objects with lower scores are left out.

        Raises:
            UserError: if the file cannot be written.
        """
        path = as_path(path)
        make_folder(path.parent)
        write_picture(path, self.draw(min_score=min_score))

    def to_coco(self, image_id: int) -> list[dict]:
        """Return the objects in COCO's results format, ready for JSON.

        Args:
            image_id: Id of this image in a dataset.

        Returns:
            One dict per object: image_id, category_id, bbox [x, y, width, height], score, segmentation (RLE).
        """
        return [{**result, "image_id": int(image_id)} for result in self._results]

    @functools.cached_property
    def _results(self) -> list[dict]:
        return to_coco_results(
            self._instances,
            image_id=0,
            image_size=self.image.shape[:2],
            category_ids=dict(zip(self._categories.labels, self._categories.ids, strict=True)),
            aligned_masks=self._aligned_masks,
        )


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
                "an exported file can only predict and be evaluated; load the run or the weights that it is from"
            )
        return self._network

    def predict(
        self, images: Image | Iterable[Image], *, min_score: float = MIN_SCORE
    ) -> ImageDetections | list[ImageDetections]:
        """Find the objects in one image or in several.

        A program is compiled for each padded size when it first occurs. With ``data.buckets`` "auto" there are at most
        four; with "exact", which the configs of published weights have, almost every shape of photographs has its own.

        Args:
            images: An image, or several: a path or URL, the content of an image file as bytes, a Pillow image, a
                NumPy or JAX array [h, w, 3] uint8 in RGB (OpenCV reads BGR), or a torch tensor [3, h, w]. With
                ``model.in_channels`` above 3 images have that many channels, RGB first.
            min_score: Objects with lower scores are left out. The model itself leaves out those below
                ``model.box_score_thresh``.

        Returns:
            The ``ImageDetections`` of one image, or a list of them in the order of the images.

        Raises:
            UserError: if an image cannot be read, or an array has another shape or dtype.
        """
        if is_image(images):
            return next(self.stream([images], min_score=min_score))
        return list(self.stream(images, min_score=min_score))

    def stream(self, images: Iterable[Image], *, min_score: float = MIN_SCORE) -> Iterator[ImageDetections]:
        """Yield what ``predict`` returns, image by image, for more images than fit in memory.

        The device processes the next image while the caller uses the result, so one image more is read than results
        are yielded.
        """
        arrays = (to_array(image, self.options.model.in_channels) for image in images)
        items = ((self._prepare(array), array) for array in arrays)
        for batch, image, detections in detect_ahead(self._detect, items):
            found = unpad(detections, batch.sizes, batch.original_sizes)[0]
            # torchvision's 91 classes contain labels that stand for no category.
            keep = (found.scores >= min_score) & np.isin(found.labels, self.categories.labels)
            found = Instances(*(values[keep] for values in found))
            yield ImageDetections(image, found, self.categories, aligned_masks=self.options.model.roi_aligned)

    def _prepare(self, image: np.ndarray) -> Batch:
        """Resize an image as in training and pad it to one of a few sizes, so that few shapes are compiled."""
        data = self.options.data
        height, width, channels = image.shape
        size = resized_size(height, width, data.short_side, data.long_side, data.resize)
        padded = padded_size(*size, self._buckets)
        if self.has_network and padded not in self._compiled:
            self._compiled.add(padded)
            if len(self._compiled) == _MANY_SIZES:
                _log.warning(
                    "a program was compiled for each of %d shapes of images, because data.buckets is exact; load the "
                    "model with a config that has data.buckets=auto, unless results must equal the reference's",
                    _MANY_SIZES,
                )
        images = np.zeros((1, *padded, channels), RESIZE[data.resize])
        images[0, : size[0], : size[1]] = resize_image(image, size, data.resize)
        return Batch(
            images=images,
            sizes=np.array([size], np.int32),
            original_sizes=np.array([(height, width)], np.int32),
            image_index=np.zeros(1, np.int32),
            valid=np.ones(1, bool),
            gt=None,
        )
