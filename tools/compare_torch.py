"""Compare this project with torchvision: every stage, loss, gradient, optimizer step and detection.

    python tools/compare_torch.py --model=maskrcnn_resnet50_fpn --images=DIR [--weights=FILE] [--dtype=float64]
    python tools/compare_torch.py --workdir=runs/r50 --images=DIR [--dtype=float64]

Both sides get the same weights (seeded random ones if none are given) and the same images. Of a run of train.py its
AP is compared too. Prints a table, writes it as --json and --html, and exits with status 1 if something is further
away than its tolerance.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

import jax
import numpy as np
import torch
from absl import flags

from maskrcnn_jax.api import find_options
from maskrcnn_jax.commands.app import run_app
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


FLAGS = flags.FLAGS
flags.DEFINE_enum("model", "maskrcnn_resnet50_fpn", sorted(CONFIGS), "Which of torchvision's models.")
flags.DEFINE_string("weights", None, "State dict (.pth, .safetensors) or a name; seeded random weights if not given.")
flags.DEFINE_string("workdir", None, "Compare the model of this run of train.py instead, and its AP.")
flags.DEFINE_string("images", None, "Folder of images.", required=True)
flags.DEFINE_enum("dtype", "float32", sorted(TOLERANCES), "Of both sides.")
flags.DEFINE_integer("num_images", 2, "Images to compare on.", lower_bound=1)
flags.DEFINE_integer("batch_size", 2, "Images in each forward pass.", lower_bound=1)
flags.DEFINE_integer("min_size", 256, "Shorter side after resizing, pixels; of a run, its own.", lower_bound=32)
flags.DEFINE_integer("max_size", 416, "Longer side after resizing, pixels, at most; likewise.", lower_bound=32)
flags.DEFINE_integer("steps", 10, "Of SGD and AdamW (float64); 0 leaves losses and gradients out too.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Of weights, objects and sampling.")
flags.DEFINE_string("json", None, "File for all rows.")
flags.DEFINE_string("html", None, "File for a page with plots.")


def main() -> None:
    jax.config.update("jax_enable_x64", FLAGS.dtype == "float64")
    images = read_images(FLAGS.images, FLAGS.num_images)
    common = {"dtype": FLAGS.dtype, "batch_size": FLAGS.batch_size, "num_steps": FLAGS.steps, "seed": FLAGS.seed}
    if FLAGS.workdir:
        options = load_options(FLAGS.workdir)
        others = without_counterpart(options.model)
        if others:
            raise UserError(f"{FLAGS.workdir} has {', '.join(others)}, which torchvision lacks; compare another run")
        options = dataclasses.replace(options, model=dataclasses.replace(options.model, dtype="float32"))
        model, categories = load_model(FLAGS.workdir, options)
        arrays, count = to_torchvision(model), categories.num_classes
        sizes = {"min_size": options.data.short_side, "max_size": options.data.long_side}
        result = compare(options.model, images, num_classes=count, weights=arrays, **sizes, **common)
        if FLAGS.dtype == "float32":
            reference = build_reference(options.model, count, **sizes)
            load_reference(reference, arrays)
            compare_ap(result, reference, model, options, categories)
    else:
        options, weights = find_options(CONFIGS[FLAGS.model]).model, None
        if FLAGS.weights:
            weights = modern_names(read_arrays(resolve(FLAGS.weights)))
        else:
            # The 0 of the published weights would divide by the variance of a dead channel.
            options = dataclasses.replace(options, norm_eps=1e-5)
        result = compare(options, images, weights=weights, min_size=FLAGS.min_size, max_size=FLAGS.max_size, **common)
    print(result.table())
    if FLAGS.json:
        result.write_json(FLAGS.json)
    if FLAGS.html:
        versions = f"jax {jax.__version__}, torch {torch.__version__}"
        name = FLAGS.workdir or FLAGS.model
        result.write_html(FLAGS.html, f"{name}, {FLAGS.dtype}: maskrcnn_jax beside torchvision ({versions})")
    if not result.ok:
        sys.exit(1)


if __name__ == "__main__":
    run_app(main)
