"""A COCO-format dataset as flat NumPy arrays.

pycocotools keeps every annotation as a Python dictionary. For COCO that takes several gigabytes, which every loading
process copies. Here a dataset is a few flat arrays, and its problems are found when it is opened, not an hour into
the training.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.findings import Kind, Report, stop
from maskrcnn_jax.data.images import read_image_file
from maskrcnn_jax.data.run_lengths import Crop, decode_crop
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)

_PER_ANNOTATION = (
    *("places", "annotation_ids", "category_ids", "labels", "boxes", "file_boxes", "areas", "iscrowd"),
    *("first_part", "num_parts"),
)


class ImageAnnotations(NamedTuple):
    """The n annotated objects of one image, in the order of their file."""

    ids: np.ndarray  # [n] int64
    labels: np.ndarray  # [n] int32, 1..C
    boxes: np.ndarray  # [n, 4] float32 x1, y1, x2, y2 in pixels of the image file
    crowd: np.ndarray  # [n] bool
    has_mask: np.ndarray  # [n] bool


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """N images and their K annotations, sorted by image; image i owns ``offsets[i]:offsets[i + 1]``."""

    annotation_path: Path  # of the file that all of this comes from
    image_dir: Path
    categories: Categories
    category_shift: int  # added to the category ids of the annotations; 0 unless they were off by one
    num_annotations: int  # in the file, unusable ones included
    problem_places: dict[Kind, np.ndarray]  # kind of problem -> places in the file's annotations
    missing: np.ndarray  # rows of the images whose files are missing
    image_places: np.ndarray  # [N] int64, places in the file's images
    image_ids: np.ndarray  # [N] int64
    sizes: np.ndarray  # [N, 2] int32 (height, width)
    file_names: np.ndarray  # [N] unicode, relative to image_dir
    offsets: np.ndarray  # [N + 1] int64
    places: np.ndarray  # [K] int64, places in the file's annotations
    annotation_ids: np.ndarray  # [K] int64
    category_ids: np.ndarray  # [K] int64
    labels: np.ndarray  # [K] int32, 0 for objects of a category that the file does not list
    boxes: np.ndarray  # [K, 4] float32 x1, y1, x2, y2 in pixels, clipped to the image by ``clip_boxes``
    file_boxes: np.ndarray  # [K, 4] float64, the file's x, y, width, height that AP is defined by; NaN for none
    areas: np.ndarray  # [K] float64 as in the file; NaN for none
    iscrowd: np.ndarray  # [K] bool, as in the file
    first_part: np.ndarray  # [K] int64, first polygon of the annotation, or its row in the run-length masks
    num_parts: np.ndarray  # [K] int32, polygons of the annotation; 0 means a run-length mask, -1 none
    coordinates: np.ndarray  # float64 x, y, x, y ... of all polygons; float32 would move some rasters by a pixel
    part_offsets: np.ndarray  # [P + 1] int64 into coordinates
    rle_counts: np.ndarray  # uint8, compressed run lengths as pycocotools has them, end to end
    rle_offsets: np.ndarray  # [R + 1] int64 into rle_counts

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_objects(self) -> np.ndarray:
        """Number of annotated objects in each image, [N] int64, crowds not counted."""
        before = np.concatenate([[0], np.cumsum(~self.crowd)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    @property
    def crowd(self) -> np.ndarray:
        """Which annotations are crowds or objects of categories that are not listed, [K] bool; both are ignored."""
        return self._is_crowd(slice(None))

    @property
    def image_rows(self) -> np.ndarray:
        """Row of the image of each annotation, [K] int64."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def has_mask(self) -> np.ndarray:
        """Which annotations have a mask, [K] bool."""
        return self.num_parts >= 0

    @property
    def problems(self) -> dict[Kind, int]:
        """What was repaired or dropped -> how often."""
        counts = {kind: len(places) for kind, places in self.problem_places.items()}
        return counts | ({Kind.MISSING_FILE: len(self.missing)} if len(self.missing) else {})

    def log_problems(self) -> None:
        """Log a warning with everything that was repaired or dropped."""
        if self.problems:
            listed = ", ".join(f"{count} {what}" for what, count in self.problems.items())
            _log.warning("%s: %s", self.annotation_path, listed)

    def image_path(self, i: int) -> Path:
        """Return the path of an image file."""
        return self.image_dir / str(self.file_names[i])

    def annotations(self, i: int, with_crowd: bool = False) -> ImageAnnotations:
        """Return the objects of image ``i``, by default without crowds."""
        rows = self._rows(i, with_crowd)
        has_mask = self.num_parts[rows] >= 0
        return ImageAnnotations(
            self.annotation_ids[rows], self.labels[rows], self.boxes[rows], self._is_crowd(rows), has_mask
        )

    def crops(
        self, i: int, chosen: np.ndarray | slice = slice(None), with_crowd: bool = False
    ) -> Iterator[Crop | None]:
        """Rasterise masks of image ``i``, each in its own box.

        They come one at a time, because the box of a thin object, such as a cable, can cover the whole image.

        Args:
            i: row of the image.
            chosen: places in ``annotations``; by default all of them, in their order.
            with_crowd: as in ``annotations``.

        Yields:
            Per annotation, its mask at the resolution of the image file; None for objects without a mask.

        Raises:
            UserError: a run-length mask does not describe an image of this size.
        """
        for row in self._rows(i, with_crowd)[chosen].tolist():
            yield self.crop(row, *map(int, self.sizes[i])) if self.num_parts[row] >= 0 else None

    def crop(self, row: int, height: int, width: int) -> Crop:
        """Rasterise the mask of a row in its own box; see ``rle``."""
        try:
            return decode_crop(self.rle(row, height, width))
        except ValueError:
            place = {"annotation": self.annotation_ids[row], "image": self.file_names[self.image_rows[row]]}
            raise UserError(Kind.UNFILLED.tell(size=f"{height}x{width}", **place)) from None

    def masks(self, i: int, with_crowd: bool = False) -> np.ndarray:
        """Rasterise the masks of image ``i`` at full size, as ``crops`` does.

        Returns:
            [n, h, w] uint8, 0 or 1; 0 for objects without a mask. Crowded large images take gigabytes.
        """
        masks = np.zeros((len(self._rows(i, with_crowd)), *self.sizes[i]), np.uint8)
        for mask, crop in zip(masks, self.crops(i, with_crowd=with_crowd), strict=True):
            if crop is not None:
                height, width = crop.mask.shape
                mask[crop.y : crop.y + height, crop.x : crop.x + width] = crop.mask
        return masks

    def read_image(self, i: int, channels: int = 3) -> np.ndarray:
        """Read image ``i`` as [h, w, channels] uint8, as ``decode_image`` does.

        The orientation in EXIF is ignored, because COCO's annotations refer to the pixels as they are stored.

        Raises:
            BrokenImageError: the file is missing, truncated, not an image, of another size than annotated, or has
                fewer channels.
        """
        return read_image_file(self.image_path(i), tuple(self.sizes[i].tolist()), channels)

    def rle(self, row: int, height: int, width: int) -> dict:
        """Encode a mask as pycocotools' run lengths.

        Args:
            row: of an annotation with a mask.
            height: of the canvas in pixels; of the image, where the file has run lengths.
            width: likewise.
        """
        first, num = self.first_part[row], self.num_parts[row]
        if num == 0:
            return {"size": [height, width], "counts": self.mask_bytes(row)}
        bounds = self.part_offsets[first : first + num + 1]
        polygons = [self.coordinates[start:stop] for start, stop in itertools.pairwise(bounds)]
        parts = coco_mask.frPyObjects(polygons, height, width)
        return coco_mask.merge(parts) if num > 1 else parts[0]

    def rles(self, i: int) -> list[dict | None]:
        """Encode the masks of image ``i`` as ``rle`` does, in the order of ``annotations``; None for no mask."""
        size = self.sizes[i].tolist()
        return [self.rle(row, *size) if self.num_parts[row] >= 0 else None for row in self._rows(i, False).tolist()]

    def mask_bytes(self, row: int) -> bytes:
        """Return the mask of a row as the file has it; equal for equal masks."""
        first, num = self.first_part[row], self.num_parts[row]
        if num == 0:
            return self.rle_counts[self.rle_offsets[first] : self.rle_offsets[first + 1]].tobytes()
        return self.coordinates[self.part_offsets[first] : self.part_offsets[first + max(num, 0)]].tobytes()

    def select(self, rows: np.ndarray) -> Self:
        """Return the dataset with some of its annotations and all of its images.

        Args:
            rows: of the annotations, in ascending order.
        """
        columns = {name: getattr(self, name)[rows] for name in _PER_ANNOTATION}
        return replace(self, offsets=np.searchsorted(rows, self.offsets), **columns)

    def take_images(self, rows: np.ndarray) -> Self:
        """Return the dataset with some of its images and their annotations.

        Args:
            rows: of the images, in ascending order.
        """
        smaller = self.select(np.flatnonzero(np.isin(self.image_rows, rows)))
        columns = {name: getattr(self, name)[rows] for name in ("image_places", "image_ids", "sizes", "file_names")}
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[rows])])
        missing = np.flatnonzero(np.isin(rows, self.missing))
        return replace(smaller, offsets=offsets, missing=missing, **columns)

    def without_flat(self) -> Self:
        """Return the dataset without annotations whose box has no area in the image; nothing is learnt from them."""
        has_area = _have_area(self.boxes, self.sizes[self.image_rows])
        return self if has_area.all() else self.select(np.flatnonzero(has_area))

    def _rows(self, i: int, with_crowd: bool) -> np.ndarray:
        rows = np.arange(self.offsets[i], self.offsets[i + 1])
        return rows if with_crowd else rows[~self._is_crowd(rows)]

    def _is_crowd(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.iscrowd[rows] | (self.labels[rows] == 0)


def clip_boxes(dataset: CocoDataset, report: Report = stop) -> CocoDataset:
    """Clip the boxes to their images and record which of them lose something.

    Args:
        dataset: as it was read.
        report: called if no box has an area in its image.
    """
    sizes = dataset.sizes[dataset.image_rows]  # [K, 2]
    boxes, clipped = dataset.boxes, np.clip(dataset.boxes, 0, sizes[:, [1, 0, 1, 0]].astype(np.float32))
    positive, inside = (_have_area(b, sizes) for b in (boxes, clipped))
    # Coordinates are rounded in the file, so that many boxes pass the border by a hundredth of a pixel.
    moved = inside & (np.abs(clipped - boxes) > 1).any(axis=1)
    kinds = {
        Kind.FLAT_BOX: ~positive,
        Kind.OUTSIDE_BOX: positive & ~inside,
        Kind.CLIPPED_BOX: moved,
    }
    places = {kind: np.sort(dataset.places[rows]) for kind, rows in kinds.items() if rows.any()}
    dataset = replace(dataset, boxes=clipped, problem_places=dataset.problem_places | places)
    if dataset.num_annotations and not inside.any():
        problems = ", ".join(f"{count} {kind}" for kind, count in dataset.problems.items())
        total, path = dataset.num_annotations, dataset.annotation_path
        report(Kind.NOTHING_USABLE.finding(total=total, path=path, problems=problems))
    return dataset


def _have_area(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return which boxes [K, 4] keep an area in images of ``sizes`` [K, 2] when they are mirrored and resized.

    float32 has steps of 0.00006 pixels at 640 and of 0.0002 at 4000, where the sides of a narrower box can fall
    together. A box without area overlaps all anchors alike, by nothing, so each of them would be matched to it.
    """
    step = np.spacing(sizes[:, ::-1].astype(np.float32))  # [K, 2] of x and y
    # Reading, mirroring and scaling round once each. The sum, unlike a difference, cannot overflow.
    return (boxes[:, 2:] > boxes[:, :2] + 4 * step).all(axis=1)


def drop_labels(dataset: CocoDataset, share: float, seed: int) -> CocoDataset:
    """Drop a random share of the annotations, as if nobody had made them.

    A larger share drops what a smaller one drops, and more. The images all stay.

    Args:
        dataset: to drop annotations from.
        share: of the annotations, 0..1.
        seed: of the choice.

    Raises:
        UserError: the share is outside 0..1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"data.drop_labels {share} must be a share, 0..1")
    num = len(dataset.labels)
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(num)[round(share * num) :]))


