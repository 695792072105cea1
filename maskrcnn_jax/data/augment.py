"""Moves an image and its objects together: mirrored, turned, resized, rotated and cropped by one affine map.

The map is drawn first. The image follows it by resizing and cropping, and each mask by one nearest-neighbour warp into
the pixels of the network input. Boxes are those of the masks that are left. Only training moves images.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from maskrcnn_jax.data import transforms
from maskrcnn_jax.data.coco import CocoDataset, ImageAnnotations
from maskrcnn_jax.data.run_lengths import Crop, cut_out
from maskrcnn_jax.options import DataOptions

# Zero after normalisation, as the padding is: ImageNet's mean colour, and the middle of other channels.
FILL = (124, 116, 104, 128)


class Placement(NamedTuple):
    """Where the pixels of an image go. The steps are taken in the order of the fields."""

    image_size: tuple[int, int]  # (height, width) of the image file
    hflip: bool
    vflip: bool
    quarter_turns: int  # counter-clockwise
    size: tuple[int, int]  # (height, width) that the turned image is resized to
    angle: float  # degrees counter-clockwise, about the centre of the resized image
    window: tuple[int, int, int, int]  # y, x, height, width: the part of the resized image that is kept

    @property
    def rotation(self) -> np.ndarray:
        """The last two steps as a [3, 3] float64 matrix: from x, y, 1 of the resized image to those of the window."""
        center_y, center_x = self.size[0] / 2, self.size[1] / 2
        cos, sin = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        y, x, *_ = self.window
        return _shift(center_x - x, center_y - y) @ turn @ _shift(-center_x, -center_y)

    @property
    def matrix(self) -> np.ndarray:
        """All steps as a [3, 3] float64 matrix: from pixels x, y, 1 of the image file to those of the network input.

        Pixel i reaches from i to i + 1.
        """
        height, width = self.image_size
        matrix = np.eye(3)
        if self.hflip:
            matrix = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])
        if self.vflip:
            matrix = np.array([[1.0, 0, 0], [0, -1, height], [0, 0, 1]]) @ matrix
        for _ in range(self.quarter_turns):
            matrix = np.array([[0.0, 1, 0], [-1, 0, width], [0, 0, 1]]) @ matrix
            height, width = width, height
        return self.rotation @ np.diag([self.size[1] / width, self.size[0] / height, 1]) @ matrix


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def moves_images(options: DataOptions) -> bool:
    """Return whether training does more to images than resizing and mirroring them left to right."""
    return bool(options.vflip or options.rotate90 or options.rotation or options.crop_size or options.copy_paste)


def unaugmented(options: DataOptions) -> DataOptions:
    """Return the options as evaluation takes them."""
    return dataclasses.replace(
        options,
        short_sides=(),
        hflip=0.0,
        vflip=0.0,
        rotate90=0.0,
        rotation=0.0,
        crop_size=0,
        scale_jitter=(),
        copy_paste=0.0,
        color_jitter=0.0,
        repeat_threshold=0.0,
    )


def draw_short_side(options: DataOptions, rng: np.random.Generator) -> int:
    """Draw the shorter side of an image after resizing; nothing is drawn if there is but one."""
    return int(rng.choice(options.short_sides)) if options.short_sides else options.short_side


def draw_placement(
    image_size: tuple[int, int], options: DataOptions, canvas: tuple[int, int], rng: np.random.Generator
) -> Placement:
    """Draw what happens to an image.

    Args:
        image_size: (height, width) of the image file.
        options: which transforms, and how likely they are.
        canvas: (height, width) that the result must fit into: of the crop, or of the padded batch.
        rng: consumed.

    Source: torchvision's ScaleJitter and FixedSizeCrop, detectron2's ResizeScale and FixedSizeCrop. Both draw one
    number for the place of the crop along both axes, so that crops lie on a diagonal; here there is one for each.
    """
    hflip, vflip = rng.random() < options.hflip, rng.random() < options.vflip
    turns = int(rng.integers(1, 4)) if rng.random() < options.rotate90 else 0
    height, width = image_size[::-1] if turns % 2 else image_size
    if options.scale_jitter:
        scale = min(canvas[0] / height, canvas[1] / width) * rng.uniform(
            options.scale_jitter[0], options.scale_jitter[1]
        )
        rounding = 0.5 if options.resize == "pillow" else 0  # detectron2 rounds, torchvision floors
        size = max(int(height * scale + rounding), 1), max(int(width * scale + rounding), 1)
    else:
        short_side = draw_short_side(options, rng)
        size = transforms.resized_size(height, width, short_side, options.long_side, options.resize)
        if not options.crop_size:  # an image that lies after a turn may not fit the padded size of its batch
            fit = min(1, canvas[0] / size[0], canvas[1] / size[1])
            size = max(int(size[0] * fit), 1), max(int(size[1] * fit), 1)
    angle = rng.uniform(-options.rotation, options.rotation) if options.rotation else 0.0
    kept = min(size[0], canvas[0]), min(size[1], canvas[1])
    y, x = (int(rng.integers(whole - part + 1)) for whole, part in zip(size, kept, strict=True))
    return Placement(image_size, bool(hflip), bool(vflip), turns, size, float(angle), (y, x, *kept))


def move_image(image: np.ndarray, placement: Placement, resize: str, *, smooth: bool) -> np.ndarray:
    """Move the pixels of an image.

    Args:
        image: [h, w, I] uint8.
        placement: where to.
        resize: one of ``transforms.RESIZE``.
        smooth: average the pixels that fall into one when the image shrinks, as torchvision (antialias) and Pillow do.
            Without, a tenth of the size would show every tenth pixel.

    Returns:
        [height, width, I] of the placement's window; ``FILL`` where a rotation leaves corners.
    """
    image = image[:: -1 if placement.vflip else 1, :: -1 if placement.hflip else 1]
    image = np.ascontiguousarray(np.rot90(image, placement.quarter_turns))
    height, width = placement.size
    if smooth and resize != "pillow" and height < image.shape[0] and width < image.shape[1]:
        image = image.astype(transforms.RESIZE[resize], copy=False)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    else:
        image = transforms.resize_image(image, placement.size, resize)
    y, x, height, width = placement.window
    if not placement.angle:
        return image[y : y + height, x : x + width]
    return cv2.warpAffine(
        *(image, _between_centres(placement.rotation), (width, height)),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )


def move_mask(crop: Crop, matrix: np.ndarray, size: tuple[int, int]) -> Crop:
    """Move a mask; each pixel shows what its centre shows.

    Args:
        crop: the mask in its own box, in pixels of the image file.
        matrix: [3, 3] of a placement.
        size: (height, width) of the placement's window; what is outside is cut off.

    Returns:
        The mask in its own box, in pixels of the network input; empty if nothing is left of it.
    """
    height, width = crop.mask.shape
    box = np.array([[crop.x, crop.y, crop.x + width, crop.y + height]], np.float32)
    (x1, y1, x2, y2) = move_boxes(box, matrix, size)[0].tolist()
    left, top, right, bottom = int(x1), int(y1), int(np.ceil(x2)), int(np.ceil(y2))
    if height == 0 or right <= left or bottom <= top:
        return cut_out(np.zeros((0, 0), np.uint8))
    local = _shift(-left, -top) @ matrix @ _shift(crop.x, crop.y)
    mask = cv2.warpAffine(
        *(np.ascontiguousarray(crop.mask), _between_centres(local), (right - left, bottom - top)),
        flags=cv2.INTER_NEAREST,
    )
    mask, y, x = cut_out(mask)
    return Crop(mask, y + top, x + left)


def _between_centres(matrix: np.ndarray) -> np.ndarray:
    """Return the [2, 3] matrix that OpenCV takes, whose pixel i is centred at i."""
    return (_shift(-0.5, -0.5) @ matrix @ _shift(0.5, 0.5))[:2]


def move_boxes(boxes: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the boxes [n, 4] float32 around the moved corners of boxes, clipped to (height, width)."""
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]  # [n, 4, 2]
    corners = corners @ matrix[:2, :2].T + matrix[:2, 2]
    around = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return np.clip(around, 0, np.tile(size[::-1], 2)).astype(np.float32)


