"""Maps names of torchvision's Mask R-CNN (both versions) and backbones, and of timm's ResNets to ours.

A model with ``head_norm="batch"`` has the names of maskrcnn_resnet50_fpn_v2, one without those of
maskrcnn_resnet50_fpn. The published weights of the first version have older names, which are translated first.
"""

import re

import numpy as np
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.convnext import ConvNeXt, Downsample
from maskrcnn_jax.models.mask_rcnn import BOX_POOL_SIZE, MaskRCNN
from maskrcnn_jax.models.mobilenet import InvertedResidual, MobileNetV3
from maskrcnn_jax.models.resnet import ResNet
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.weights.layouts import Entry, Path, flat_state, module_and_leaf, module_layout

BACKBONE = "backbone.body."
# The backbone of a detector is the part of a classifier called "features".
_FEATURES = "features."
# Options of MaskRCNN that change the detections -> the only value that torchvision implements.
_FIXED_OPTIONS = {
    "in_channels": 3,
    "stride_in_1x1": False,
    "exact_anchors": False,
    "rpn_min_size": 1e-3,
    "roi_aligned": False,
    "roi_operator": "align",
    "rpn_channels": 0,
    "mask_deconv": True,
    "cls_agnostic_bbox_reg": False,
    "classification_loss": "cross_entropy",
    "box_min_size": 1e-2,
    "box_nms_method": "hard",
    "box_nms_class_agnostic": False,
    "mask_targets_binary": False,
}
_ROWS_PER_CLASS = {"cls_score": 1, "bbox_pred": 4, "logits_kernel": 1, "logits_bias": 1}  # of the heads' predictors
# Names before torchvision 0.13 -> current names.
_RENAMED = (
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
)


def without_counterpart(options: ModelOptions) -> list[str]:
    """Return the options of a MaskRCNN that torchvision's model lacks, so that its detections would differ."""
    chosen = {name: getattr(options, name) for name in _FIXED_OPTIONS}
    return [f"{name}={value}" for name, value in chosen.items() if value != _FIXED_OPTIONS[name]]


def entries(model: MaskRCNN) -> list[Entry]:
    """Return the counterpart of every array of a model.

    Raises:
        UserError: torchvision has no such backbone.
    """
    if not isinstance(model.backbone, ResNet | MobileNetV3 | ConvNeXt):
        raise UserError(
            f"the backbone {type(model.backbone).__name__} has no counterpart in torchvision's files; use a ResNet, "
            "MobileNetV3 or ConvNeXt"
        )
    per_class = dict(_ROWS_PER_CLASS)
    if model.options.cls_agnostic_bbox_reg:
        del per_class["bbox_pred"]
    return [
        Entry(
            path,
            _key(path, model),
            module_layout(path, variable.ndim, BOX_POOL_SIZE),
            rows_per_class=0 if path[0] == "rpn" else per_class.get(str(path[1]), 0),
        )
        for path, variable in flat_state(model).items()
    ]


def backbone_entries(model: MaskRCNN) -> list[Entry]:
    """Return the counterpart of every array of a model's backbone in a classifier trained on ImageNet."""
    prefix = "" if isinstance(model.backbone, ResNet) else _FEATURES
    return [
        entry._replace(key=prefix + entry.key.removeprefix(BACKBONE))
        for entry in entries(model)
        if entry.key.startswith(BACKBONE)
    ]


