"""The objects found in one image, with masks at the size of the image, pictures and COCO results."""

import functools
import os
from collections.abc import Iterator

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.run_lengths import decode_crop
from maskrcnn_jax.inference.draw import MIN_SIDE, draw_instances, write_picture
from maskrcnn_jax.inference.polygons import mask_to_polygons
from maskrcnn_jax.inference.results import Instances, to_coco_results
from maskrcnn_jax.paths import as_path
from maskrcnn_jax.writing import make_folder


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

    @functools.cached_property
    def polygons(self) -> list[list[list[np.ndarray]]]:
        """Masks as polygons: for each object its regions, for each region its outline and then its holes.

        They are [N, 2] ``x, y`` in pixels, along the edges of the pixels; see :func:`.polygons.mask_to_polygons`.
        """
        return [mask_to_polygons(decode_crop(result["segmentation"])) for result in self._results]

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
