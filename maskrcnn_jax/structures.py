"""The arrays that flow between the stages: shapes, units and what padding holds.

Letters: B images in a batch, I channels of an image, G ground-truth objects, A anchors, N proposals, R RoIs that the
box head sees, F foreground RoIs that the mask head sees, D detections, C classes without background, H x W the padded
network input, M the side of the square canvas that holds ground-truth masks.

Conventions, everywhere: boxes are float32 ``x1, y1, x2, y2`` in absolute pixels of the padded network input with
width = x2 - x1; label 0 is background; arrays of sizes are (height, width); images are RGB, channels last, and what
there is beside RGB, such as depth, comes after it. Whatever is padded carries ``valid``; the values in invalid rows
mean nothing and change no output and no loss.

The classes are NamedTuples: JAX treats them as pytrees, and this module needs no import of JAX, so that data-loading
processes can use it.
"""

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray on the host, jax.Array on the device


class GroundTruth(NamedTuple):
    """Annotated objects of a batch of images.

    Masks stay at the resolution of the annotated image (or are reduced to fit the canvas), bit-packed along the
    width, lowest bit first, because a full-size mask per object is what fills memory in a naive loader.
    """

    boxes: Array  # [B, G, 4] float32, network-input pixels
    labels: Array  # [B, G] int32, 1..C
    masks: Array  # [B, G, M, M / 8] uint8, 8 pixels a byte; the raster fills the top-left corner of the canvas
    mask_sizes: Array  # [B, 2] int32, (height, width) of the raster on the canvas; it covers the whole image
    valid: Array  # [B, G] bool
    has_mask: Array | None = None  # [B, G] bool, False for objects of which only the box is known; None: all have one
    ignored: Array | None = None  # [B, G] bool, boxes of regions that are neither object nor background; None: none


class Batch(NamedTuple):
    """A batch of padded images, as the loader yields it and the device receives it."""

    images: Array  # [B, H, W, I] uint8, or float32 in 0..255; zero right of and below the image
    sizes: Array  # [B, 2] int32, size of the resized image inside the padding
    original_sizes: Array  # [B, 2] int32, size of the image file
    image_index: Array  # [B] int32, row of the image in its dataset index
    valid: Array  # [B] bool, False for rows that only fill up a batch and for skipped broken images
    gt: GroundTruth | None  # None when no annotations are wanted (evaluation, prediction)


class Proposals(NamedTuple):
    """Candidate boxes from the region proposal network, best first."""

    boxes: Array  # [B, N, 4] float32, clipped to the image
    scores: Array  # [B, N] float32, objectness logits
    valid: Array  # [B, N] bool


class RoISamples(NamedTuple):
    """RoIs chosen for training the heads: foreground first, then background, then invalid rows."""

    boxes: Array  # [B, R, 4] float32
    labels: Array  # [B, R] int32, 0 for background
    gt_index: Array  # [B, R] int32, the matched object; meaningful where labels > 0
    valid: Array  # [B, R] bool


class Detections(NamedTuple):
    """Final detections, best first."""

    boxes: Array  # [B, D, 4] float32, clipped to the image
    scores: Array  # [B, D] float32, class probability
    labels: Array  # [B, D] int32, 1..C
    masks: Array  # [B, D, 28, 28] float32, probability inside the box of the predicted class
    valid: Array  # [B, D] bool
