"""Train what the paper's tables and text compare, and write docs/results.md: the paper's numbers beside ours.

    python tools/reproduce_paper.py --table=1 [--rows=1,2] --coco_dir=COCO --weights=resnet50.pth [--scale=0.01]
    python tools/reproduce_paper.py --comparisons=all --coco_dir=data/paper_shapes --weights=BACKBONE [--scale=0.2]

With --set=batch_size=2 and more of its kind every training has other values in its config. Interrupted, the same
command goes on where it was, and several may run side by side. Without --table and --comparisons only the document is
written again. The comparisons start from a backbone that saw other shapes:

    make train
    python tools/export_torchvision.py --backbone_only --workdir=runs/shapes --output=runs/shapes_backbone.safetensors
    python -m maskrcnn_jax.data.shapes data/paper_shapes --train=4000 --val=200 --seed=1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from absl import flags
from tqdm import tqdm

from configs.paper import ROWS
from maskrcnn_jax.commands.app import run_app
from maskrcnn_jax.errors import UserError
from tools.paper.experiments import COMPARISONS, comparison_run, table_run
from tools.paper.results_page import load_results, write_report
from tools.paper.running import train

FLAGS = flags.FLAGS
flags.DEFINE_integer("table", None, "1 or 2: train rows of this table of the paper.", lower_bound=1, upper_bound=2)
flags.DEFINE_list("rows", None, "Which rows, from 1; all if not given.")
flags.DEFINE_list("comparisons", [], f"Which of {', '.join(COMPARISONS)}; or all.")
flags.DEFINE_integer("seeds", 3, "Trainings of each variant of a comparison.", lower_bound=1)
flags.DEFINE_float("scale", 1.0, "Of the images, and of the epochs of table rows.", lower_bound=0.0)
flags.DEFINE_string("coco_dir", None, "Dataset in COCO's layout.")
flags.DEFINE_string("weights", "", "Backbone to start from.")
flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the config, for every training.")
flags.DEFINE_string("output", "runs/paper", "Folder for the trainings.")
flags.DEFINE_string("docs", "docs", "Folder of results.md, results.json and their pictures.")


def chosen_runs() -> list:
    """Return the trainings that the options ask for, each once.

    Raises:
      UserError: for a row or a comparison that does not exist.
    """
    wrong = [field for field in FLAGS.set if "=" not in field]
    if wrong:
        raise UserError(f"--set={wrong[0]} has no value; write --set=FIELD=VALUE, such as --set=batch_size=2")
    changes = dict(field.split("=", 1) for field in FLAGS.set)
    runs = []
    if FLAGS.table:
        rows = [row for table, row in ROWS if table == FLAGS.table]
        wanted = FLAGS.rows or list(map(str, rows))
        unknown = set(wanted) - set(map(str, rows))
        if unknown:
            raise UserError(
                f"table {FLAGS.table} has no row {', '.join(sorted(unknown))}; its rows are 1 to {len(rows)}"
            )
        runs += [table_run(FLAGS.table, int(row), FLAGS.scale, changes) for row in wanted]
    names = list(COMPARISONS) if FLAGS.comparisons == ["all"] else FLAGS.comparisons
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        raise UserError(f"there is no comparison {', '.join(unknown)}; give some of {', '.join(COMPARISONS)}, or all")
    # Seed after seed, so that what is interrupted has compared everything with as many seeds as it came to.
    for seed in range(FLAGS.seeds):
        for name in names:
            variants = COMPARISONS[name].variants.values()
            runs += [comparison_run(variant | changes, seed, FLAGS.scale) for variant in variants]
    return list(dict.fromkeys(runs))


def main() -> None:
    runs = chosen_runs()
    if runs and not FLAGS.coco_dir:
        raise UserError("give the dataset by --coco_dir")
    output, docs = Path(FLAGS.output), Path(FLAGS.docs)
    for run in tqdm([run for run in runs if run.name not in load_results(docs)], unit="training", desc="paper"):
        train(run, output, coco_dir=FLAGS.coco_dir, weights=FLAGS.weights)
        write_report(output, docs)
    if not runs:
        write_report(output, docs)


if __name__ == "__main__":
    run_app(main)
