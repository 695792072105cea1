"""Suppression as ONNX keeps in both runtimes what the model keeps."""

import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.exporting.boxes import suppress
from maskrcnn_jax.exporting.graph import Graph
from maskrcnn_jax.inference.runtimes import import_openvino
from maskrcnn_jax.ops.nms import nms

BOXES = np.float32([[0, 0, 2, 1], [0, 0, 1, 1], [5, 5, 6, 6], [5, 5, 6, 6]])  # IoU of the first two: 1/2 exactly
SCORES = np.float32([0.9, 0.8, 0.7, 0.6])


def run(content: bytes, runtime: str, inputs: dict) -> np.ndarray:
    if runtime == "onnxruntime":
        import onnxruntime

        (found,) = onnxruntime.InferenceSession(content).run(None, inputs)
        return found
    core = import_openvino().Core()
    return core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)[0]


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.0, [1, 0, 1, 0]), (0.4999, [1, 0, 1, 0]), (0.5, [1, 1, 1, 0]), (0.9, [1, 1, 1, 0])],
)
def test_boxes_whose_overlap_is_the_threshold_stay(runtime, threshold, expected):
    graph = Graph()
    boxes = graph.input("boxes", np.float32, (1, "number", 4))
    scores = graph.input("scores", np.float32, (1, 1, "number"))
    limits = {"most": 10, "score_threshold": 0.0, "iou_threshold": threshold}
    graph.output("kept", suppress(boxes, scores, scores, 0.0, **limits), np.float32, (1, 1, "number"))
    kept = run(graph.model({}).SerializeToString(), runtime, {"boxes": BOXES[None], "scores": SCORES[None, None]})
    assert (kept.ravel() > 0).tolist() == [bool(number) for number in expected]
    assert (
        np.asarray(nms(jnp.asarray(BOXES), jnp.asarray(SCORES > 0), iou_threshold=threshold)).tolist()
        == (kept.ravel() > 0).tolist()
    )
