"""A trained model as one ONNX file, for ONNX Runtime, OpenVINO and others.

Inputs and outputs are those of the StableHLO programs: images [B, H, W, I] in RGB, padded with anything, their sizes
[B, 2] int32 (height, width) inside the padding, and their sizes before they were resized, [B, 2] int32. Outputs are
boxes [B, D, 4] in pixels of the images before they were resized, scores [B, D], labels [B, D] int32, masks
[B, D, M, M], the probabilities inside the boxes, and valid [B, D].

The metadata has two entries of JSON: "model.json" is what ``describe`` returns, "config.json" are the options.
"""

import dataclasses
import json
import os
from collections.abc import Sequence

import numpy as np

from maskrcnn_jax import __version__
from maskrcnn_jax.data.plan import buckets_for
from maskrcnn_jax.data.transforms import RESIZE
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.exporting.description import check_sizes, describe
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.writing import replace_file


def export_onnx(predictor: Predictor, path: str | os.PathLike, *, sizes: Sequence[tuple[int, ...]] = ()) -> None:
    """Write a model as ONNX.

    Args:
        predictor: As ``mr.load`` returns it.
        path: Of the file.
        sizes: (height, width) of the padded images, multiples of 32; one, or none if the file is to take images of any
            such size.

    Raises:
        UserError: if onnx is not installed, the model cannot be exported, a size is wrong, or the file cannot be
            written.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("exporting as ONNX needs the package onnx; run pip install '.[onnx]' in the clone") from None
    from maskrcnn_jax.exporting.detections import detect
    from maskrcnn_jax.exporting.graph import Graph

    sizes = check_sizes(sizes)
    if len(sizes) > 1:
        raise UserError(
            f"an ONNX file is for images of one size or of any, not of {len(sizes)}; give one size or none"
        )
    network, graph = predictor.network, Graph()
    if network.options.box_nms_method != "hard":
        raise UserError(
            f"ONNX has no soft suppression, but model.box_nms_method is {network.options.box_nms_method}; export with "
            "hard, or as StableHLO into a file that ends in .mrcnn"
        )
    network.eval()
    height_width = sizes[0] if sizes else ("height", "width")
    dtype = RESIZE[predictor.options.data.resize]
    found = detect(
        network,
        graph.input("images", dtype, ("batch", *height_width, predictor.options.model.in_channels)),
        graph.input("sizes", np.int32, ("batch", 2)),
        graph.input("original_sizes", np.int32, ("batch", 2)),
    )
    rows = "batch", "detections"
    graph.output("boxes", found.boxes, np.float32, (*rows, 4))
    graph.output("scores", found.scores, np.float32, rows)
    graph.output("labels", found.labels, np.int32, rows)
    graph.output("masks", found.masks, np.float32, (*rows, network.mask_size, network.mask_size))
    graph.output("valid", found.valid, np.bool_, rows)
    about = describe(predictor, sizes or buckets_for(predictor.options.data)) | {
        "any_size": not sizes,
        "version": __version__,
    }
    model = graph.model(
        {"model.json": json.dumps(about), "config.json": json.dumps(dataclasses.asdict(predictor.options))}
    )
    onnx.checker.check_model(model)
    replace_file(path, model.SerializeToString())
