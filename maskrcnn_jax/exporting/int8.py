"""ONNX files that compute in eight bits: static quantisation by ONNX Runtime, which OpenVINO runs too.

Weights have a scale per output channel, activations the range that they have on calibration images. What gives
numbers instead of features stays float32: the last layers of the RPN, the box head and the mask head.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.exporting.network import OUTPUT_LAYER
from maskrcnn_jax.inference.runtimes import pad_to
from maskrcnn_jax.structures import Batch
from maskrcnn_jax.writing import replace_file

NUM_IMAGES = 50  # that activations are measured on


def quantize_onnx(path: str | os.PathLike, batches: Iterable[Batch]) -> None:
    """Replace an exported ONNX file by one that computes in eight bits.

    Args:
        path: Of the file, as ``export_onnx`` wrote it.
        batches: Images to measure activations on, the first NUM_IMAGES images.

    Raises:
        UserError: if onnxruntime is not installed, there is no image, the images are larger than those that the file
            is for, or the file cannot be written.
    """
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError:
        raise UserError("computing in 8 bits needs onnxruntime; run pip install '.[onnx]' in the clone") from None

    model = onnx.load(path)
    _, *sides, _ = next(entry for entry in model.graph.input if entry.name == "images").type.tensor_type.shape.dim
    height, width = (side.dim_value for side in sides)  # 0 for any

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self._inputs = _inputs(batches)

        def get_next(self) -> dict | None:
            inputs = next(self._inputs, None)
            if inputs and height:
                inputs["images"] = pad_to(inputs["images"], (height, width))
            return inputs

    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [
        node.name
        for node in model.graph.node
        if node.name.startswith(OUTPUT_LAYER) or (len(node.input) > 1 and node.input[1] not in weights)
    ]
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        quantized = Path(folder) / "quantized.onnx"
        quantization.quantize_static(
            *(model, quantized, Reader()),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=kept,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        result = onnx.load(quantized)
    onnx.helper.set_model_props(result, {entry.key: entry.value for entry in model.metadata_props})
    replace_file(path, result.SerializeToString())


def _inputs(batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
    """Yield the inputs of the model for each batch."""
    count = 0
    for batch in batches:
        rows = np.flatnonzero(batch.valid)
        if count == NUM_IMAGES:
            break
        for row in rows[: NUM_IMAGES - count]:
            count += 1
            sizes = batch.sizes[row : row + 1]
            yield {"images": batch.images[row : row + 1], "sizes": sizes, "original_sizes": sizes}
    if not count:
        raise UserError("there is no image to measure activations on; give a dataset with images")


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keep ONNX Runtime from warning that shapes were not inferred before."""

    def is_news(record: logging.LogRecord) -> bool:
        return "pre-process" not in record.getMessage()

    logging.getLogger().addFilter(is_news)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_news)
