"""Compare this project with torchvision: every stage, loss, gradient, optimizer step and detection.

    python tools/compare_torch.py --model=maskrcnn_resnet50_fpn --images=DIR [--weights=FILE] [--dtype=float64]
    python tools/compare_torch.py --workdir=runs/r50 --images=DIR [--dtype=float64]
    python tools/compare_torch.py --train --config=shapes --workdir=runs/pairs [--config.FIELD=VALUE] [--seeds=3]

Both sides get the same weights (seeded random ones if none are given) and the same images. Of a run of train.py its
AP is compared too. Prints a table, writes it as --json and --html, and exits with status 1 if something is further
away than its tolerance.

With --train both sides are trained, and losses and AP are compared over several seeds. The status is 1 if something
differs beyond chance. Interrupted, the same command continues with the runs that are not finished.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

import jax
import numpy as np
import torch

from maskrcnn_jax.api import find_options
from maskrcnn_jax.commands.app import at_least, run_command
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.run_folder import load_model, load_options
from maskrcnn_jax.weights.convert import to_torchvision
from maskrcnn_jax.weights.files import read_arrays
from maskrcnn_jax.weights.published import resolve
from maskrcnn_jax.weights.torchvision import modern_names, without_counterpart
from tools.comparison.ap import compare_ap
from tools.comparison.comparison_page import Comparison
from tools.comparison.detections import compare_detections
from tools.comparison.pair import TOLERANCES, Pair, make_targets, read_images, to_torch
from tools.comparison.stages import compare_stages
from tools.comparison.trained_pair import lacked_by, train_pairs
from tools.comparison.training import compare_losses_and_gradients, compare_steps, make_gradient
from tools.torchvision_reference import build_reference, load_reference, randomise

CONFIGS = {"maskrcnn_resnet50_fpn": "torchvision_r50_fpn", "maskrcnn_resnet50_fpn_v2": "torchvision_r50_fpn_v2"}
NUM_CLASSES = 91


def compare(
    options: ModelOptions,
    images: list[np.ndarray],
    *,
    num_classes: int = NUM_CLASSES,
    dtype: str = "float32",
    weights: Mapping[str, np.ndarray] | None = None,
    batch_size: int = 2,
    min_size: int = 256,
    max_size: int = 416,
    num_steps: int = 10,
    seed: int = 0,
) -> Comparison:
    """Compare a model of ours with torchvision's; JAX must allow float64 if that is the dtype.

    Args:
        options: of our model.
        images: [h, w, 3] uint8 RGB, of any sizes.
        num_classes: background included.
        dtype: "float32" or "float64".
        weights: torchvision's state dict; None draws seeded random weights.
        batch_size: images in each forward pass.
        min_size: of the shorter side after resizing, pixels.
        max_size: of the longer one.
        num_steps: of each optimizer, in float64; 0 leaves losses and gradients out too.
        seed: of weights, objects and sampling.

    Returns:
        All that was compared.
    """
    reference = build_reference(options, num_classes, min_size=min_size, max_size=max_size, dtype=dtype)
    if weights is None:
        randomise(reference, to_torch(images[:1], dtype), seed)
    else:
        load_reference(reference, weights)
    pair = Pair(reference, options, num_classes, dtype)
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    result = Comparison()
    compare_stages(result, pair, batches)
    compare_detections(result, pair, batches)
    if num_steps:
        targets = [make_targets(batch, num_classes, seed + i, dtype) for i, batch in enumerate(batches)]
        gradient = make_gradient(pair)
        compare_losses_and_gradients(result, pair, gradient, batches, targets, seed)
        if pair.tolerances.step is not None:
            compare_steps(result, pair, gradient, batches[0], targets[0], num_steps, seed)
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    parser.add_argument(
        "--model", choices=sorted(CONFIGS), default="maskrcnn_resnet50_fpn", help="which of torchvision's models"
    )
    parser.add_argument(
        "--weights", metavar="FILE|NAME", help="state dict (.pth, .safetensors); seeded random weights if not given"
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="compare the model of this training run instead, and its AP; with --train, the folder for its runs",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of images; needed without --train")
    parser.add_argument("--dtype", choices=sorted(TOLERANCES), default="float32", help="of both sides")
    numbers = {  # name -> default, lowest value, meaning
        "num_images": (2, 1, "images to compare on"),
        "batch_size": (2, 1, "images in each forward pass"),
        "min_size": (256, 32, "shorter side after resizing, pixels; a run has its own"),
        "max_size": (416, 32, "longest side after resizing, pixels; a run has its own"),
        "steps": (10, 0, "of SGD and AdamW (float64); 0 also leaves out losses and gradients"),
        "seed": (0, 0, "of weights, objects and sampling; with --train, see --config.seed"),
        "seeds": (3, 1, "runs of each side, with --train; the first has the seed --config.seed"),
    }
    for name, (default, low, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=at_least(low), default=default, metavar="N", help=meaning)
    parser.add_argument("--json", metavar="FILE", help="file for all rows")
    parser.add_argument("--html", metavar="FILE", help="file for a page with plots")
    group = parser.add_argument_group("training side by side")
    group.add_argument("--train", action="store_true", help="train both sides instead, and compare losses and AP")
    group.add_argument("--config", help="name or file of a config; --config.FIELD=VALUE changes it")
    group.add_argument("--coco_dir", metavar="DIR", help="dataset in COCO's layout, instead of the config's")
    group.add_argument("--plot", metavar="FILE", help="file for the plot, .svg or .png")


def compare_training(options: argparse.Namespace) -> None:
    """Train both sides and compare them."""
    if options.config is None or not options.workdir:
        raise UserError("--train needs --config, such as --config=shapes, and --workdir, a folder for its runs")
    if options.weights or options.images:
        raise UserError(
            "--train starts from random weights and trains on --coco_dir; leave out --weights and --images"
        )
    if options.coco_dir:
        options.config.data.coco_dir = options.coco_dir
    result = train_pairs(find_options(options.config), Path(options.workdir), options.seeds)
    print(result.table())
    if options.json:
        result.write_json(options.json)
    if options.html:
        result.write_html(options.html, f"maskrcnn_jax and torchvision, trained side by side ({_versions()})")
    if options.plot:
        result.write_plot(options.plot)
    if result.differs:
        sys.exit(1)


def check_run(model: ModelOptions, workdir: str, *, with_losses: bool) -> None:
    """Check that a run can be compared with torchvision, stage by stage."""
    if not model.backbone.startswith("resnet"):
        raise UserError(f"{workdir} has the backbone {model.backbone}; only the stages of ResNets can be compared")
    others = without_counterpart(model)
    if others:
        raise UserError(f"{workdir} has {', '.join(others)}, which torchvision lacks; compare another run")
    others = [f"{name}={value}" for name, value, _ in lacked_by(model)] if with_losses else []
    if others:
        raise UserError(
            f"{workdir} was trained with {', '.join(others)}, which torchvision's losses lack; leave losses and "
            "gradients out (--steps=0), or compare another run"
        )


def _versions() -> str:
    return f"jax {jax.__version__}, torch {torch.__version__}"


def main(options: argparse.Namespace) -> None:
    """Compare."""
    if options.train:
        compare_training(options)
        return
    if options.config is not None or options.coco_dir or options.plot:
        raise UserError("--config, --coco_dir and --plot are for --train; add it, or leave them out")
    if options.workdir and options.weights:
        raise UserError("the run in --workdir has its weights; leave out --weights")
    if not options.images:
        raise UserError("give --images, a folder of images, or --train")
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    images = read_images(options.images, options.num_images)
    common = {
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "num_steps": options.steps,
        "seed": options.seed,
    }
    if options.workdir:
        trained = load_options(options.workdir)
        trained = dataclasses.replace(trained, model=dataclasses.replace(trained.model, dtype="float32"))
        check_run(trained.model, options.workdir, with_losses=options.steps > 0)
        model, categories = load_model(options.workdir, trained)
        arrays, count = to_torchvision(model), categories.num_classes
        sizes = {"min_size": trained.data.short_side, "max_size": trained.data.long_side}
        result = compare(trained.model, images, num_classes=count, weights=arrays, **sizes, **common)
        if options.dtype == "float32":
            reference = build_reference(trained.model, count, **sizes)
            load_reference(reference, arrays)
            compare_ap(result, reference, model, trained, categories)
    else:
        network, weights = find_options(CONFIGS[options.model]).model, None
        if options.weights:
            weights = modern_names(read_arrays(resolve(options.weights)))
        else:
            # The 0 of the published weights would divide by the variance of a dead channel.
            network = dataclasses.replace(network, norm_eps=1e-5)
        result = compare(
            network, images, weights=weights, min_size=options.min_size, max_size=options.max_size, **common
        )
    print(result.table())
    if options.json:
        result.write_json(options.json)
    if options.html:
        name = options.workdir or options.model
        result.write_html(options.html, f"{name}, {options.dtype}: maskrcnn_jax beside torchvision ({_versions()})")
    if not result.ok:
        sys.exit(1)


if __name__ == "__main__":
    run_command(sys.modules[__name__])
