"""Every option once: its default, meaning, unit, choices, range and source; those of the network in ``model_options``.

The model, the loader, the optimizer and the training loop take these dataclasses. ``maskrcnn_jax.config`` turns them
into the ``ConfigDict`` that configuration files change and the command line overrides, and back. The names of
``ModelOptions`` are those of torchvision's ``MaskRCNN`` wherever torchvision has the same option.

To add an option, add one field here or there and use it where it acts.
"""

import dataclasses
import itertools
from typing import ClassVar

from maskrcnn_jax.model_options import ModelOptions as ModelOptions
from maskrcnn_jax.option_fields import PAPER, TORCHVISION, Checked, option
from maskrcnn_jax.paths import expand

# Smallest dynamic loss scale, and the largest power of two in float32.
MIN_LOSS_SCALE, MAX_LOSS_SCALE = 1.0, 2.0**127


@dataclasses.dataclass(frozen=True)
class OptimOptions(Checked):
    """The optimizer and its schedule."""

    prefix: ClassVar[str] = "optim."

    kind: str = option(
        "adamw",
        "optimizer: adamw, or sgd as in torchvision's and detectron2's recipes",
        choices=("adamw", "sgd"),
        source=PAPER + "3.2",
    )
    lr: float = option(5e-4, "peak learning rate", source=PAPER + "3.2")
    lr_batch_size: int = option(
        0, "batch size that lr is meant for; lr is scaled in proportion to batch_size. 0: lr is used as it is", low=0
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
        1e-3, "learning rate of the first step, as a share of lr", low=0, high=1, source=TORCHVISION
    )
    warmup_kind: str = option(
        "sequential",
        "how warm-up joins a cosine. sequential: the cosine starts after warm-up, as with torch's SequentialLR; "
        "chained: it starts with the run and is multiplied by the warm-up, as with ChainedScheduler; detectron2: it "
        "starts with the run, and warm-up is a straight line to it",
        choices=("sequential", "chained", "detectron2"),
    )
    final_lr_fraction: float = option(0.0, "learning rate at the end of the cosine, as a share of lr", low=0, high=1)
    milestones: tuple[int, ...] = option(
        (),
        "when multistep lowers the learning rate, in milestone_unit from the start of the run, warm-up included",
        low=1,
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
    clip_norm: float = option(1.0, "largest global norm of the gradient; 0: no clipping", low=0)
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
        below_one = {"b1": "0.9", "b2": "0.999"} if self.kind == "adamw" else {"momentum": "0.9"}
        for name, example in (below_one | {"ema_decay": "0.9998, or 0 for none"}).items():
            if getattr(self, name) >= 1:
                problems.append(f"optim.{name} is {getattr(self, name)}; use a value below 1 such as {example}")
        problems += self._wrong_milestones() if self.schedule == "multistep" else []
        return problems

    def _wrong_milestones(self) -> list[str]:
        if self.milestones and all(a < b for a, b in itertools.pairwise(self.milestones)):
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
    short_sides: tuple[int, ...] = option(
        (),
        "in training, the shorter side of each image is drawn from these, as detectron2 does from 640, 672, ..., 800. "
        "() always uses short_side",
        unit="pixels",
        low=1,
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
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1, source=TORCHVISION)
    vflip: float = option(0.0, "probability of a vertical flip, in training", low=0, high=1)
    rotate90: float = option(0.0, "probability of a turn by 90, 180 or 270 degrees, in training", low=0, high=1)
    rotation: float = option(
        0.0,
        "largest angle of a random rotation about the centre, either way, in training; the image keeps its size, so "
        "corners are cut off",
        unit="degrees",
        low=0,
        high=180,
    )
    crop_size: int = option(
        0,
        "side of the square that training cuts at random from each resized image; smaller images are padded. All "
        "batches then have this one size. 0: no cropping",
        unit="pixels",
        low=0,
    )
    scale_jitter: tuple[float, ...] = option(
        (),
        "large-scale jitter: smallest and largest factor, such as (0.1, 2.0). Training resizes images to fit a square "
        "of crop_size times a random factor, instead of by short_side. (): off",
        source="Ghiasi et al., 2021",
    )
    copy_paste: float = option(
        0.0,
        "probability that objects of a second training image are pasted over an image, each with probability 1/2. The "
        "second image is transformed likewise. Crowds and objects without masks are not pasted; objects of which "
        "nothing is left visible are dropped",
        low=0,
        high=1,
        source="Ghiasi et al., 2021",
    )
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
    repeat_threshold: float = option(
        0.0,
        "repeat-factor sampling: images with a category in a share f < repeat_threshold of the training images appear "
        "sqrt(repeat_threshold / f) times an epoch on average; LVIS uses 0.001. 0 shows each image once",
        low=0,
        high=1,
        source="Gupta et al., 2019",
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
        if self.short_sides and max(self.short_sides) > self.long_side:
            problems.append(
                f"data.short_sides is {self.short_sides}; use values up to data.long_side, {self.long_side}"
            )
        if self.scale_jitter and not self.crop_size:
            problems.append(f"data.scale_jitter is {self.scale_jitter}; set data.crop_size as well, such as 1024")
        if self.scale_jitter and (len(self.scale_jitter) != 2 or not 0 < self.scale_jitter[0] <= self.scale_jitter[1]):
            problems.append(f"data.scale_jitter is {self.scale_jitter}; use two positive factors such as (0.1, 2.0)")
        if self.scale_jitter and self.short_sides:
            problems.append(
                f"data.short_sides is {self.short_sides} and data.scale_jitter is {self.scale_jitter}; set one of "
                "them to (), since scale jitter chooses the sizes by itself"
            )
        if (self.val_share or self.split_file) and self.train_split == self.eval_split:
            problems.append(
                f"data.train_split and data.eval_split are both {self.eval_split}; with data.val_share or "
                "data.split_file, leave data.eval_split at its default"
            )
        return problems


@dataclasses.dataclass(frozen=True)
class Options(Checked):
    """A whole run: its length, its intervals and its parts."""

    seed: int = option(0, "seed of initialisation, sampling, shuffling and augmentation", low=0)
    batch_size: int = option(
        16, "images per step, over all devices and accumulation steps", low=1, source=PAPER + "3.2"
    )
    epochs: int = option(
        12, "passes over the training images; 0: 12 to 100, chosen so that about images_to_see images are seen", low=0
    )
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
        "shard parameters, averages and optimizer state over the devices instead of replicating them: less memory for "
        "models larger than a ResNet-50, more communication, the same results",
    )
    model: ModelOptions = ModelOptions()
    optim: OptimOptions = OptimOptions()
    data: DataOptions = DataOptions()

    def _contradictions(self) -> list[str]:
        if self.patience and not self.eval_every:
            return [f"patience is {self.patience} with eval_every 0; use an eval_every of at least 1, or patience 0"]
        return []
