"""Compute COCO's box and mask AP of a model.

    maskrcnn-jax eval --workdir=runs/r50 [--checkpoint=best] [--report=r50.html [--compare=runs/other]]
    maskrcnn-jax eval --weights=torchvision:maskrcnn_resnet50_fpn_v2 --coco_dir=COCO --output=DIR
    maskrcnn-jax eval --weights=model.pth --config=torchvision_r50_fpn_v2 --coco_dir=COCO --output=DIR

Writes metrics.json, detections.json and predictions.jpg. With --tta they are those with test-time augmentation, and
the AP without it is printed, too. The report is a page with tables, curves, precision and recall at a score, the
confusion between classes, and images to search by name, class, size and error. --compare shows the detections of
another run beside these.
"""

import argparse
import contextlib
from typing import TYPE_CHECKING

from maskrcnn_jax.commands.app import add_model_options, add_process_options, add_runtime_options, at_least, load
from maskrcnn_jax.commands.detection import add_detection_options, with_detection_options
from maskrcnn_jax.errors import UserError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

    from maskrcnn_jax.data.categories import Categories
    from maskrcnn_jax.evaluation.evaluator import Evaluation, Evaluator
    from maskrcnn_jax.evaluation.report_data import Run
    from maskrcnn_jax.options import Options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_options(parser)
    dataset = parser.add_mutually_exclusive_group()
    dataset.add_argument("--coco_dir", metavar="DIR", help="dataset to evaluate on instead of that of the training")
    dataset.add_argument("--tfds_dir", metavar="DIR", help="likewise, a folder that build-tfds wrote")
    parser.add_argument("--split", help="of the dataset; data.eval_split of the config if not given")
    parser.add_argument(
        "--limit",
        type=at_least(0),
        metavar="N",
        help="evaluate only the first N images; 0 means all. If not given, all of a dataset or split named here, else "
        "as many as data.eval_limit of the run",
    )
    add_detection_options(parser)
    parser.add_argument("--output", metavar="DIR", help="folder for the results; the workdir if not given")
    parser.add_argument("--report", metavar="FILE", help="HTML page to write")
    parser.add_argument(
        "--compare",
        metavar="DIR|FILE",
        help="another run on the same images, or its detections.json, to show beside this one in the report",
    )
    add_runtime_options(parser)
    add_process_options(parser)


def main(options: argparse.Namespace) -> None:
    """Evaluate."""
    if options.weights and not options.output:
        raise UserError("--weights needs --output, a folder for the results")
    if options.compare and not options.report:
        raise UserError("--compare shows another run in the report; give --report=FILE too")
    from maskrcnn_jax.api import evaluation_options, measure
    from maskrcnn_jax.distributed import is_first
    from maskrcnn_jax.evaluation.coco_metrics import format_table
    from maskrcnn_jax.evaluation.evaluator import Evaluator
    from maskrcnn_jax.inference.views import Augmentation
    from maskrcnn_jax.paths import as_path
    from maskrcnn_jax.writing import make_folder

    augmentation = Augmentation.parse(options.tta) if options.tta is not None else None
    model = with_detection_options(load(options), options)
    chosen = evaluation_options(
        model.options,
        coco_dir=options.coco_dir,
        tfds_dir=options.tfds_dir,
        split=options.split,
        limit=options.limit,
    )
    evaluator = Evaluator(chosen, model.categories)
    other = None
    if options.compare and is_first():
        other = read_run(options.compare, evaluator.truth, chosen.model.box_detections_per_img)
    evaluation = measure(evaluator, model, chosen.model, augmentation)
    output = as_path(options.output or options.workdir)
    make_folder(output)
    evaluator.write(output, evaluation)
    if not is_first():
        return
    print(format_table(evaluation.metrics))
    if options.report:
        _write_report(options, chosen, evaluator, evaluation, other)


def _write_report(
    options: argparse.Namespace,
    chosen: "Options",
    evaluator: "Evaluator",
    evaluation: "Evaluation",
    other: "Run | None",
) -> None:
    from maskrcnn_jax.evaluation.report import write_report
    from maskrcnn_jax.evaluation.report_data import Run
    from maskrcnn_jax.evaluation.run_summary import describe_options, summarize
    from maskrcnn_jax.paths import as_path
    from maskrcnn_jax.run_folder import load_options

    source, split = options.workdir or options.weights, chosen.data.eval_split
    model = f"{source}, checkpoint {options.checkpoint}" if options.workdir else source
    training = as_path(options.workdir) / "metrics.jsonl" if options.workdir else None
    summary = summarize(
        chosen,
        model=model + (f", test-time augmentation {options.tta}" if options.tta else ""),
        data=f"{split} of {chosen.data.coco_dir if chosen.data.source == 'coco' else chosen.data.tfds_dir}",
        training=training,
    )
    runs = [Run(source, evaluation.results, evaluation.metrics)]
    if other:
        runs.append(other)
        with contextlib.suppress(UserError):  # detections that are not in the folder of a run
            summary.append(("compared with", f"{other.name}, config {describe_options(load_options(other.name))}"))
    write_report(
        options.report,
        evaluator.truth,
        runs,
        title=f"{source} on {split}",
        read=evaluator.read_image,
        image_dir=evaluator.image_dir,
        summary=summary,
        training=training,
        max_detections=chosen.model.box_detections_per_img,
    )


def read_run(source: str, truth: "COCO", max_detections: int) -> "Run":
    """Read and evaluate the detections of another run on the same images."""
    from maskrcnn_jax.data.categories import Categories
    from maskrcnn_jax.evaluation.coco_metrics import evaluate
    from maskrcnn_jax.evaluation.detections_file import read_results
    from maskrcnn_jax.evaluation.report_data import Run
    from maskrcnn_jax.paths import as_path

    folder = as_path(source)
    if (folder / "categories.json").is_file():
        _check_categories(source, Categories.load(folder / "categories.json"), truth)
    path = folder / "detections.json" if folder.is_dir() else folder
    results = read_results(path, truth.imgs, truth.cats)
    return Run(str(path.parent), results, evaluate(truth, results, max_detections=max_detections))


def _check_categories(source: str, categories: "Categories", truth: "COCO") -> None:
    """Refuse a run that was trained on other classes under the same ids."""
    for category_id, name in zip(categories.ids, categories.names, strict=True):
        ours = truth.cats.get(category_id, {}).get("name", name)
        if ours != name:
            raise UserError(
                f"{source} was trained on other classes: category {category_id} is {name!r} there and {ours!r} here; "
                "compare runs on the same dataset"
            )
