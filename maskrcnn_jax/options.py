"""Every option once: its default, meaning, unit, choices, range and source.

The model, the loader, the optimizer and the training loop take these dataclasses. ``maskrcnn_jax.config`` turns them
into the ``ConfigDict`` that configuration files change and the command line overrides, and back. The names of
``ModelOptions`` are those of torchvision's ``MaskRCNN`` wherever torchvision has the same option.

To add an option, add one field here and use it where it acts.
"""

import dataclasses
import itertools
from typing import ClassVar

from maskrcnn_jax.option_fields import Checked, option
from maskrcnn_jax.paths import expand

# Smallest dynamic loss scale, and the largest power of two in float32.
MIN_LOSS_SCALE, MAX_LOSS_SCALE = 1.0, 2.0**127


_TORCHVISION = "torchvision"
_DETECTRON2 = "detectron2"
_PAPER = "the paper, Sec. "


@dataclasses.dataclass(frozen=True)
class ModelOptions(Checked):
    """The network and what happens between its stages."""

    prefix: ClassVar[str] = "model."

    backbone: str = option(
        "resnet50", "backbone: resnet18, resnet34, resnet50, resnet101 or mobilenet_v3_large", source=_PAPER + "3.2"
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
        "statistics of pretrained weights",
        choices=("batch", "frozen"),
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
        choices=("none", "batch", "frozen"),
    )
    fpn_channels: int = option(256, "channels of every pyramid level", low=1, source="FPN, Sec. 3")
    anchor_sizes: tuple[float, ...] = option(
        (32, 64, 128, 256, 512), "anchor size of each pyramid level, P2 to P6", unit="pixels", source=_TORCHVISION
    )
    aspect_ratios: tuple[float, ...] = option((0.5, 1.0, 2.0), "height / width of the anchors", source=_TORCHVISION)
    anchor_scales: tuple[float, ...] = option((1.0,), "each level has anchors of its size times each factor")
    exact_anchors: bool = option(
        False, "exact anchors at strides of powers of two, as in detectron2, instead of torchvision's rounded ones"
    )
    rpn_channels: int = option(0, "channels of the RPN head's convolutions; 0 means fpn_channels", low=0)
    rpn_conv_depth: int = option(1, "3x3 convolutions of the RPN head; torchvision's v2 has 2", low=1)
    rpn_fg_iou_thresh: float = option(0.7, "IoU from which an anchor is foreground", low=0, high=1)
    rpn_bg_iou_thresh: float = option(0.3, "IoU below which an anchor is background", low=0, high=1)
    rpn_batch_size_per_image: int = option(256, "anchors sampled for the RPN losses", low=1, source=_TORCHVISION)
    rpn_positive_fraction: float = option(0.5, "largest share of foreground among the sampled anchors", low=0, high=1)
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
        source=_PAPER + "2.2 describes gt_then_rpn",
    )
    min_proposals: int = option(
        15, "ground-truth boxes and proposals together, with gt_then_rpn", low=0, source=_PAPER + "3.2"
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
    box_conv_channels: tuple[int, ...] = option((), "output channels of each 3x3 convolution of the box head")
    box_fc_channels: tuple[int, ...] = option(
        (1024, 1024), "output features of each fully connected layer of the box head", source=_TORCHVISION
    )
    box_fg_iou_thresh: float = option(
        0.5, "IoU from which a RoI is foreground; below, it is background", low=0, high=1, source=_TORCHVISION
    )
    box_batch_size_per_image: int = option(512, "RoIs sampled for the head losses", low=1, source=_TORCHVISION)
    box_positive_fraction: float = option(0.25, "largest share of foreground among the sampled RoIs", low=0, high=1)
    box_score_thresh: float = option(0.05, "score above which a detection is kept", low=0, high=1)
    box_nms_thresh: float = option(0.5, "IoU above which NMS drops the worse detection of a class", low=0, high=1)
    box_min_size: float = option(1e-2, "detections with a smaller side are dropped", unit="pixels", low=0)
    box_detections_per_img: int = option(
        100, "detections per image; above 100, COCO's metrics count as many", low=1, source=_TORCHVISION
    )
    mask_channels: int = option(256, "channels of the mask head", low=1)
    mask_deconv: bool = option(
        True,
        "upsample masks to 28x28 with a deconvolution; False gives the paper's 14x14",
        source=_PAPER + "2.5",
    )
    mask_targets_binary: bool = option(
        False, "mask targets are 0 or 1, as in detectron2, or the covered share of each cell, as in torchvision"
    )
    classification_loss: str = option(
        "cross_entropy",
        "class loss of the box head: cross entropy or sigmoid focal loss",
        choices=("cross_entropy", "focal"),
        source=_PAPER + "3.2",
    )
    box_loss: str = option(
        "smooth_l1", "box loss of the box head", choices=("smooth_l1", "iou", "giou"), source=_PAPER + "3.2"
    )
    mask_loss: str = option("bce", "loss of the mask head", choices=("bce", "dice"), source=_PAPER + "3.2")
    remat: bool = option(False, "recompute the backbone in the backward pass: less memory, more time")
    dtype: str = option(
        "float32",
        "dtype of convolutions and matrix products; parameters are at least float32. float16 scales the loss",
        choices=("float32", "bfloat16", "float16", "float64"),
    )


@dataclasses.dataclass(frozen=True)
class OptimOptions(Checked):
    """The optimizer and its schedule."""

    prefix: ClassVar[str] = "optim."

    kind: str = option(
        "adamw",
        "optimizer: adamw, or sgd as in torchvision's and detectron2's recipes",
        choices=("adamw", "sgd"),
        source=_PAPER + "3.2",
    )
    lr: float = option(5e-4, "peak learning rate", source=_PAPER + "3.2")
    lr_batch_size: int = option(
        0, "batch size that lr is meant for; lr is scaled in proportion to batch_size. 0 does not scale", low=0
    )
    schedule: str = option(
        "cosine",
        "learning rate after warm-up: cosine falls to final_lr_fraction, multistep is multiplied by gamma at each of "
        "milestones, constant stays",
        choices=("cosine", "multistep", "constant"),
    )
    warmup_steps: int = option(
        500, "linear warm-up from lr * warmup_factor, at most a tenth of the run", unit="steps", low=0
    )
    warmup_factor: float = option(
        1e-3, "learning rate of the first step, as a share of lr", low=0, high=1, source=_TORCHVISION
    )
    warmup_kind: str = option(
        "sequential",
        "how warm-up joins a cosine. sequential: the cosine starts after warm-up, as with torch's SequentialLR; "
        "chained: it starts with the run and is multiplied by the warm-up, as with ChainedScheduler; detectron2: it "
        "starts with the run, and warm-up is a straight line to it",
        choices=("sequential", "chained", "detectron2"),
    )
    final_lr_fraction: float = option(0.0, "learning rate at the end of the cosine, as a share of lr", low=0, high=1)
    milestones: tuple[float, ...] = option(
        (), "when multistep lowers the learning rate, in milestone_unit from the start of the run, warm-up included"
    )
    milestone_unit: str = option(
        "epochs", "unit of milestones: epochs, as torchvision, or steps, as detectron2", choices=("epochs", "steps")
    )
    gamma: float = option(
        0.1, "factor of the learning rate at each of milestones", low=0, high=1, source="torchvision, detectron2"
    )
    weight_decay: float = option(1e-4, "decoupled in AdamW, added to the gradient in SGD", low=0)
    decay_norms: bool = option(False, "also decay the scales and biases of norms")
    decay_biases: bool = option(False, "also decay the biases of all other layers")
    backbone_lr_factor: float = option(
        1.0, "learning rate of the backbone, without the FPN, as a share of that of the rest", low=0
    )
    b1: float = option(0.9, "AdamW's decay of the first moment", low=0, high=1)
    b2: float = option(0.999, "AdamW's decay of the second moment", low=0, high=1)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    clip_norm: float = option(1.0, "largest global norm of the gradient; 0 does not clip", low=0)
    loss_scale: float = option(
        2.0**15,
        "initial loss scale in float16; overflowing gradients halve it",
        low=MIN_LOSS_SCALE,
        high=MAX_LOSS_SCALE,
    )
    loss_scale_interval: int = option(
        2000,
        "steps without overflow after which the loss scale doubles",
        unit="steps",
        low=1,
        source="torch's GradScaler",
    )
    ema_decay: float = option(
        0.0,
        "decay of the exponential moving average of the parameters that evaluation and prediction use; at step t at "
        "most (1 + t) / (10 + t). 0 keeps no average",
        low=0,
    )
    accumulate: int = option(
        1,
        "number of gradient-accumulation steps: the batch is split into this many parts, and only one is in memory "
        "at a time. Losses and batch statistics are those of each part",
        low=1,
    )
    frozen_stages: int = option(
        0,
        "stages of the backbone that keep their initial values: 1 is the stem, 2 the stem and the first stage, ...",
        low=0,
    )

    def _contradictions(self) -> list[str]:
        problems = []
        if not 0 < self.lr < float("inf"):
            problems.append(f"optim.lr is {self.lr}; use a positive number such as 5e-4")
        if self.ema_decay >= 1:
            problems.append(f"optim.ema_decay is {self.ema_decay}; use a value below 1 such as 0.9998, or 0 for none")
        problems += self._wrong_milestones() if self.schedule == "multistep" else []
        return problems

    def _wrong_milestones(self) -> list[str]:
        ascending = all(a < b for a, b in itertools.pairwise((0, *self.milestones)))
        if self.milestones and ascending and all(type(milestone) is int for milestone in self.milestones):
            return []
        example = (16, 22) if self.milestone_unit == "epochs" else (60000, 80000)
        return [
            f"optim.milestones is {self.milestones} with optim.schedule multistep; use ascending positive whole "
            f"numbers of {self.milestone_unit}, such as {example}"
        ]


@dataclasses.dataclass(frozen=True)
class DataOptions(Checked):
    """The dataset, how images are resized and augmented, and how they are loaded."""

    prefix: ClassVar[str] = "data."

    source: str = option(
        "coco", "coco: image files in coco_dir; tfds: TFDS shards in tfds_dir", choices=("coco", "tfds")
    )
    coco_dir: str = option(
        "", "folder with <split>/ and annotations/instances_<split>.json, or another export in COCO's format"
    )
    tfds_dir: str = option("", "folder that `maskrcnn-jax build-tfds` wrote")
    train_split: str = option("train2017", "split to train on")
    eval_split: str = option("val2017", "split to evaluate on")
    val_share: float = option(
        0.0,
        "share of the images of train_split that a new run holds out for evaluation, instead of eval_split. The "
        "choice is seeded, gives each class its share as far as possible, and is kept in the workdir's split.json",
        low=0,
        high=0.9,
    )
    val_group: str = option(
        "",
        "images that val_share keeps together, such as the frames of a video: folder, a field of the images in the "
        "annotation file such as video_id, or a regular expression whose first group names them, such as (.*)_[0-9]+",
    )
    split_file: str = option(
        "", "JSON file with lists of file names, train and val, of train_split; with val_share, training writes it"
    )
    train_limit: int = option(0, "number of training images, chosen by a seeded shuffle; 0 means all", low=0)
    drop_labels: float = option(
        0.0, "share of the training annotations to drop, to measure what missing labels cost", low=0, high=1
    )
    eval_limit: int = option(0, "number of images to evaluate, the first ones of the split; 0 means all", low=0)
    short_side: int = option(
        800, "shorter side of an image after resizing (torchvision's min_size)", unit="pixels", low=1
    )
    long_side: int = option(
        1333, "longest side of an image after resizing (torchvision's max_size)", unit="pixels", low=1
    )
    buckets: str = option(
        "auto",
        "padded sizes: auto has up to four, so that few programs are compiled; exact pads each image to its own "
        "multiple of 32 and compiles for each",
        choices=("auto", "exact"),
    )
    resize: str = option(
        "uint8",
        "uint8: fast; float32: exactly as torchvision; pillow: exactly as detectron2",
        choices=("uint8", "float32", "pillow"),
    )
    contiguous_labels: bool = option(
        False, "number COCO's categories 1..80, as detectron2, instead of by their ids, as torchvision"
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1, source=_TORCHVISION)
    color_jitter: float = option(0.0, "strength of brightness, contrast and saturation changes", low=0, high=1)
    ignore_regions: bool = option(
        False,
        "crowds, and objects of categories that the file does not list, are neither object nor background where they "
        "cover half of an anchor or proposal; otherwise they are background, as in torchvision",
    )
    max_objects: int = option(
        0,
        "largest number of objects of an image that training uses, rounded up to a multiple of 8. From an image with "
        "more, every epoch draws a new random choice, and the others count as background. 0 uses all",
        low=0,
    )
    exclude_categories: tuple[int, ...] = option(
        (), "ids of categories to leave out; their objects are background, or ignored with data.ignore_regions"
    )
    threads: int = option(4, "threads that read and decode images, in each process", low=1)
    workers: int = option(0, "additional processes that read and decode images", low=0)
    prefetch: int = option(4, "batches loaded ahead of the training step", low=1)
    skip_broken: bool = option(False, "skip images that cannot be read instead of stopping")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("coco_dir", "tfds_dir", "split_file"):
            object.__setattr__(self, name, expand(getattr(self, name)))

    def _contradictions(self) -> list[str]:
        problems = []
        if self.short_side > self.long_side:
            problems.append(f"data.short_side is {self.short_side}; use at most data.long_side, {self.long_side}")
        if (self.val_share or self.split_file) and self.train_split == self.eval_split:
            problems.append(
                f"data.eval_split is {self.eval_split} as data.train_split is; with data.val_share leave it as it was"
            )
        return problems


@dataclasses.dataclass(frozen=True)
class Options(Checked):
    """A whole run: its length, its intervals and its parts."""

    seed: int = option(0, "seed of initialisation, sampling, shuffling and augmentation", low=0)
    batch_size: int = option(
        16, "images per step, over all devices and accumulation steps", low=1, source=_PAPER + "3.2"
    )
    epochs: int = option(12, "epochs; 0 chooses 12 to 100 so that about images_to_see images are seen", low=0)
    images_to_see: int = option(
        5000,
        "images seen in a run with epochs 0: small datasets get more epochs within a fixed budget",
        low=1,
        source="steps instead of epochs, as in BiT-HyperRule (Kolesnikov et al., 2020)",
    )
    max_steps: int = option(0, "number of steps to stop after; 0 means after all epochs", unit="steps", low=0)
    log_every: int = option(20, "interval of metrics.jsonl; 0 logs only with checkpoints", unit="steps", low=0)
    eval_every: int = option(
        1, "interval of evaluations; the last step is evaluated as well. 0 means never", unit="epochs", low=0
    )
    eval_batch_size: int = option(8, "images per step of evaluation", low=1)
    eval_losses: bool = option(False, "evaluations also compute the losses and the accuracy of the RoI classifier")
    eval_train_limit: int = option(0, "number of training images that evaluations measure as well", low=0)
    eval_workers: int = option(
        0, "worker processes that encode masks in evaluations; use some if one core is slower than the device", low=0
    )
    checkpoint_every: int = option(
        1000,
        "interval of checkpoints, besides those of evaluations and the last step; 0 means no others",
        unit="steps",
        low=0,
    )
    keep_checkpoints: int = option(2, "newest checkpoints kept, besides the best by best_metric", low=1)
    best_metric: str = option(
        "segm_AP",
        "metric that chooses the best checkpoint and stops training early: mask AP (box AP without masks) or box AP",
        choices=("segm_AP", "bbox_AP"),
    )
    patience: int = option(
        0, "training stops after so many evaluations without a better best_metric; 0 means never", low=0
    )
    tracker: str = option("none", "also log to Weights & Biases or MLflow", choices=("none", "wandb", "mlflow"))
    shard_params: bool = option(
        False,
        "shard parameters, averages and optimizer state over the devices instead of replicating them: less memory, "
        "more communication, the same results",
    )
    model: ModelOptions = ModelOptions()
    optim: OptimOptions = OptimOptions()
    data: DataOptions = DataOptions()

    def _contradictions(self) -> list[str]:
        if self.patience and not self.eval_every:
            return [f"patience is {self.patience} with eval_every 0; use an eval_every of at least 1, or patience 0"]
        return []
