"""Train a Mask R-CNN: python train.py --config=configs/r50_fpn.py --workdir=runs/r50 [--config.FIELD=VALUE ...]

With --weights=FILE_OR_NAME it starts from the weights of torchvision or detectron2, of a whole model or of a backbone.
Run again with the same --workdir, it goes on from the newest checkpoint there. configs/base.py explains every field.
"""

from absl import flags
from ml_collections import config_flags

from maskrcnn_jax.commands.app import define_process_flags, run_app
from maskrcnn_jax.distributed import is_first
from maskrcnn_jax.evaluation.coco_metrics import format_table
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.training.loop import train
from maskrcnn_jax.weights.convert import load_weights
from maskrcnn_jax.weights.files import read_arrays
from maskrcnn_jax.weights.published import resolve

FLAGS = flags.FLAGS
define_process_flags()
config_flags.DEFINE_config_file("config", None, "Config file, such as configs/r50_fpn.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures; resumed if it has some.")
flags.DEFINE_string("weights", None, "Start from: .pth, .safetensors, .pkl or a name, see weights/published.py.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    config = FLAGS.config

    def make_evaluate(categories):
        if not config.eval_every:
            return None
        evaluator = Evaluator(config, categories)

        def evaluate(model):
            evaluation = evaluator(model)
            evaluator.write(FLAGS.workdir, evaluation)
            if is_first():
                print("\n" + format_table(evaluation.metrics))
            return evaluation

        return evaluate

    def initialise(model):
        table = load_weights(model, read_arrays(resolve(FLAGS.weights)), source=FLAGS.weights, partial=True)
        if is_first():
            print(table)

    train(
        config,
        FLAGS.workdir,
        make_evaluate=make_evaluate,
        initialise=initialise if FLAGS.weights else None,
    )


if __name__ == "__main__":
    run_app(main)
