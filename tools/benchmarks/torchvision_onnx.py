"""torchvision's Mask R-CNN as ONNX, by torch's exporter: from normalised images to masks inside their boxes.

Without resizing and pasting: OpenVINO cannot convert the loop that pastes masks, and ours leaves both out, too.
"""

import sys
import warnings
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
    _let_stand_ins_be_exported()
    core = _Core(model.float(), inputs.image_sizes).eval()
    pixels = inputs.tensors.contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that become constants, as here they shall, and of a newer exporter
        torch.onnx.export(core, (pixels,), str(path), opset_version=17, dynamo=False, input_names=["pixels"])


def _let_stand_ins_be_exported() -> None:
    """Make the operators known by their names where torchvision's compiled ones are missing."""
    if not torchvision_reference.uses_stand_ins():
        return
    sys.modules["torchvision.ops.boxes"]._assert_has_ops = _do_nothing
    module = sys.modules["torchvision.ops.roi_align"]
    module._assert_has_ops, module._has_ops = _do_nothing, _say_yes
    torchvision_reference.declare_roi_align()


# Functions with a source file, which torch compiles to a script.
def _do_nothing() -> None:
    return None


def _say_yes() -> bool:
    return True
