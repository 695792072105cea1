"""Write a trained model into one file that runs without this package; docs/export.md says how.

    python tools/export.py --workdir=runs/r50 --checkpoint=best --output=r50.mrcnn
    python tools/export.py --weights=NAME --output=coco.mrcnn --sizes=800x1088,1088x800 --int8 --coco_dir=COCO

With --int8 the weights take a quarter of the size; given a dataset, it also prints the AP that this costs.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from absl import flags

from maskrcnn_jax.cli import define_model_flags, find_config, load_model, run_app
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.evaluation.predictor import Predictor
from maskrcnn_jax.export import export_model, quantized_network

FLAGS = flags.FLAGS
define_model_flags()
flags.DEFINE_string("output", None, "File to write.", required=True)
flags.DEFINE_list("sizes", [], "Padded sizes of images, HEIGHTxWIDTH; those of the config if not given.")
flags.DEFINE_bool("int8", False, "Weights in eight bits.")
flags.DEFINE_string("coco_dir", None, "With --int8: dataset on which AP before and after is computed.")
flags.DEFINE_string("split", None, "Likewise: its split, config.data.eval_split if not given.")
flags.DEFINE_integer("limit", 0, "Likewise: only its first images; 0 is all.", lower_bound=0)


def main() -> None:
    wrong = [size for size in FLAGS.sizes if not re.fullmatch(r"\d+x\d+", size)]
    if wrong:
        raise UserError(f"--sizes={wrong[0]} is no size; write HEIGHTxWIDTH, such as 800x1088")
    if FLAGS.coco_dir and not FLAGS.int8:
        raise UserError("--coco_dir is for the AP that --int8 costs; give both, or use eval.py")
    config = find_config()
    predictor = Predictor(*load_model(config), config)
    sizes = [tuple(map(int, size.split("x"))) for size in FLAGS.sizes]
    export_model(predictor, FLAGS.output, sizes=sizes, int8=FLAGS.int8)
    print(f"{FLAGS.output} written, {Path(FLAGS.output).stat().st_size / 1e6:.1f} MB")
    if FLAGS.coco_dir:
        _print_cost(predictor)


def _print_cost(predictor: Predictor) -> None:
    """Evaluate the model and what is left of it in eight bits."""
    config = predictor.config
    config.unlock().eval_train_limit = 0
    config.data.update({"source": "coco", "coco_dir": FLAGS.coco_dir, "eval_limit": FLAGS.limit})
    config.data.eval_split = FLAGS.split or config.data.eval_split
    evaluate = Evaluator(config, predictor.categories)
    before = evaluate(predictor.network).metrics
    after = evaluate(quantized_network(predictor.network)).metrics
    for name, metric in (("box", "bbox_AP"), ("mask", "segm_AP")):
        print(f"{name} AP {before[metric]:.4f}, in eight bits {after[metric]:.4f}")


if __name__ == "__main__":
    run_app(main)
