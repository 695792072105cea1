"""Train what the paper's tables and text compare, and write docs/results.md: the paper's numbers beside ours.

    python tools/reproduce_paper.py --table=1 [--rows=1,2] --coco_dir=COCO --weights=BACKBONE [--scale=0.01]
    python tools/reproduce_paper.py --comparisons=all --coco_dir=data/paper_shapes --weights=BACKBONE [--scale=0.2]

With --set=batch_size=2 and more of its kind every training has other values in its config. Interrupted, the same
command goes on where it was, and several may run side by side. Without --table and --comparisons only the document is
written again. The comparisons start from a backbone that saw other shapes:

    make train
    maskrcnn-jax export-torchvision --backbone_only --workdir=runs/shapes --output=runs/shapes_backbone.safetensors
    python -m maskrcnn_jax.data.shapes data/paper_shapes --train=4000 --val=200 --seed=1
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from tqdm import tqdm

from configs.paper import ROWS
from maskrcnn_jax.commands.app import at_least, comma_separated, run_command
from maskrcnn_jax.errors import UserError
from tools.paper.experiments import COMPARISONS, comparison_run, table_run
from tools.paper.results_page import load_results, write_report
from tools.paper.running import train


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    parser.add_argument("--table", type=int, choices=[1, 2], help="train rows of this table of the paper")
    parser.add_argument("--rows", type=comma_separated, metavar="N,...", help="which rows, from 1; all if not given")
    parser.add_argument(
        "--comparisons", type=comma_separated, default=[], metavar="NAME,...", help=f"{', '.join(COMPARISONS)} or all"
    )
    parser.add_argument(
        "--seeds", type=at_least(1), default=3, metavar="N", help="trainings of each variant of a comparison"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the number of images, and of the epochs of table rows"
    )
    parser.add_argument("--coco_dir", metavar="DIR", help="dataset in COCO's layout")
    parser.add_argument("--weights", default="", metavar="FILE|NAME", help="backbone to start from")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change the config of every training"
    )
    parser.add_argument("--output", default="runs/paper", metavar="DIR", help="folder for the trainings")
    parser.add_argument(
        "--docs", default="docs", metavar="DIR", help="folder of results.md, results.json and their pictures"
    )


def chosen_runs(options: argparse.Namespace) -> list:
    """Return the trainings that the options ask for, each once.

    Raises:
        UserError: for a row or a comparison that does not exist.
    """
    wrong = [field for field in options.set if "=" not in field]
    if wrong:
        raise UserError(f"--set={wrong[0]} has no value; write --set=FIELD=VALUE, such as --set=batch_size=2")
    changes = dict(field.split("=", 1) for field in options.set)
    runs = []
    if options.table:
        rows = [row for table, row in ROWS if table == options.table]
        wanted = options.rows or list(map(str, rows))
        unknown = set(wanted) - set(map(str, rows))
        if unknown:
            raise UserError(
                f"table {options.table} has no row {', '.join(sorted(unknown))}; its rows are 1 to {len(rows)}"
            )
        runs += [table_run(options.table, int(row), options.scale, changes) for row in wanted]
    names = list(COMPARISONS) if options.comparisons == ["all"] else options.comparisons
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        raise UserError(f"there is no comparison {', '.join(unknown)}; give some of {', '.join(COMPARISONS)}, or all")
    # Seed after seed, so that what is interrupted has compared everything with as many seeds as it came to.
    for seed in range(options.seeds):
        for name in names:
            variants = COMPARISONS[name].variants.values()
            runs += [comparison_run(variant | changes, seed, options.scale) for variant in variants]
    return list(dict.fromkeys(runs))


def main(options: argparse.Namespace) -> None:
    """Train, and write the document after each training."""
    runs = chosen_runs(options)
    if runs and not options.coco_dir:
        raise UserError("give the dataset by --coco_dir")
    output, docs = Path(options.output), Path(options.docs)
    for run in tqdm([run for run in runs if run.name not in load_results(docs)], unit="training", desc="paper"):
        train(run, output, coco_dir=options.coco_dir, weights=options.weights)
        write_report(output, docs)
    if not runs:
        write_report(output, docs)


if __name__ == "__main__":
    run_command(sys.modules[__name__])
