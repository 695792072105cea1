"""The arrays that flow between the stages: shapes, units and what padding holds.

Letters: B images in a batch, I channels of an image, G ground-truth objects, A anchors, N proposals, R RoIs that the
box head sees, F foreground RoIs that the mask head sees, D detections, C classes without background, H x W the padded
network input, M the side of the square canvas that holds the mask of an object.

Conventions, everywhere: boxes are float32 ``x1, y1, x2, y2`` in absolute pixels of the padded network input with
width = x2 - x1; label 0 is background; arrays of sizes are (height, width); images are RGB, channels last, and other
channels, such as depth, follow. Whatever is padded carries ``valid``; the values in invalid rows are arbitrary and
change no output and no loss.

The classes are NamedTuples: JAX treats them as pytrees, and this module needs no import of JAX, so that data-loading
processes can use it. Their arrays are numpy.ndarray on the host and jax.Array on the device. ``*B`` is the batch axis;
under ``jax.vmap`` and in functions of one image there is none.
"""

from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int32, Real, UInt8

Array = Any  # numpy.ndarray or jax.Array


class GroundTruth(NamedTuple):
    """Annotated objects of a batch of images.

    Each mask is cut to its own box on the raster, which covers the whole image at the resolution of the image file or
    of the network input, whichever is lower. It fills the top-left corner of a canvas, bit-packed along the width,
    lowest bit first. Along an axis that is longer than the canvas it is sampled: cell c shows line
    floor((c + 0.5) * length / M). Full-size masks would fill the memory.
    """

    boxes: Float[Array, "*B G 4"]  # network-input pixels
    labels: Int32[Array, "*B G"]  # 1..C
    masks: UInt8[Array, "*B G M M//8"]  # 8 pixels per byte
    mask_windows: Int32[Array, "*B G 4"]  # y, x, height, width of each mask's box on the raster
    mask_sizes: Int32[Array, "*B 2"]  # (height, width) of the raster
    valid: Bool[Array, "*B G"]
    has_mask: Bool[Array, "*B G"] | None = None  # False for objects with a box only; None: all have a mask
    ignored: Bool[Array, "*B G"] | None = None  # regions that are neither object nor background; None: none


class Batch(NamedTuple):
    """A batch of padded images, as the loader yields it and the device receives it."""

    images: Real[Array, "B H W I"]  # uint8, or float32 in 0..255; zero right of and below the image
    sizes: Int32[Array, "B 2"]  # of the resized image inside the padding
    original_sizes: Int32[Array, "B 2"]  # of the image file
    image_index: Int32[Array, " B"]  # row of the image in its dataset index
    valid: Bool[Array, " B"]  # False for rows that fill up a batch and for skipped broken images
    gt: GroundTruth | None  # None when no annotations are wanted (evaluation, prediction)


class Proposals(NamedTuple):
    """Candidate boxes from the region proposal network, best first."""

    boxes: Float[Array, "*B N 4"]  # clipped to the image
    scores: Float[Array, "*B N"]  # objectness logits
    valid: Bool[Array, "*B N"]


class RoISamples(NamedTuple):
    """RoIs chosen for training the heads: foreground first, then background, then invalid rows."""

    boxes: Float[Array, "*B R 4"]
    labels: Int32[Array, "*B R"]  # 0 for background
    gt_index: Int32[Array, "*B R"]  # the matched object; meaningful where labels > 0
    valid: Bool[Array, "*B R"]


class Detections(NamedTuple):
    """Final detections, best first."""

    boxes: Float[Array, "*B D 4"]  # clipped to the image
    scores: Float[Array, "*B D"]  # class probability
    labels: Int32[Array, "*B D"]  # 1..C
    masks: Float[Array, "*B D S S"]  # S = 28, or 14: probability inside the box of the predicted class
    valid: Bool[Array, "*B D"]
