"""A trained model as one file that runs without this package: StableHLO programs, weights and what labels mean.

The file is what ``numpy.load`` reads, a zip without pickles, and holds

- ``model.json``: how images are prepared and what comes out, see ``describe``;
- ``weights/0.npy``, ``weights/1.npy``, ...: arrays that every program takes, in this order;
- ``800x1088.stablehlo`` and so on: for each padded size of images a program that ``jax.export.deserialize`` reads, for
  any number of images and for CPUs, GPUs and TPUs. The weights lie beside the programs, since they share them;
- ``1x800x1088.stablehlo`` and so on: the same for one image. It is faster on CPUs, because some forms of convolutions
  need to know the number of images.

A program is called with the list of weights, images [B, H, W, I] in RGB, padded with anything, their sizes [B, 2]
int32 (height, width) inside the padding, and their sizes before they were resized, [B, 2] int32. It returns a dict:
boxes [B, D, 4] in pixels of the images before they were resized, scores [B, D], labels [B, D], masks [B, D, M, M], the
probabilities inside the boxes, and valid [B, D], False in rows that hold nothing.
"""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from maskrcnn_jax.data.plan import buckets_for
from maskrcnn_jax.data.transforms import RESIZE
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.exporting.description import check_sizes, describe
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.structures import Detections
from maskrcnn_jax.writing import replace_file

FORMAT = 2
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Smaller arrays stay as they are: they are biases and statistics, and all of them together are small.
_MIN_QUANTIZED = 1024


class Int8(NamedTuple):
    """An array in eight bits: values * scale, with a scale for each index of the last axis, the output channels."""

    values: np.ndarray  # [..., K] int8
    scale: np.ndarray  # [1, ..., K] float32


def quantize(array: np.ndarray) -> np.ndarray | Int8:
    """Round a weight to 255 levels per output channel; arrays of one axis or few values are returned as they are.

    Args:
        array: [..., K] floating.
    """
    if array.ndim < 2 or array.size < _MIN_QUANTIZED or not np.issubdtype(array.dtype, np.floating):
        return array
    largest = np.abs(array).max(axis=tuple(range(array.ndim - 1)), keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return Int8(np.rint(array / scale).astype(np.int8), scale)


def dequantize(array):
    """Return what ``quantize`` was given, as nearly as eight bits tell."""
    return array.values.astype(jnp.float32) * array.scale if isinstance(array, Int8) else array


def quantized_network(network: MaskRCNN) -> MaskRCNN:
    """Return a copy of a network that computes what its export with ``int8`` does."""
    graphdef, state = nnx.split(network)
    return nnx.merge(graphdef, jax.tree.map(lambda array: jnp.asarray(dequantize(quantize(np.asarray(array)))), state))


def export_model(
    predictor: Predictor,
    path: str | os.PathLike,
    *,
    sizes: Sequence[tuple[int, ...]] = (),
    int8: bool = False,
) -> None:
    """Write a model into one file.

    Args:
        predictor: As ``mr.load`` returns it.
        path: Of the file.
        sizes: (height, width) of the padded images, multiples of 32. Defaults to those of the config.
        int8: Store the weights in eight bits, a quarter of the size. The program computes in the model's dtype.

    Raises:
        UserError: if there are no sizes or wrong ones, or the file cannot be written.
    """
    sizes = check_sizes(sizes) or buckets_for(predictor.options.data)
    if not sizes:
        raise UserError("with data.buckets=exact every image has a size of its own; give the sizes to export")
    predictor.network.eval()
    graphdef, state = nnx.split(predictor.network)
    state = jax.tree.map(np.asarray, state)
    if int8:
        state = jax.tree.map(quantize, state)
    weights, structure = jax.tree.flatten(state)

    def detect(weights, images, sizes, original_sizes):
        state = jax.tree.unflatten(structure, weights)
        state = jax.tree.map(dequantize, state, is_leaf=lambda leaf: isinstance(leaf, Int8))
        return _in_original_pixels(nnx.merge(graphdef, state).detect(images, sizes), sizes, original_sizes)

    about = describe(predictor, sizes) | {
        "format": FORMAT,
        "jax": jax.__version__,
        "platforms": list(PLATFORMS),
        "num_weights": len(weights),
        "int8": int8,
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("model.json", json.dumps(about, indent=1))
        for i, array in enumerate(weights):
            with file.open(f"weights/{i}.npy", "w") as entry:
                np.save(entry, array, allow_pickle=False)
        (any_number,) = jax.export.symbolic_shape("batch", constraints=["batch >= 1"])
        channels, dtype = predictor.options.model.in_channels, RESIZE[predictor.options.data.resize]
        for height, width in sizes:
            for name, batch in ((f"{height}x{width}", any_number), (f"1x{height}x{width}", 1)):
                program = _program(detect, weights, (batch, height, width, channels), dtype)
                file.writestr(f"{name}.stablehlo", program)
    replace_file(path, content.getvalue())


def _in_original_pixels(detections: Detections, sizes: jax.Array, original_sizes: jax.Array) -> dict:
    """Scale the boxes as inference.results.unpad does on the host."""
    original = original_sizes.astype(jnp.float32)
    ratios = original / jnp.maximum(sizes.astype(jnp.float32), 1)
    boxes = detections.boxes.astype(jnp.float32) * jnp.tile(ratios[:, ::-1], 2)[:, None]
    limits = jnp.tile(original[:, ::-1], 2)[:, None]
    return {**detections._asdict(), "boxes": jnp.clip(boxes, 0, limits)}


def _program(detect, weights: list[np.ndarray], shape: tuple, dtype: DTypeLike) -> bytes:
    """Trace the program for images of a shape [B, H, W, I], in which B may be a symbol."""
    struct = jax.ShapeDtypeStruct
    exported = jax.export.export(jax.jit(detect), platforms=PLATFORMS)(
        [struct(array.shape, array.dtype) for array in weights],
        struct(shape, dtype),
        struct((shape[0], 2), jnp.int32),
        struct((shape[0], 2), jnp.int32),
    )
    return bytes(exported.serialize())
