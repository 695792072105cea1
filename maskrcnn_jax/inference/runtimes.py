"""Predictions by an exported ONNX file, in OpenVINO or ONNX Runtime instead of JAX."""

import importlib
import importlib.util
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from maskrcnn_jax.config import to_options
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.paths import local_path
from maskrcnn_jax.structures import Detections

_log = logging.getLogger(__name__)
RUNTIMES = ("openvino", "onnxruntime")  # by their speed on CPUs
_TIMED_CALLS = 7
_EXTRAS = {"openvino": "openvino", "onnxruntime": "onnx"}
_METADATA = ("model.json", "config.json")
_NAMES = ("boxes", "scores", "labels", "masks", "valid")


class _Program(NamedTuple):
    """A file in a runtime."""

    run: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
    size: tuple[int, int] | None  # (height, width) of the images; None for any
    metadata: Mapping[str, str]


class OnnxDetect:
    """Detects with a runtime: ``detect(images [B, H, W, I], sizes [B, 2]) -> Detections`` in numpy arrays."""

    def __init__(self, path: str | os.PathLike, runtime: str | None = None, *, bf16: bool = False):
        """Load a file.

        Args:
            path: Of the file.
            runtime: One of RUNTIMES; the first that is installed if not given.
            bf16: Compute in bfloat16; with OpenVINO only.

        Raises:
            UserError: if the file cannot be read, there is no such runtime, or it cannot compute in bfloat16.
        """
        runtime = runtime or next((name for name in RUNTIMES if importlib.util.find_spec(name)), "onnxruntime")
        if runtime not in RUNTIMES:
            raise UserError(f"the runtime is {runtime!r}; use {' or '.join(RUNTIMES)}")
        if bf16 and runtime != "openvino":
            raise UserError(
                "ONNX Runtime does not compute in bfloat16; choose the runtime openvino, or leave bf16 out"
            )
        if not importlib.util.find_spec(runtime):
            raise UserError(f"{runtime} is not installed; run pip install '.[{_EXTRAS[runtime]}]' in the clone")
        local = os.fspath(local_path(path, "the exported file"))
        if not os.path.isfile(local):
            raise UserError(f"there is no file {path}; give one that maskrcnn-jax export wrote")
        self._arguments = local, runtime, bf16
        try:
            self._program = _openvino(local, bf16) if runtime == "openvino" else _onnxruntime(local)
        except UserError:
            raise
        except Exception as error:  # runtimes raise many types for damaged files
            # OpenVINO begins with the places in its source.
            lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
            reason = next(line for line in reversed(lines) if line.strip())[:200]
            raise UserError(f"{path} cannot be read by {runtime} ({reason}); export it again") from None

    @property
    def runtime(self) -> str:
        """One of RUNTIMES."""
        return self._arguments[1]

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says about itself."""
        return self._program.metadata

    def __reduce__(self) -> tuple:
        """Pickle the whole name of the file, which is loaded again where it is unpickled."""
        path, *others = self._arguments
        return _reload, (os.path.abspath(path), *others)

    def __call__(self, images: np.ndarray, sizes: np.ndarray) -> Detections:
        """Find the objects in padded images; boxes are in pixels of these, as those of the network."""
        if self._program.size is not None:
            images = pad_to(images, self._program.size)
        # The original sizes are those of the input: boxes are not scaled.
        sizes = np.asarray(sizes, np.int32)
        found = self._program.run({"images": images, "sizes": sizes, "original_sizes": sizes})
        return Detections(*(found[name] for name in _NAMES))


def load_onnx(path: str | os.PathLike, *, runtime: str | None = None, bf16: bool = False) -> Predictor:
    """Load an exported ONNX file for prediction.

    Args:
        path: Of the file.
        runtime: As for ``OnnxDetect``.
        bf16: Likewise.

    Raises:
        UserError: if the file cannot be read or is of another origin, or the runtime is missing.
    """
    detect = OnnxDetect(path, runtime, bf16=bf16)
    try:
        about = json.loads(detect.metadata[_METADATA[0]])
        options = to_options(ConfigDict(json.loads(detect.metadata[_METADATA[1]])))
        ids, names, labels = (tuple(row[key] for row in about["categories"]) for key in ("id", "name", "label"))
        categories = Categories(ids, names, labels, about["num_classes"])
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(
            f"{path} does not say what its labels mean and how images are prepared, as files of maskrcnn-jax export "
            "of this version do; export it again"
        ) from None
    return Predictor(None, categories, options, detect=detect)


def pad_to(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return images [B, H, W, I] padded to the (height, width) of an exported file.

    Raises:
        UserError: if they are larger.
    """
    height, width = images.shape[1:3]
    missing = size[0] - height, size[1] - width
    if min(missing) < 0:
        raise UserError(
            f"images padded to {height}x{width} do not fit the exported file, which is for {size[0]}x{size[1]}; "
            "export it for any size, without --sizes"
        )
    return np.pad(images, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))


