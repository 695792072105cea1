"""Trains this project and torchvision side by side: the same initial weights, images and recipe, seed by seed.

This project trains by ``maskrcnn_jax.api.train``, torchvision by ``torch_training``. Each side draws its own order,
flips and samples. AP is measured by one evaluation, ours: torchvision's trained weights are loaded into our model.
Every training has a folder of its own; what is finished there is not repeated.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from flax import nnx
from tqdm import tqdm

import maskrcnn_jax.api as mr
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.dataset import load_dataset
from maskrcnn_jax.data.plan import training_subset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import DataOptions, ModelOptions, OptimOptions, Options
from maskrcnn_jax.run_folder import changed_options, save_options
from maskrcnn_jax.training.derive import derive_options
from maskrcnn_jax.weights.convert import to_torchvision
from maskrcnn_jax.weights.files import read_arrays, write_arrays
from maskrcnn_jax.writing import write_json
from tools.comparison.paired_results import TERMS, PairedResults
from tools.comparison.torch_training import Curve, train_torchvision

# Options that torchvision's side obeys, or need not know, by their part of a config. Every other one must have its
# default, which is torchvision's behaviour: an option that is new is refused until that side obeys it too.
FOLLOWED = {
    "": """seed batch_size epochs images_to_see max_steps log_every eval_every eval_batch_size eval_losses
        eval_train_limit eval_workers checkpoint_every keep_checkpoints shard_params""",
    "model.": """backbone stem_channels stage_channels bottleneck_channels norm norm_eps head_norm fpn_channels
        anchor_sizes aspect_ratios anchor_scales rpn_conv_depth rpn_fg_iou_thresh rpn_bg_iou_thresh
        rpn_batch_size_per_image rpn_positive_fraction rpn_pre_nms_top_n_train rpn_pre_nms_top_n_test
        rpn_post_nms_top_n_train rpn_post_nms_top_n_test rpn_nms_thresh roi_sampling_ratio box_conv_channels
        box_fc_channels box_fg_iou_thresh box_batch_size_per_image box_positive_fraction box_score_thresh
        box_nms_thresh box_detections_per_img mask_channels remat""",
    "optim.": """kind lr lr_batch_size schedule warmup_steps warmup_factor milestones milestone_unit gamma
        final_lr_fraction weight_decay decay_norms decay_biases b1 b2 momentum clip_norm""",
    "data.": """coco_dir train_split eval_split train_limit eval_limit short_side long_side buckets resize
        contiguous_labels hflip threads workers prefetch""",
}
CHOICES = {"data.resize": ("uint8", "float32")}  # of an option that is obeyed -> what torchvision's side has of it
METRICS = ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50")
RESULT = "result.json"


def check_options(options: Options) -> None:
    """Check that torchvision can train with these options.

    Raises:
        UserError: names all that it lacks.
    """
    parts = (options, options.model, options.optim, options.data)
    lacking = [f"{name}={value} (set it to {default})" for part in parts for name, value, default in lacked_by(part)]
    if lacking:
        raise UserError(f"torchvision's side of --train lacks {', '.join(lacking)}; change these options")


def lacked_by(part: Options | ModelOptions | OptimOptions | DataOptions) -> list[tuple[str, Any, Any]]:
    """Return the options of a part of a config with which torchvision cannot train: name, value and default."""
    lacking = []
    for field in dataclasses.fields(part):
        name, value = part.prefix + field.name, getattr(part, field.name)
        followed = field.name in FOLLOWED[part.prefix].split() and value in CHOICES.get(name, (value,))
        if not followed and value != field.default and not dataclasses.is_dataclass(value):
            lacking.append((name, value, field.default))
    return lacking


def train_pairs(options: Options, workdir: Path, num_seeds: int) -> PairedResults:
    """Train both sides with several seeds, or what is left to train of that.

    Args:
        options: of all runs; the seeds are ``options.seed`` and the following ones.
        workdir: folder of the runs.
        num_seeds: runs of each side.

    Raises:
        UserError: if torchvision lacks an option, or the folder holds runs with other options.
    """
    check_options(options)
    changes = changed_options(options, workdir)
    if changes:
        raise UserError(f"{workdir} holds runs with other options: {', '.join(changes)}; give another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    save_options(options, workdir)
    dataset = load_dataset(options.data, options.data.train_split)
    results = PairedResults()
    for seed in tqdm(range(options.seed, options.seed + num_seeds), desc="seeds", unit="seed"):
        results.add(*_train_pair(dataclasses.replace(options, seed=seed), dataset, workdir / f"seed{seed}"))
    return results


def _train_pair(options: Options, dataset: CocoDataset, folder: Path) -> tuple[dict, dict]:
    """Return the results of both sides, ours first."""
    ours, theirs = folder / "maskrcnn_jax", folder / "torchvision"
    initial, trained = folder / "initial.safetensors", theirs / "model.safetensors"
    folder.mkdir(exist_ok=True)
    theirs.mkdir(exist_ok=True)
    if not initial.is_file():
        model = MaskRCNN(dataset.categories.num_classes, options.model, rngs=nnx.Rngs(options.seed))
        write_arrays(initial, to_torchvision(model))

    if not (ours / RESULT).is_file():
        start = time.perf_counter()
        # Evaluated once, below, by what evaluates the other side.
        mr.train(dataclasses.replace(options, eval_every=0), ours, weights=initial)
        _finish(ours, options, ours, _logged_curve(ours), time.perf_counter() - start, dataset)
    result = json.loads((ours / RESULT).read_text())

    if not (theirs / RESULT).is_file():
        start = time.perf_counter()
        rows = training_subset(dataset, options.data.train_limit, options.seed)
        derived = derive_options(options, len(rows))
        last = result["curve"][-1]
        steps = last["step"], round(last["step"] / last["epoch"])  # as many as ours took, in all and in an epoch
        arrays, curve = train_torchvision(derived, dataset, rows, read_arrays(initial), *steps)
        write_arrays(trained, arrays)
        _finish(theirs, options, trained, curve, time.perf_counter() - start, dataset)
    return result, json.loads((theirs / RESULT).read_text())


def _finish(folder: Path, options: Options, model: Path, curve: Curve, seconds: float, dataset: CocoDataset) -> None:
    """Evaluate a trained model, and write the result of its run.

    Args:
        folder: of the run.
        options: of the run.
        model: the folder of a run or a file of weights.
        curve: of the training.
        seconds: that the training took; of the last part, where it was interrupted.
        dataset: that it was trained on.
    """
    given = {} if model.is_dir() else {"config": options, "categories": dataset.categories}
    metrics = mr.evaluate(mr.load(model, **given)).metrics
    result = {"curve": curve, "metrics": {name: metrics[name] for name in METRICS}, "seconds": seconds}
    write_json(folder / RESULT, result, indent=1)


def _logged_curve(workdir: Path) -> Curve:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "epoch", *TERMS)} for line in lines if "loss" in line]
