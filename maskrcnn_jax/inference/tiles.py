"""Detection in images that are much larger than those of the training: tile by tile, the results merged. Without JAX.

Tiles overlap, so that an object smaller than the overlap is whole in one of them. What the tiles find is merged in
three steps. Two detections are compared where both tiles could see them.

1. Pieces. A detection that touches a border of its tile inside the image may be a piece of an object. It goes if a
   neighbouring tile found an object there that reaches beyond the tile of the piece, and whose mask covers more than
   half of the piece. Masks decide instead of boxes, because boxes of neighbours in a crowd cover each other's pieces.
   Their IoU does not help: a piece may be a small part of its object. Nor does the class: a piece of an object often
   looks like one of another class.
2. Parts of objects larger than the overlap, which no tile sees whole. Two detections that touch borders, and of which
   each reaches beyond the tile of the other, are joined if the IoU of their masks exceeds one half in the area that
   both tiles see. The joint object has the box around both, the larger probability of each mask cell and the higher
   score.
3. Duplicates. Of two detections of different tiles whose boxes overlap more than the network's own suppression allows,
   the one that touches no border stays, or the one with the higher score if this does not decide.

A pass over the whole image, reduced like any image, finds what is larger than tiles. Its detections touch no border,
so that step 1 removes the pieces of what it found.

Masks stay relative to their boxes throughout, and only tiles that are being detected are copied: beside the image,
memory depends on the number of objects.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.merging import distinct, intersection
from maskrcnn_jax.inference.results import Instances

# Detects in images [h, w, I] uint8, one after another, in their own pixels.
Find = Callable[[Iterable[np.ndarray]], Iterator[Instances]]

DEFAULT_OVERLAP = 0.2
_SMALLEST_TILE = 32  # pixels, the stride of the coarsest backbone map
_LARGEST_OVERLAP = 0.9  # there, a hundred tiles see each pixel
# The box of a cut object ends near the border and not on it. Of the tile's side: four cells of the finest map of a
# network that sees 800 pixels.
_BORDER = 0.02
_COVERED = 0.5  # share of a piece above which another mask covers it
_AGREEMENT = 0.5  # IoU of the masks of two parts above which they belong together
_SAMPLES = 32  # points along each axis at which masks are compared


class Tiling(NamedTuple):
    """How an image is divided."""

    size: int  # pixels of the side of a tile, before the tile is resized as images are
    overlap: float = DEFAULT_OVERLAP  # share of the side that neighbouring tiles have in common, at least
    whole_image: bool = False  # detect in the whole image as well

    def check(self) -> None:
        """Raise UserError if the sizes are not possible."""
        if not isinstance(self.size, int | np.integer) or self.size < _SMALLEST_TILE:
            raise UserError(
                f"tiles cannot have {self.size} pixels; use a whole number from {_SMALLEST_TILE}, such as 1024"
            )
        if not 0 <= self.overlap <= _LARGEST_OVERLAP:
            raise UserError(f"the overlap of tiles is {self.overlap}; use 0 to {_LARGEST_OVERLAP}, such as 0.2")

    def windows(self, height: int, width: int) -> np.ndarray:
        """Return the tiles of an image, row by row, and last the whole image if it is asked for and not a tile.

        Returns:
            [T, 4] int64 ``x1, y1, x2, y2`` in pixels. They are all of one size, and neighbours overlap evenly.
        """
        across, down = self._starts(width), self._starts(height)
        y, x = (grid.ravel() for grid in np.meshgrid(down, across, indexing="ij"))
        windows = np.stack([x, y, np.minimum(x + self.size, width), np.minimum(y + self.size, height)], axis=1)
        if self.whole_image and len(windows) > 1:
            windows = np.concatenate([windows, [[0, 0, width, height]]])
        return windows

    def _starts(self, length: int) -> np.ndarray:
        """Return where tiles start along an axis."""
        free = length - self.size
        if free <= 0:
            return np.zeros(1, np.int64)
        steps = math.ceil(free / max(1, math.floor(self.size * (1 - self.overlap))))
        return np.round(np.linspace(0, free, steps + 1)).astype(np.int64)


def in_tiles(find: Find, tiling: Tiling, *, iou_threshold: float, class_agnostic: bool = False) -> Find:
    """Return what detects in images of any size by detecting in their tiles, as ``detect_in_tiles`` does."""
    tiling.check()

    def find_in_tiles(images: Iterable[np.ndarray]) -> Iterator[Instances]:
        for image in images:
            yield detect_in_tiles(find, image, tiling, iou_threshold=iou_threshold, class_agnostic=class_agnostic)

    return find_in_tiles


def detect_in_tiles(
    find: Find, image: np.ndarray, tiling: Tiling, *, iou_threshold: float, class_agnostic: bool = False
) -> Instances:
    """Detect in the tiles of an image and merge what they find, so that every object is found once.

    Args:
        find: detects in one tile after another; boxes lie inside the tile.
        image: [h, w, I] uint8.
        tiling: how the image is divided.
        iou_threshold: overlap of boxes above which the worse of two detections goes.
        class_agnostic: also if they are of different classes.

    Returns:
        The detections in pixels of the image, best first. Those of an image that is no larger than a tile are what
        ``find`` returns.
    """
    height, width = image.shape[:2]
    windows = tiling.windows(height, width)
    tiles = (image[y1:y2, x1:x2] for x1, y1, x2, y2 in windows)
    found = []
    for window, of_tile in zip(windows, find(tiles), strict=True):
        found.append(of_tile._replace(boxes=of_tile.boxes + np.tile(window[:2], 2).astype(np.float32)))
    if len(found) == 1:
        return found[0]
    return _merge(found, windows, (height, width), iou_threshold, class_agnostic)


class _Found(NamedTuple):
    """The N detections of all tiles."""

    instances: Instances  # in pixels of the image
    tile: np.ndarray  # [N] int, the tile of each; -1 for objects of several tiles
    is_cut: np.ndarray  # [N] bool, whether it touches a border of its tile inside the image


def _merge(
    found: list[Instances], windows: np.ndarray, size: tuple[int, int], iou_threshold: float, class_agnostic: bool
) -> Instances:
    together = Instances(*(np.concatenate(values) for values in zip(*found, strict=True)))
    tile = np.repeat(np.arange(len(found)), [len(of_tile.scores) for of_tile in found])
    detections = _Found(together, tile, _touches_border(together.boxes, windows[tile], size))
    pieces, parts = _compare(detections, windows)
    stays = np.ones(len(tile), bool)
    stays[pieces] = False
    joined = _join(detections, [(i, j) for i, j in parts if stays[i] and stays[j]], stays)
    kept = distinct(
        joined.instances.boxes,
        joined.instances.labels,
        joined.tile,
        np.lexsort((-joined.instances.scores, joined.is_cut)),
        iou_threshold=iou_threshold,
        class_agnostic=class_agnostic,
    )
    kept = kept[np.argsort(-joined.instances.scores[kept], kind="stable")]
    return Instances(*(values[kept] for values in joined.instances))


def _touches_border(boxes: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return [N], whether boxes [N, 4] come close to a border of their tiles [N, 4] that is none of the image."""
    margin = _BORDER * (windows[:, 2:] - windows[:, :2])
    low = (boxes[:, :2] - windows[:, :2] <= margin) & (windows[:, :2] > 0)
    high = (windows[:, 2:] - boxes[:, 2:] <= margin) & (windows[:, 2:] < np.array(size[::-1]))
    return (low | high).any(axis=1)