def time_per_image(detect: OnnxDetect, images: np.ndarray, sizes: np.ndarray) -> float:
    """Return the seconds that an image of a batch takes: the median of a few calls after a first one."""
    seconds = []
    for _ in range(_TIMED_CALLS + 1):
        start = time.perf_counter()
        detect(images, sizes)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:])) / len(images)


def _reload(path: str, runtime: str, bf16: bool) -> OnnxDetect:
    return OnnxDetect(path, runtime, bf16=bf16)


def _check_origin(path: str, metadata: Mapping[str, str]) -> None:
    """Raise a UserError for a file that this package did not write."""
    if not metadata.keys() >= set(_METADATA):
        raise UserError(
            f"{path} is of another origin: it does not say what its labels mean and how images are prepared; give a "
            "file that maskrcnn-jax export wrote"
        )


def import_openvino() -> Any:
    """Import OpenVINO without its usage statistics.

    Importing it forks a process that sends them, which may hang beside the threads of JAX. It does not if its package
    openvino_telemetry cannot be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def has_bfloat16() -> bool:
    """Return whether OpenVINO computes in bfloat16 on this processor; where it does not, it takes float32 instead."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _openvino(path: str, bf16: bool) -> _Program:
    if bf16 and not has_bfloat16():
        _log.warning("OpenVINO does not compute in bfloat16 on this processor; it computes in float32")
    core = import_openvino().Core()
    model = core.read_model(path)
    entries = {name: ["framework", name] for name in _METADATA}
    metadata = {
        name: model.get_rt_info(entry).astype(str) for name, entry in entries.items() if model.has_rt_info(entry)
    }
    _check_origin(path, metadata)
    # Without a hint, OpenVINO takes bfloat16 wherever the processor has it.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"})
    request, dtype = compiled.create_infer_request(), compiled.input("images").get_element_type().to_dtype()

    lock = threading.Lock()  # a request works for one thread at a time

    def run(inputs):
        with lock:
            request.infer(inputs | {"images": inputs["images"].astype(dtype, copy=False)})
            return {name: np.array(request.get_tensor(name).data) for name in _NAMES}

    shape = model.input("images").get_partial_shape()
    return _Program(run, None if shape[1].is_dynamic else (shape[1].get_length(), shape[2].get_length()), metadata)


def _onnxruntime(path: str) -> _Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    _check_origin(path, metadata)
    images = next(entry for entry in session.get_inputs() if entry.name == "images")
    dtype = np.float32 if images.type == "tensor(float)" else np.uint8

    def run(inputs):
        inputs = inputs | {"images": inputs["images"].astype(dtype, copy=False)}
        return dict(zip(_NAMES, session.run(list(_NAMES), inputs), strict=True))

    size: Any = tuple(images.shape[1:3])
    return _Program(run, None if isinstance(size[0], str) else size, metadata)