def modern_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Translate the old names in the published weights of the first version to current ones.

    Raises:
        UserError: An array is there under both names.
    """
    renamed = {}
    for key, array in arrays.items():
        for old, new in _RENAMED:
            key = re.sub(f"^{old}$", new, key)
        # The mask head's convolutions counted from 1.
        key = re.sub(
            r"^roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)$",
            lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.{m[2]}",
            key,
        )
        if key in renamed:
            raise UserError(f"the weights hold {key} twice, under its old and its current name; remove the wrong one")
        renamed[key] = array
    return renamed


def _key(path: Path, model: MaskRCNN) -> str:
    module, leaf = module_and_leaf(path)
    return f"{_module_name(module, model)}.{leaf}"


def _module_name(module: list[str | int], model: MaskRCNN) -> str:
    match module:
        case ["backbone", *within] if isinstance(model.backbone, MobileNetV3):
            return BACKBONE + _mobilenet_name(within, model.backbone)
        case ["backbone", *within] if isinstance(model.backbone, ConvNeXt):
            return BACKBONE + _convnext_name(within, model.backbone)
        case ["backbone", "stem", str(part)]:
            return BACKBONE + {"conv": "conv1", "norm": "bn1"}[part]
        case ["backbone", "stages", int(stage), block, "convs", int(i), str(part)]:
            return f"{BACKBONE}layer{stage + 1}.{block}.{ {'conv': 'conv', 'norm': 'bn'}[part] }{i + 1}"
        case ["backbone", "stages", int(stage), block, "shortcut", str(part)]:
            return f"{BACKBONE}layer{stage + 1}.{block}.downsample.{_position(part)}"
        case ["fpn", kind, level, str(part)]:
            return f"backbone.fpn.{kind}_blocks.{level}.{_position(part)}"
        case ["rpn", "convs", int(i), str(part)]:
            return f"rpn.head.conv.{i}.{_position(part)}"
        case ["rpn", name]:
            return f"rpn.head.{name}"
        case ["box_head" | "mask_head" as head, "convs", int(i), str(part)]:
            return f"roi_heads.{head}.{i}.{_position(part)}"
        case ["box_head", "fcs", int(i)]:
            num_convs = len(model.box_head.convs)
            # With convolutions the head is one sequence: convolutions, flattening, then linear layers and ReLUs.
            return f"roi_heads.box_head.{num_convs + 1 + 2 * i if num_convs else f'fc{6 + i}'}"
        case ["box_head", name]:
            return f"roi_heads.box_predictor.{name}"
        case ["mask_head", "deconv"]:
            return "roi_heads.mask_predictor.conv5_mask"
        case ["mask_head", "logits"]:
            return "roi_heads.mask_predictor.mask_fcn_logits"
    raise ValueError(f"{module} has no counterpart in torchvision")


def _mobilenet_name(module: list[str | int], backbone: MobileNetV3) -> str:
    """Return the name of a module by its place in torchvision's one sequence of layers."""
    layer: nnx.Module
    match module:
        case ["stem", int(i), *within]:
            layer, place = backbone.stem[i], i
        case ["stages", int(stage), int(i), *within]:
            layer = backbone.stages[stage][i]
            place = len(backbone.stem) + sum(len(backbone.stages[before]) for before in range(stage)) + i
    if not isinstance(layer, InvertedResidual):
        return f"{place}.{_position(str(within[0]))}"
    part, name = map(str, within)
    parts = [part for part in ("expand", "depthwise", "squeeze", "project") if getattr(layer, part) is not None]
    return f"{place}.block.{parts.index(part)}.{name if part == 'squeeze' else _position(name)}"


def _convnext_name(module: list[str | int], backbone: ConvNeXt) -> str:
    """Return the name of a module by its place: the stem, then in turn a stage's blocks and what follows them."""
    match module:
        case ["stem", str(part)]:
            return f"0.{_position(part)}"
        case ["stages", int(stage), 0, str(part)] if isinstance(backbone.stages[stage][0], Downsample):
            return f"{2 * stage}.{ {'norm': 0, 'conv': 1}[part] }"
        case ["stages", int(stage), int(i), *within]:
            block = f"{2 * stage + 1}.{i - isinstance(backbone.stages[stage][0], Downsample)}"
            # Its layers stand between two that permute the axes and beside one without arrays, the GELU.
            places = {"depthwise": 0, "norm": 2, "expand": 3, "project": 5}
            return f"{block}.block.{places[str(within[0])]}" if within else block
    raise ValueError(f"{module} has no counterpart in torchvision")


def _position(part: str) -> int:
    """Return the place of a part in torchvision's sequence of convolution and norm."""
    return {"conv": 0, "norm": 1}[part]