def _compare(found: _Found, windows: np.ndarray) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the detections that are pieces of others, and the pairs that are parts of one object."""
    boxes, _, labels, _ = found.instances
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    pieces, parts = [], []
    for i, j in _near(found, windows):
        window_i, window_j = windows[found.tile[i]], windows[found.tile[j]]
        reach_i, reach_j = _reaches_beyond(boxes[i], window_j), _reaches_beyond(boxes[j], window_i)
        if reach_i and reach_j:
            are_parts = labels[i] == labels[j] and found.is_cut[i] and found.is_cut[j]
            if are_parts and _agree(found.instances, i, j, window_i, window_j):
                parts.append((i, j))
        elif reach_i or reach_j:
            whole, piece = (i, j) if reach_i else (j, i)
            # The smaller can only be a piece of the larger: in no chain of pieces all of them go.
            is_piece = found.is_cut[piece] and areas[piece] < areas[whole]
            if is_piece and _covered(found.instances, piece, whole) > _COVERED:
                pieces.append(piece)
    return pieces, parts


def _near(found: _Found, windows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs of detections of different tiles whose boxes overlap."""
    boxes = found.instances.boxes
    rows = [np.flatnonzero(found.tile == number) for number in range(len(windows))]
    for a, b in _overlapping(windows):
        is_near = intersection(boxes[rows[a]][:, None], boxes[rows[b]][None]) > 0
        for i, j in zip(*np.nonzero(is_near), strict=True):
            yield int(rows[a][i]), int(rows[b][j])


