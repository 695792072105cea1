"""Mask R-CNN in JAX and Flax NNX: train, evaluate and predict in a few lines of Python.

    import maskrcnn_jax as mr

    config = mr.load_config("r50_fpn")
    config.data.coco_dir = "COCO"
    mr.train(config, "runs/r50")
    model = mr.load("runs/r50")
    detections = model.predict("photo.jpg")
    print(mr.evaluate(model).metrics["segm_AP"])

``mr.ops`` has boxes, anchors, non-maximum suppression, RoIAlign and others as functions of arrays.

Names are imported when they are first used. Variables that JAX reads, such as ``JAX_PLATFORMS``, can therefore still
be set after this import.
"""

import importlib

__version__ = "0.2.0"

_MODULES = {
    "load": "api",
    "train": "api",
    "evaluate": "api",
    "default_config": "config",
    "load_config": "config",
    "Options": "options",
    "MaskRCNN": "models.mask_rcnn",
    "ModelOptions": "options",
    "Predictor": "inference.predictor",
    "ImageDetections": "inference.detections",
    "export_model": "inference.export",
    "UserError": "errors",
}
__all__ = ["__version__", *_MODULES, "ops", "options"]


def __getattr__(name: str):
    if name in ("ops", "options"):
        return importlib.import_module(f"maskrcnn_jax.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"maskrcnn_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