class Layer(NamedTuple):
    """An image of the dataset at its new place, and those of its objects that may be visible there."""

    row: int  # of the image in its dataset
    placement: Placement
    places: np.ndarray  # [n] int64, of the objects in ``annotations``
    objects: ImageAnnotations  # the n objects; boxes clipped to the window, in pixels of the network input

    def choose(self, chosen: np.ndarray) -> "Layer":
        """Return the layer with some of its objects."""
        objects = ImageAnnotations(*(column[chosen] for column in self.objects))
        return self._replace(places=self.places[chosen], objects=objects)

    def image(self, index: CocoDataset, options: DataOptions, channels: int, rng: np.random.Generator) -> np.ndarray:
        """Read the image and move it, [height, width, channels] of the window."""
        image = index.read_image(self.row, channels)
        if options.color_jitter:
            image = transforms.color_jitter(image, options.color_jitter, rng)
        return move_image(image, self.placement, options.resize, smooth=bool(options.scale_jitter))

    def crops(self, index: CocoDataset, with_crowd: bool) -> Iterator[Crop | None]:
        """Yield the moved mask of each object, one at a time; None for an object without a mask."""
        matrix, (_, _, height, width) = self.placement.matrix, self.placement.window
        for crop in index.crops(self.row, self.places, with_crowd):
            yield crop and move_mask(crop, matrix, (height, width))


def draw_layer(
    index: CocoDataset,
    row: int,
    options: DataOptions,
    canvas: tuple[int, int],
    max_objects: int,
    rng: np.random.Generator,
) -> Layer:
    """Draw the place of an image. If more than ``max_objects`` objects are visible, draw as many of them."""
    height, width = index.sizes[row].tolist()
    placement = draw_placement((height, width), options, canvas, rng)
    objects = index.annotations(row, options.ignore_regions)
    objects = objects._replace(boxes=move_boxes(objects.boxes, placement.matrix, placement.window[2:]))
    layer = Layer(row, placement, np.arange(len(objects.ids)), objects)
    seen = np.flatnonzero((objects.boxes[:, 2:] > objects.boxes[:, :2]).all(axis=1))
    if len(seen) > max_objects:
        seen = np.sort(rng.choice(seen, max_objects, replace=False))
    return layer.choose(seen)
