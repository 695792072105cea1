"""Compute COCO's box and mask AP of a model.

    maskrcnn-jax eval --workdir=runs/r50 [--checkpoint=best] [--report=r50.html]
    maskrcnn-jax eval --weights=torchvision:maskrcnn_resnet50_fpn_v2 --coco_dir=COCO --output=DIR
    maskrcnn-jax eval --weights=model.pth --config=torchvision_r50_fpn_v2 --coco_dir=COCO --output=DIR

Writes metrics.json, detections.json and predictions.jpg. The report is a page with tables, curves, the confusion
between classes, and the best and the worst images.
"""

import argparse

from maskrcnn_jax.commands.app import add_model_options, add_process_options, add_runtime_options, at_least, load
from maskrcnn_jax.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_options(parser)
    dataset = parser.add_mutually_exclusive_group()
    dataset.add_argument("--coco_dir", metavar="DIR", help="dataset to evaluate on instead of that of the training")
    dataset.add_argument("--tfds_dir", metavar="DIR", help="likewise, a folder that build-tfds wrote")
    parser.add_argument("--split", help="of the dataset; data.eval_split of the config if not given")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="evaluate only the first N images")
    parser.add_argument(
        "--max_detections",
        type=at_least(1),
        metavar="N",
        help="detections of an image instead of model.box_detections_per_img; above 100, all metrics count as many",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the results; the workdir if not given")
    parser.add_argument("--report", metavar="FILE", help="HTML page to write")
    add_runtime_options(parser)
    add_process_options(parser)


def main(options: argparse.Namespace) -> None:
    """Evaluate."""
    if options.weights and not options.output:
        raise UserError("--weights needs --output, a folder for the results")
    from maskrcnn_jax.api import evaluation_options, for_evaluation
    from maskrcnn_jax.distributed import is_first
    from maskrcnn_jax.evaluation.coco_metrics import format_table
    from maskrcnn_jax.evaluation.evaluator import Evaluator
    from maskrcnn_jax.evaluation.report import write_report
    from maskrcnn_jax.paths import as_path
    from maskrcnn_jax.writing import make_folder

    model = load(options)
    chosen = evaluation_options(
        model.options,
        coco_dir=options.coco_dir,
        tfds_dir=options.tfds_dir,
        split=options.split,
        limit=options.limit,
        max_detections=options.max_detections,
    )
    evaluator = Evaluator(chosen, model.categories)
    evaluation = evaluator(for_evaluation(model, chosen.model))
    output = as_path(options.output or options.workdir)
    make_folder(output)
    evaluator.write(output, evaluation)
    if not is_first():
        return
    print(format_table(evaluation.metrics))
    if options.report:
        write_report(
            options.report,
            evaluator.truth,
            evaluation.results,
            evaluation.metrics,
            title=f"{options.workdir or options.weights} on {chosen.data.eval_split}",
            draw=lambda image_id: evaluator.draw_image(image_id, evaluation.results),
            training=as_path(options.workdir) / "metrics.jsonl" if options.workdir else None,
            max_detections=chosen.model.box_detections_per_img,
        )
