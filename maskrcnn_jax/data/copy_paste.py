"""Pastes objects of a second image over an image (Ghiasi et al., 2021).

Each of the two images is flipped, resized and cropped at random by itself. Edges are not blended: the paper found no
difference.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np

from maskrcnn_jax.data.augment import FILL, Layer, draw_layer
from maskrcnn_jax.data.coco import CocoDataset, ImageAnnotations
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.data.run_lengths import Crop, cut_out
from maskrcnn_jax.options import DataOptions

SHARE = 0.5  # probability that an object of the second image is pasted


class Scene(NamedTuple):
    """What training sees of an image, in pixels of the network input."""

    image: np.ndarray  # [h, w, I]
    objects: ImageAnnotations  # [n]; those that are hidden have an empty mask or, without a mask, a box of no area
    crops: Iterator[Crop | None]  # the n masks, one at a time


def draw_scene(
    index: CocoDataset,
    row: int,
    options: DataOptions,
    *,
    canvas: tuple[int, int],
    channels: int,
    max_objects: int,
    donors: np.ndarray,
    skips: Callable[[BrokenImageError], bool],
    rng: np.random.Generator,
) -> Scene:
    """Draw what training sees of an image.

    Args:
        index: the dataset.
        row: of the image.
        options: of the augmentation.
        canvas: (height, width) that the result must fit into.
        channels: of the image.
        max_objects: that the result may have.
        donors: rows of the images that objects may be pasted from.
        skips: says whether a second image that is broken is to be skipped.
        rng: consumed.

    Raises:
        BrokenImageError: the image is broken, or the second one is and is not to be skipped.
    """
    below = draw_layer(index, row, options, canvas, max_objects, rng)
    scene = Scene(
        below.image(index, options, channels, rng), below.objects, below.crops(index, options.ignore_regions)
    )
    if not rng.random() < options.copy_paste:
        return scene
    above = draw_layer(index, int(rng.choice(donors)), options, canvas, max_objects, rng)
    above = _draw_objects(above, max_objects - len(below.places), rng)
    if not len(above.places):
        return scene
    try:
        return _paste(scene, above, above.image(index, options, channels, rng), index, options, canvas)
    except BrokenImageError as error:
        if not skips(error):
            raise
        return scene


def _draw_objects(layer: Layer, room: int, rng: np.random.Generator) -> Layer:
    """Choose a random share of the objects that have masks and are no crowds, ``room`` at most."""
    drawn = rng.random(len(layer.places)) < SHARE
    wanted = np.flatnonzero(drawn & layer.objects.has_mask & ~layer.objects.crowd)
    return layer.choose(np.sort(rng.choice(wanted, room, replace=False)) if len(wanted) > room else wanted)


def _paste(
    below: Scene, above: Layer, source: np.ndarray, index: CocoDataset, options: DataOptions, canvas: tuple[int, int]
) -> Scene:
    """Paste all objects of a layer. The image grows to hold them if they lie beyond its border."""
    pasted = [crop for crop in above.crops(index, options.ignore_regions) if crop is not None]
    covered = np.zeros(canvas, bool)
    in_sight = [crop for crop in pasted if crop.mask.size]
    for crop in in_sight:
        covered[_window(crop)] |= crop.mask.view(bool)
    height, width = below.image.shape[:2]
    bottom = max([height, *(crop.y + crop.mask.shape[0] for crop in in_sight)])
    right = max([width, *(crop.x + crop.mask.shape[1] for crop in in_sight)])
    image = cv2.copyMakeBorder(below.image, 0, bottom - height, 0, right - width, cv2.BORDER_CONSTANT, value=FILL)
    for crop in in_sight:
        window = _window(crop)
        image[window] = cv2.copyTo(source[window], crop.mask, image[window])
    boxes = below.objects.boxes.copy()
    for i in np.flatnonzero(~below.objects.has_mask):
        x1, y1, x2, y2 = boxes[i]
        if covered[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))].all():
            boxes[i, 2:] = boxes[i, :2]
    columns = zip(below.objects._replace(boxes=boxes), above.objects, strict=True)
    objects = ImageAnnotations(*map(np.concatenate, columns))
    return Scene(image, objects, _all_crops(below.crops, covered, pasted))


def _all_crops(below: Iterator[Crop | None], covered: np.ndarray, pasted: list[Crop]) -> Iterator[Crop | None]:
    for crop in below:
        if crop is not None:
            mask, y, x = cut_out(crop.mask & ~covered[_window(crop)])
            crop = Crop(mask, crop.y + y, crop.x + x)
        yield crop
    yield from pasted


def _window(crop: Crop) -> tuple[slice, slice]:
    height, width = crop.mask.shape
    return np.s_[crop.y : crop.y + height, crop.x : crop.x + width]
