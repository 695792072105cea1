"""Compute COCO's box and mask AP of a model, trained here or elsewhere.

    python eval.py --workdir=runs/r50 [--split=val2017] [--limit=N]
    python eval.py --weights=NAME --coco_dir=COCO --output=DIR
    python eval.py --weights=FILE --config=configs/torchvision_r50_fpn_v2.py --coco_dir=COCO --output=DIR

Writes metrics.json, detections.json and predictions.jpg into --output, the workdir if not given. With
--report=FILE.html also a page with tables, curves, confusion between classes, the best and the worst images.
"""

from pathlib import Path

from absl import flags

from maskrcnn_jax.commands.app import define_model_flags, define_process_flags, find_config, load_model, run_app
from maskrcnn_jax.distributed import is_first
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import format_table
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.evaluation.report import write_report

FLAGS = flags.FLAGS
define_model_flags()
define_process_flags()
flags.DEFINE_string("coco_dir", None, "Evaluate on this dataset instead of the one trained on.")
flags.DEFINE_string("tfds_dir", None, "Likewise, on one that tools/build_tfds.py wrote.")
flags.DEFINE_string("split", None, "Evaluate this split instead of config.data.eval_split.")
flags.DEFINE_integer("limit", None, "Evaluate only the first images.", lower_bound=1)
flags.DEFINE_string("report", None, "HTML page to write.")
flags.DEFINE_string("output", None, "Folder for the results; the workdir if not given.")


def main() -> None:
    if FLAGS.weights and not FLAGS.output:
        raise UserError("--weights needs --output, a folder for the results")
    config = find_config()
    model, categories = load_model(config)
    config.unlock().eval_train_limit = 0  # of evaluations during training
    data = config.data
    if FLAGS.coco_dir and FLAGS.tfds_dir:
        raise UserError("--coco_dir and --tfds_dir exclude each other; give the one to evaluate on")
    for source, folder in (("coco", FLAGS.coco_dir), ("tfds", FLAGS.tfds_dir)):
        if folder:
            data.update({"source": source, f"{source}_dir": folder})
    data.eval_split = FLAGS.split or data.eval_split
    data.eval_limit = FLAGS.limit or data.eval_limit
    evaluator = Evaluator(config, categories)
    evaluation = evaluator(model)
    output = Path(FLAGS.output or FLAGS.workdir)
    output.mkdir(parents=True, exist_ok=True)
    evaluator.write(output, evaluation)
    if is_first():
        print(format_table(evaluation.metrics))
    if FLAGS.report and is_first():
        write_report(
            FLAGS.report,
            evaluator.truth,
            evaluation.results,
            evaluation.metrics,
            title=f"{FLAGS.workdir or FLAGS.weights} on {data.eval_split}",
            draw=lambda image_id: evaluator.draw_image(image_id, evaluation.results),
            training=Path(FLAGS.workdir) / "metrics.jsonl" if FLAGS.workdir else None,
        )


if __name__ == "__main__":
    run_app(main)
