"""The expression that builds the torchvision model which a state dict fits."""

from maskrcnn_jax.models.resnet import ARCHITECTURES
from maskrcnn_jax.options import ModelOptions, Options

# Values of options in what torchvision's constructors build.
_COMMON: dict[str, tuple] = {
    "in_channels": (3,),
    "stem_channels": (64,),
    "bottleneck_channels": (64,),
    "norm": ("batch", "frozen"),
    "stride_in_1x1": (False,),
    "fpn_channels": (256,),
    "rpn_channels": (0, 256),
    "mask_channels": (256,),
    "mask_deconv": (True,),
    "cls_agnostic_bbox_reg": (False,),
}
_V1: dict[str, tuple] = {
    "head_norm": ("none",),
    "rpn_conv_depth": (1,),
    "box_conv_channels": ((),),
    "box_fc_channels": ((1024, 1024),),
}
_V2: dict[str, tuple] = {
    "head_norm": ("batch",),
    "rpn_conv_depth": (2,),
    "box_conv_channels": ((256,) * 4,),
    "box_fc_channels": ((1024,),),
}
# Options that are arguments of the constructors, under the same names.
_ARGUMENTS = (
    "rpn_pre_nms_top_n_test",
    "rpn_post_nms_top_n_test",
    "rpn_nms_thresh",
    "box_score_thresh",
    "box_nms_thresh",
    "box_detections_per_img",
)


def constructor(options: Options, num_classes: int) -> str | None:
    """Return the Python expression that builds torchvision's model for a state dict; None if it has no such one.

    Args:
        options: Of the model.
        num_classes: Background included.
    """
    model, standard, names = options.model, ModelOptions(), "torchvision.models.detection"
    wide = {"stage_channels": (0, 64 if model.backbone in ("resnet18", "resnet34") else 256)}

    def fits(values: dict[str, tuple]) -> bool:
        return all(getattr(model, name) in allowed for name, allowed in (_COMMON | wide | values).items())

    version = next((suffix for suffix, values in (("", _V1), ("_v2", _V2)) if fits(values)), None)
    if version is None or model.backbone not in ARCHITECTURES or (version and model.backbone != "resnet50"):
        return None
    arguments: dict[str, object] = {"num_classes": num_classes}
    arguments |= {name: getattr(model, name) for name in _ARGUMENTS if getattr(model, name) != getattr(standard, name)}
    sides = {"min_size": (options.data.short_side, 800), "max_size": (options.data.long_side, 1333)}
    arguments |= {name: side for name, (side, default) in sides.items() if side != default}
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if (model.anchor_sizes, model.aspect_ratios, model.anchor_scales) != (
        *(standard.anchor_sizes, standard.aspect_ratios, standard.anchor_scales),
    ):
        sizes = tuple(tuple(size * scale for scale in model.anchor_scales) for size in model.anchor_sizes)
        ratios = (tuple(model.aspect_ratios),) * len(sizes)
        text += f", rpn_anchor_generator={names}.anchor_utils.AnchorGenerator({sizes}, {ratios})"
    if model.backbone == "resnet50":
        return f"{names}.maskrcnn_resnet50_fpn{version}(weights=None, weights_backbone=None, {text})"
    backbone = f"{names}.backbone_utils.resnet_fpn_backbone(backbone_name={model.backbone!r}, weights=None)"
    return f"{names}.MaskRCNN({backbone}, {text})"
