"""Mask R-CNN in JAX and Flax: models in a few lines of Python, and their operations by themselves.

    import maskrcnn_jax as mr

    model = mr.load("runs/mine")
    detections = model.predict("photo.jpg")

``mr.ops`` has boxes, anchors, non-maximum suppression, RoIAlign and so on as functions of arrays.

Every name is imported when it is first used, so that settings of JAX can still be made after this import.
"""

import importlib

_MODULES = {
    "load": "api",
    "Predictor": "evaluation.predictor",
    "ImageDetections": "evaluation.predictor",
    "export_model": "export",
    "MaskRCNN": "models.mask_rcnn",
    "UserError": "errors",
}
__all__ = [*_MODULES, "ops"]


def __getattr__(name: str):
    if name == "ops":
        return importlib.import_module("maskrcnn_jax.ops")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"maskrcnn_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
