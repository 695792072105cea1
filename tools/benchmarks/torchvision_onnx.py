"""torchvision's Mask R-CNN as ONNX, by torch's exporter: from normalised images to masks inside their boxes.

Without resizing and pasting: OpenVINO cannot convert the loop that pastes masks, and ours leaves both out, too.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from tools import torchvision_reference


class _Core(torch.nn.Module):
    """The model between its transforms."""

    def __init__(self, model: torch.nn.Module, image_sizes: list[tuple[int, int]]):
        super().__init__()
        self.model, self.image_sizes = model, image_sizes

    def forward(self, pixels):
        from torchvision.models.detection.image_list import ImageList

        features = self.model.backbone(pixels)
        proposals, _ = self.model.rpn(ImageList(pixels, self.image_sizes), features)
        (found,), _ = self.model.roi_heads(features, proposals, self.image_sizes)
        return tuple(found[name] for name in ("boxes", "scores", "labels", "masks"))


def export_torchvision(model: torch.nn.Module, inputs, path: Path) -> None:
    """Write a model in evaluation mode as ONNX, for one image of one size.

    Args:
        model: torchvision's.
        inputs: ``ImageList`` of one image.
        path: Of the file.
    """
    torchvision_reference.import_torchvision()
    core = _Core(model.float(), inputs.image_sizes).eval()
    pixels = inputs.tensors.contiguous()
    with _stand_ins_known_by_name(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that become constants, as here they shall, and of a newer exporter
        torch.onnx.export(core, (pixels,), str(path), opset_version=17, dynamo=False, input_names=["pixels"])


@contextlib.contextmanager
def _stand_ins_known_by_name() -> Iterator[None]:
    """Make the operators known by their names where torchvision's compiled ones are missing.

    Only for the export: called by name, RoIAlign has no gradient.
    """
    if not torchvision_reference.uses_stand_ins():
        yield
        return
    torchvision_reference.declare_roi_align()
    boxes, roi_align = (sys.modules[f"torchvision.ops.{name}"] for name in ("boxes", "roi_align"))
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in (
            (boxes, "_assert_has_ops", _do_nothing),
            (roi_align, "_assert_has_ops", _do_nothing),
            (roi_align, "_has_ops", _say_yes),
        ):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, stand_in)
        yield


# Functions with a source file, which torch compiles to a script.
def _do_nothing() -> None:
    return None


def _say_yes() -> bool:
    return True