def exclude_categories(
    dataset: CocoDataset, ids: Sequence[float], *, ignore: bool, contiguous_labels: bool = False
) -> CocoDataset:
    """Leave categories out, as if the file did not list them.

    Args:
        dataset: to leave categories out of.
        ids: of the categories.
        ignore: keep their objects as regions that are ignored, instead of dropping them.
        contiguous_labels: as in ``load_coco``.

    Raises:
        UserError: no category would be left.
    """
    categories = dataset.categories
    pairs = dict(zip(categories.ids, categories.names, strict=True))
    kept = {i: name for i, name in pairs.items() if i not in ids}
    listed = ", ".join(f"{i} ({name})" for i, name in list(pairs.items())[:10])
    if not kept:
        raise UserError(
            f"data.exclude_categories {tuple(ids)} leaves no category of {dataset.annotation_path}, which lists "
            f"{listed}; keep one at least"
        )
    unknown = [i for i in ids if i not in pairs]
    if unknown:  # no error, since one split may list what another does not
        _log.warning(
            "data.exclude_categories %s is not in %s, which lists %s", unknown, dataset.annotation_path, listed
        )
    removed = [name for i, name in pairs.items() if i in ids]
    if removed:
        more = f" and {len(removed) - 10} more" if len(removed) > 10 else ""
        _log.info("data.exclude_categories leaves out %s%s", ", ".join(removed[:10]), more)
    new = Categories.create(list(kept), list(kept.values()), contiguous_labels)
    labels = np.zeros(categories.num_classes, np.int32)  # by old label
    labels[[categories.labels[categories.ids.index(i)] for i in kept]] = [new.labels[new.ids.index(i)] for i in kept]
    found = replace(dataset, categories=new, labels=labels[dataset.labels])
    return found if ignore else found.select(np.flatnonzero((found.labels > 0) | (dataset.labels == 0)))


def annotations_name(split: str) -> str:
    """Return the path of a split's annotations in COCO's layout."""
    return f"annotations/instances_{split}.json"
