"""Maps names and conventions of detectron2's model zoo (R50-FPN, R101-FPN) to ours.

detectron2 feeds BGR images in 0..255 minus their mean; the first convolution is changed accordingly. The background is
its last class and has neither box deltas nor a mask; ours are zero and never read. Differences outside the weights
(anchors, RoIAlign, resizing) are in configs/detectron2_r50_fpn.py.
"""

import numpy as np

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import BOX_POOL_SIZE, MaskRCNN
from maskrcnn_jax.models.normalize import IMAGE_STD
from maskrcnn_jax.models.resnet import ResNet
from maskrcnn_jax.weights.layouts import Entry, Layout, Path, flat_state, module_and_leaf, module_layout, then

_STD = 255 * np.array(IMAGE_STD).reshape(1, 3, 1, 1)
# We divide the image by its standard deviation; detectron2 does not, and its channels are blue, green, red.
_STEM = Layout(lambda x: x[:, ::-1] * _STD, lambda x: (x[:, :3] / _STD)[:, ::-1])  # [O, 3, 7, 7]
_BACKGROUND_FIRST = Layout(lambda x: np.roll(x, 1, axis=0), lambda x: np.roll(x, -1, axis=0))


def _without_background(rows: int) -> Layout:
    """Return the layout of arrays that have ``rows`` rows per class and none for the background."""

    def read(x):
        return np.concatenate([np.zeros((rows, *x.shape[1:]), x.dtype), x])

    return Layout(read, lambda x: x[rows:])


# Rows per class, and the layout that moves or adds the background.
_PREDICTORS = {
    "cls_score": (1, _BACKGROUND_FIRST),
    "bbox_pred": (4, _without_background(4)),
    "logits": (1, _without_background(1)),
}


def entries(model: MaskRCNN) -> list[Entry]:
    """Return the counterpart of every array of a model.

    Raises:
        UserError: The backbone is not a ResNet.
    """
    if not isinstance(model.backbone, ResNet):
        raise UserError(
            f"the backbone {type(model.backbone).__name__} has no counterpart in detectron2's files; use a ResNet"
        )
    predictors = dict(_PREDICTORS)
    if model.options.cls_agnostic_bbox_reg:
        del predictors["bbox_pred"]
    found = []
    for path, variable in flat_state(model).items():
        layout = module_layout(path, variable.ndim, BOX_POOL_SIZE)
        if path == ("backbone", "stem", "conv", "kernel"):
            layout = then(_STEM, layout)
        rows_per_class = 0
        name = str(path[1]).removesuffix("_kernel").removesuffix("_bias")
        if path[0] != "rpn" and name in predictors:
            rows_per_class, per_class = predictors[name]
            layout = then(per_class, layout)
        found.append(Entry(path, _key(path), layout, rows_per_class))
    return found


def _key(path: Path) -> str:
    module, leaf = module_and_leaf(path)
    return f"{_module_name(module)}.{leaf}"


def _module_name(module: list[str | int]) -> str:
    norm = ".norm" if module[-1] == "norm" else ""
    match module:
        case ["backbone", "stem", _]:
            return f"backbone.bottom_up.stem.conv1{norm}"
        case ["backbone", "stages", int(stage), block, "convs", int(i), _]:
            return f"backbone.bottom_up.res{stage + 2}.{block}.conv{i + 1}{norm}"
        case ["backbone", "stages", int(stage), block, "shortcut", _]:
            return f"backbone.bottom_up.res{stage + 2}.{block}.shortcut{norm}"
        case ["fpn", str(kind), int(level), _]:
            return f"backbone.fpn_{ {'inner': 'lateral', 'layer': 'output'}[kind] }{level + 2}{norm}"
        case ["rpn", "convs", _, _]:
            return "proposal_generator.rpn_head.conv"
        case ["rpn", str(name)]:
            renamed = {"cls_logits": "objectness_logits", "bbox_pred": "anchor_deltas"}[name]
            return f"proposal_generator.rpn_head.{renamed}"
        case ["box_head", "convs" | "fcs" as kind, int(i), *_]:
            return f"roi_heads.box_head.{ {'convs': 'conv', 'fcs': 'fc'}[kind] }{i + 1}{norm}"
        case ["box_head", name]:
            return f"roi_heads.box_predictor.{name}"
        case ["mask_head", "convs", int(i), _]:
            return f"roi_heads.mask_head.mask_fcn{i + 1}{norm}"
        case ["mask_head", "deconv"]:
            return "roi_heads.mask_head.deconv"
        case ["mask_head", "logits"]:
            return "roi_heads.mask_head.predictor"
    raise ValueError(f"{module} has no counterpart in detectron2")
