"""Exported models in runtimes for CPUs, beside our model in JAX and torchvision's own export in the same runtimes."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.exporting.onnx_file import export_onnx
from maskrcnn_jax.inference.detect import make_detect
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.inference.runtimes import OnnxDetect, has_bfloat16, import_openvino
from maskrcnn_jax.ops.precision import bfloat16_is_faster
from maskrcnn_jax.options import Options
from tools.benchmarks.inputs import Settings, make_model, pad_images, read_photos
from tools.benchmarks.timing import Row, Spread, measure

JAX, JAX_BF16, AUTOCAST = "JAX, float32", "JAX, bf16", "torch autocast, bf16"
SAME_PIXELS, SAME_SCORE, SAME_SHARE = 0.05, 1e-3, 0.98


def runtimes() -> dict[str, tuple[str, bool]]:
    """Return the name of each row, its runtime, and whether it computes in bfloat16, if this processor can."""
    half = {"OpenVINO, bf16": ("openvino", True)} if has_bfloat16() else {}
    return {"OpenVINO, float32": ("openvino", False), **half, "ONNX Runtime, float32": ("onnxruntime", False)}


def run(settings: Settings) -> list[Row]:
    """Measure at 800x1088 with as many detections as the model allows, all contenders in turns."""
    settings = settings.having(height=800, width=1066, rounds=7, dtype="float32", batch_size=1)
    photos = read_photos(settings, 1) * settings.batch_size
    images, sizes = pad_images(photos)
    arrays, torch_model = None, None
    if settings.against:
        from tools.benchmarks import reference

        torch_model, arrays = reference.make_reference(settings, photos)
    threshold = 0.05 if settings.against else 0.0
    model = make_model(settings, arrays, box_score_thresh=threshold)
    detect = make_detect(model)
    with tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, Callable] = {JAX: lambda: detect(images, sizes)}
        if bfloat16_is_faster():
            half = make_model(dataclasses.replace(settings, dtype="bfloat16"), arrays, box_score_thresh=threshold)
            contenders[JAX_BF16] = functools.partial(make_detect(half), images, sizes)
        contenders |= _ours(model, images, sizes, Path(folder) / "ours.onnx", settings)
        if torch_model is not None:
            torch_model.roi_heads.score_thresh = threshold
            contenders |= _theirs(torch_model, images, sizes, Path(folder) / "theirs.onnx")
        times = measure(contenders, settings.rounds)
    number = int(np.asarray(detect(images, sizes).valid).sum(axis=1).max())
    return _rows(times, settings.describe() | {"detections": number, "rounds": settings.rounds})


def _rows(times: dict[str, Spread], said: dict) -> list[Row]:
    """Return a row for each runtime, and for OpenVINO and JAX in bf16 beside what needs no runtime."""
    rows = []
    for name in runtimes():
        theirs = times.get(_of_torchvision(name))
        rows.append(Row(f"export, {name}", times[name], theirs, theirs and "torchvision's export", settings=said))
    alone = [f"export, {name}" for name, (runtime, _) in runtimes().items() if runtime == "openvino"] + [JAX_BF16]
    for title in alone:
        name = title.removeprefix("export, ")
        for other in (JAX, AUTOCAST):
            if name in times and other in times:
                rows.append(Row(f"{title}, beside {other}", times[name], times[other], other, settings=said))
    return rows


def _of_torchvision(name: str) -> str:
    return f"torchvision, {name}"


def _ours(model, images: np.ndarray, sizes: np.ndarray, path: Path, settings: Settings) -> dict[str, Callable]:
    """Export our model and return a call of it in every runtime; in float32 it must find what the model finds."""
    predictor = Predictor(model, Categories.coco(), Options(model=model.options))
    export_onnx(predictor, path, sizes=[images.shape[1:3]])
    images = images.astype(np.uint8)
    wanted = predictor.detect(images, sizes)
    calls = {}
    for name, (runtime, bf16) in runtimes().items():
        detect = OnnxDetect(path, runtime, bf16=bf16)
        share = _same_share(detect(images, sizes), wanted)
        if share < SAME_SHARE and not bf16:
            raise UserError(f"{name} finds only {share:.0%} of what the model finds in JAX")
        calls[name] = functools.partial(detect, images, sizes)
    return calls


def _same_share(found, wanted) -> float:
    """Return the share of the wanted detections that were found, in any order."""
    valid, same = np.asarray(wanted.valid), []
    for i in range(len(valid)):
        theirs = (np.asarray(rows[i])[valid[i]] for rows in (wanted.boxes, wanted.scores, wanted.labels))
        for box, score, label in zip(*theirs, strict=True):
            near = np.abs(found.boxes[i] - box).max(axis=1) < SAME_PIXELS
            near &= (np.abs(found.scores[i] - score) < SAME_SCORE) & (found.labels[i] == label) & found.valid[i]
            same.append(near.any())
    return float(np.mean(same)) if same else 1.0


def _theirs(torch_model, images: np.ndarray, sizes: np.ndarray, path: Path) -> dict[str, Callable]:
    """Export torchvision's model; return a call of it in every runtime, and one of it in torch with autocast."""
    import torch

    from tools.benchmarks import reference
    from tools.benchmarks.torchvision_onnx import export_torchvision

    variant = reference.Variant("", torch_model.eval(), torch.channels_last, autocast=True)
    inputs = reference.image_list(images, sizes, variant)
    export_torchvision(torch_model, inputs, path)
    pixels = np.ascontiguousarray(inputs.tensors.numpy())
    calls: dict[str, Callable] = {
        _of_torchvision(name): functools.partial(_start(path, runtime, bf16), pixels)
        for name, (runtime, bf16) in runtimes().items()
    }
    moved = variant._replace(model=torch_model.to(memory_format=torch.channels_last))
    return calls | {AUTOCAST: functools.partial(reference.detect, moved, inputs)}


def _start(path: Path, runtime: str, bf16: bool) -> Callable:
    """Return a function of normalised images [B, 3, H, W] that runs torchvision's export."""
    if runtime == "openvino":
        core = import_openvino().Core()
        hint = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
        return core.compile_model(core.read_model(path), "CPU", hint).create_infer_request().infer
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {session.get_inputs()[0].name: pixels})