def _overlapping(windows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs of tiles that have pixels in common."""
    for a, window in enumerate(windows):
        for b in a + 1 + np.flatnonzero(intersection(window, windows[a + 1 :]) > 0):
            yield a, int(b)


def _reaches_beyond(box: np.ndarray, window: np.ndarray) -> bool:
    return bool((box[:2] < window[:2] - 1).any() or (box[2:] > window[2:] + 1).any())


def _covered(found: Instances, piece: int, whole: int) -> float:
    """Return the share of a piece that lies in the mask of another detection."""
    x, y = _points(found.boxes[piece])
    inside = _probabilities(found, piece, x, y) >= 0.5
    if not inside.any():  # of a piece without a mask, the share of its box
        inside[:] = True
    return (inside & (_probabilities(found, whole, x, y) >= 0.5)).sum() / inside.sum()


def _agree(found: Instances, i: int, j: int, window_i: np.ndarray, window_j: np.ndarray) -> bool:
    """Return whether two masks are alike in the area that both tiles see."""
    low = np.maximum(np.minimum(found.boxes[i, :2], found.boxes[j, :2]), np.maximum(window_i[:2], window_j[:2]))
    high = np.minimum(np.maximum(found.boxes[i, 2:], found.boxes[j, 2:]), np.minimum(window_i[2:], window_j[2:]))
    x, y = _points(np.concatenate([low, high]))
    first, second = (_probabilities(found, row, x, y) >= 0.5 for row in (i, j))
    return bool((first & second).sum() > _AGREEMENT * max((first | second).sum(), 1))


def _points(box: np.ndarray, number: int = _SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Return the x and the y [number] of the centres of so many cells of a box along each axis."""
    steps = (np.arange(number, dtype=np.float32) + 0.5) / number
    return box[0] + steps * (box[2] - box[0]), box[1] + steps * (box[3] - box[1])


def _probabilities(found: Instances, row: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate a mask at points, [len(y), len(x)]; it is zero outside its box."""
    box, mask = found.boxes[row], found.masks[row]
    weights = []
    for points, low, high in ((y, box[1], box[3]), (x, box[0], box[2])):
        cells = (points - low) / max(high - low, 1e-6) * len(mask) - 0.5
        weights.append(np.maximum(1 - np.abs(cells[:, None] - np.arange(len(mask), dtype=np.float32)), 0))
    return weights[0] @ mask @ weights[1].T


def _join(found: _Found, pairs: list[tuple[int, int]], stays: np.ndarray) -> _Found:
    """Return the detections that stay, with joint objects in place of their parts."""
    group = np.arange(len(stays))
    for i, j in pairs:
        group[group == group[j]] = group[i]
    joint = np.flatnonzero(np.bincount(group[stays], minlength=len(group)) > 1)
    alone = stays & ~np.isin(group, joint)
    objects = [_joint(found.instances, np.flatnonzero(stays & (group == number))) for number in joint]
    kept = Instances(*(values[alone] for values in found.instances))
    instances = Instances(*(np.concatenate(values) for values in zip(kept, *objects, strict=True)))
    return _Found(
        instances,
        np.concatenate([found.tile[alone], np.full(len(joint), -1)]),
        np.concatenate([found.is_cut[alone], np.zeros(len(joint), bool)]),
    )


def _joint(found: Instances, rows: np.ndarray) -> Instances:
    """Make one detection of the parts of an object. Its mask has as many cells as any other."""
    low, high = found.boxes[rows, :2].min(axis=0), found.boxes[rows, 2:].max(axis=0)
    box = np.concatenate([low, high])
    x, y = _points(box, found.masks.shape[-1])
    mask = np.max([_probabilities(found, row, x, y) for row in rows], axis=0).astype(np.float32)
    best = rows[[np.argmax(found.scores[rows])]]
    return Instances(box[None], found.scores[best], found.labels[best], mask[None])
