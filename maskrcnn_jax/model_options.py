"""The options of the network; ``options`` has the others, and imports these."""

import dataclasses
from typing import ClassVar

from maskrcnn_jax.option_fields import PAPER, TORCHVISION, Checked, option


@dataclasses.dataclass(frozen=True)
class ModelOptions(Checked):
    """The network and what happens between its stages."""

    prefix: ClassVar[str] = "model."

    backbone: str = option(
        "resnet50",
        "backbone: resnet18, resnet34, resnet50, resnet101, mobilenet_v3_large, convnext_tiny, convnext_small or "
        "convnext_base; or a function of yours as module:function",
        source=PAPER + "3.2",
    )
    in_channels: int = option(
        3, "channels of the images: RGB, then others such as depth, which enter as (x / 255 - 0.5) / 0.25", low=3
    )
    stem_channels: int = option(64, "output channels of a ResNet's 7x7 convolution", low=1)
    stage_channels: int = option(
        0,
        "output channels of a ResNet's first stage, doubled from stage to stage; 0 means 256, or 64 in resnet18 and "
        "resnet34",
        low=0,
    )
    bottleneck_channels: int = option(
        64, "channels inside the bottlenecks of a ResNet's first stage, doubled from stage to stage", low=1
    )
    norm: str = option(
        "batch",
        "normalisation of the backbone: batch is trained, with statistics of the whole batch; frozen keeps the "
        "statistics of pretrained weights; group has 32 groups of channels and statistics of each image. ConvNeXt "
        "always has layer norms",
        choices=("batch", "frozen", "group"),
        source="group: Group Normalization (Wu and He, 2018)",
    )
    sync_batch_norm: bool = option(
        True,
        "batch norms use statistics of the batch on all devices, as torch's SyncBatchNorm; False: of the images on "
        "each device. For evaluation, the mean over the devices is kept",
    )
    norm_eps: float = option(
        1e-5, "added to the variance by a ResNet's norms; 0 with torchvision's COCO_V1 weights", low=0
    )
    stride_in_1x1: bool = option(
        False, "put the stride of a bottleneck into its 1x1 convolution, as detectron2's MSRA weights need"
    )
    head_norm: str = option(
        "none",
        "normalisation of the FPN, the box head's convolutions and the mask head; torchvision's v2 has batch",
        choices=("none", "batch", "frozen", "group"),
    )
    fpn_channels: int = option(256, "channels of every pyramid level", low=1, source="FPN, Sec. 3")
    anchor_sizes: tuple[float, ...] = option(
        (32, 64, 128, 256, 512),
        "anchor size of each pyramid level, P2 to P6",
        unit="pixels",
        low=1,
        source=TORCHVISION,
    )
    aspect_ratios: tuple[float, ...] = option(
        (0.5, 1.0, 2.0), "height / width of the anchors", low=0.01, source=TORCHVISION
    )
    anchor_scales: tuple[float, ...] = option((1.0,), "each level has anchors of its size times each factor", low=0.01)
    exact_anchors: bool = option(
        False, "exact anchors at strides of powers of two, as in detectron2, instead of torchvision's rounded ones"
    )
    rpn_channels: int = option(0, "channels of the RPN head's convolutions; 0 means fpn_channels", low=0)
    rpn_conv_depth: int = option(1, "3x3 convolutions of the RPN head; torchvision's v2 has 2", low=1)
    rpn_fg_iou_thresh: float = option(0.7, "IoU from which an anchor is foreground", low=0, high=1)
    rpn_bg_iou_thresh: float = option(0.3, "IoU below which an anchor is background", low=0, high=1)
    rpn_batch_size_per_image: int = option(256, "anchors sampled for the RPN losses", low=1, source=TORCHVISION)
    rpn_positive_fraction: float = option(0.5, "largest share of foreground among the sampled anchors", low=0, high=1)
    rpn_fixed_normalizer: bool = option(
        False,
        "divide the RPN losses by rpn_batch_size_per_image times the number of images, as detectron2, instead of by "
        "the number of sampled anchors, as torchvision",
    )
    rpn_pre_nms_top_n_train: int = option(2000, "proposals per level before NMS, in training", low=1)
    rpn_pre_nms_top_n_test: int = option(1000, "proposals per level before NMS, in evaluation", low=1)
    rpn_post_nms_top_n_train: int = option(2000, "proposals per image after NMS, in training", low=1)
    rpn_post_nms_top_n_test: int = option(1000, "proposals per image after NMS, in evaluation", low=1)
    rpn_nms_thresh: float = option(0.7, "IoU above which NMS drops the worse proposal", low=0, high=1)
    rpn_min_size: float = option(1e-3, "proposals with a smaller side are dropped", unit="pixels", low=0)
    train_proposals: str = option(
        "rpn",
        "what the heads are trained on besides the ground-truth boxes: rpn, all proposals; gt, nothing; gt_then_rpn, "
        "the best proposals up to min_proposals boxes",
        choices=("rpn", "gt", "gt_then_rpn"),
        source=PAPER + "2.2 describes gt_then_rpn",
    )
    min_proposals: int = option(
        15, "ground-truth boxes and proposals together, with gt_then_rpn", low=0, source=PAPER + "3.2"
    )
    roi_operator: str = option(
        "align", "align: RoIAlign; pool: RoIPool, which rounds to whole cells", choices=("align", "pool")
    )
    roi_sampling_ratio: int = option(
        2, "RoIAlign samples per bin and axis; 0 is adaptive, one per feature cell, as in detectron2", low=0
    )
    roi_aligned: bool = option(
        False, "RoIAlign, mask targets and mask pasting without torchvision's half-pixel shift, as in detectron2"
    )
    box_conv_channels: tuple[int, ...] = option((), "output channels of each 3x3 convolution of the box head", low=1)
    box_fc_channels: tuple[int, ...] = option(
        (1024, 1024), "output features of each fully connected layer of the box head", low=1, source=TORCHVISION
    )
    cls_agnostic_bbox_reg: bool = option(
        False, "the box head predicts one box for all classes, instead of one for each, as detectron2's option does"
    )
    box_fg_iou_thresh: float = option(
        0.5, "IoU from which a RoI is foreground; below, it is background", low=0, high=1, source=TORCHVISION
    )
    box_batch_size_per_image: int = option(512, "RoIs sampled for the head losses", low=1, source=TORCHVISION)
    box_positive_fraction: float = option(0.25, "largest share of foreground among the sampled RoIs", low=0, high=1)
    box_score_thresh: float = option(0.05, "score above which a detection is kept", low=0, high=1)
    box_nms_thresh: float = option(0.5, "IoU above which NMS drops the worse detection of a class", low=0, high=1)
    box_nms_method: str = option(
        "hard",
        "what NMS does with a detection that overlaps a better one: hard drops it, linear multiplies its score by "
        "1 - IoU, both above box_nms_thresh; gaussian multiplies it by exp(-IoU^2 / box_nms_sigma). A detection goes "
        "when its score falls to box_score_thresh",
        choices=("hard", "linear", "gaussian"),
        source="Soft-NMS (Bodla et al., 2017)",
    )
    box_nms_sigma: float = option(0.5, "the smaller, the more box_nms_method=gaussian lowers scores", low=1e-3)
    box_nms_class_agnostic: bool = option(
        False, "NMS among the detections of all classes, so that no two classes are found in one place"
    )
    box_min_size: float = option(1e-2, "detections with a smaller side are dropped", unit="pixels", low=0)
    box_detections_per_img: int = option(
        100, "detections per image; above 100, COCO's metrics count as many", low=1, source=TORCHVISION
    )
    mask_channels: int = option(256, "channels of the mask head", low=1)
    mask_deconv: bool = option(
        True,
        "upsample masks to 28x28 with a deconvolution; False gives the paper's 14x14",
        source=PAPER + "2.5",
    )
    mask_targets_binary: bool = option(
        False, "mask targets are 0 or 1, as in detectron2, or the covered share of each cell, as in torchvision"
    )
    classification_loss: str = option(
        "cross_entropy",
        "class loss of the box head: cross entropy or sigmoid focal loss",
        choices=("cross_entropy", "focal"),
        source=PAPER + "3.2",
    )
    class_weights: tuple[float, ...] = option(
        (),
        "weights of the classes in the cross entropy: first the background's, then one for each class in the order of "
        "the labels; the loss is divided by the sum of the RoIs' weights. Empty: all 1",
        low=0,
        source="torch's CrossEntropyLoss(weight=...)",
    )
    box_loss: str = option(
        "smooth_l1", "box loss of the box head", choices=("smooth_l1", "iou", "giou"), source=PAPER + "3.2"
    )
    smooth_l1_beta: float = option(
        1 / 9,
        "offset at which smooth L1 turns from quadratic to linear, in the RPN and the box head; 0 gives L1, as in "
        "detectron2",
        low=0,
        source=TORCHVISION,
    )
    mask_loss: str = option("bce", "loss of the mask head", choices=("bce", "dice"), source=PAPER + "3.2")
    remat: bool = option(False, "recompute the backbone in the backward pass: less memory, more time")
    dtype: str = option(
        "float32",
        "dtype of convolutions and matrix products; parameters are at least float32. bfloat16 is faster on TPUs, GPUs "
        "and CPUs with AMX. float16 scales the loss",
        choices=("float32", "bfloat16", "float16", "float64"),
    )

    def _contradictions(self) -> list[str]:
        for name in ("anchor_sizes", "aspect_ratios", "anchor_scales"):
            if not getattr(self, name):
                return [f"model.{name} is empty; give one number or more"]
        weights = self.class_weights
        if weights and not any(weights):
            return [f"model.class_weights is {weights}; use numbers from 0, not all of them 0"]
        if weights and self.classification_loss == "focal":
            return ["model.class_weights is for cross entropy; leave it empty with model.classification_loss=focal"]
        return []
