"""Write a trained model into one file that runs without this package; docs/export.md says how.

    python tools/export.py --workdir=runs/r50 --checkpoint=best --output=r50.mrcnn
    python tools/export.py --weights=NAME --output=coco.mrcnn --sizes=800x1088,1088x800 --int8 --coco_dir=COCO

With --int8 the weights take a quarter of the size, with --prune=0.3 that share of the channels inside the backbone's
blocks and the box head is left out; given a dataset, it also prints the AP that this costs.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from absl import flags
from ml_collections import ConfigDict

from maskrcnn_jax.commands.app import define_model_flags, find_config, load_model, run_app
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.inference.export import export_model, quantized_network
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.inference.pruning import prune_channels
from maskrcnn_jax.models.mask_rcnn import MaskRCNN

FLAGS = flags.FLAGS
define_model_flags()
flags.DEFINE_string("output", None, "File to write.", required=True)
flags.DEFINE_list("sizes", [], "Padded sizes of images, HEIGHTxWIDTH; those of the config if not given.")
flags.DEFINE_bool("int8", False, "Weights in eight bits.")
flags.DEFINE_float("prune", 0, "Share of the channels inside blocks that is left out, below 1.")
flags.DEFINE_string("coco_dir", None, "With these two: dataset on which AP before and after is computed.")
flags.DEFINE_string("split", None, "Likewise: its split, config.data.eval_split if not given.")
flags.DEFINE_integer("limit", 0, "Likewise: only its first images; 0 is all.", lower_bound=0)


def main() -> None:
    wrong = [size for size in FLAGS.sizes if not re.fullmatch(r"\d+x\d+", size)]
    if wrong:
        raise UserError(f"--sizes={wrong[0]} is no size; write HEIGHTxWIDTH, such as 800x1088")
    if FLAGS.coco_dir and not (FLAGS.int8 or FLAGS.prune):
        raise UserError("--coco_dir is for the AP that --int8 and --prune cost; give one of them, or use eval.py")
    config = find_config()
    network, categories = load_model(config)
    pruned = prune_channels(network, FLAGS.prune) if FLAGS.prune else network
    sizes = [tuple(map(int, size.split("x"))) for size in FLAGS.sizes]
    export_model(Predictor(pruned, categories, config), FLAGS.output, sizes=sizes, int8=FLAGS.int8)
    print(f"{FLAGS.output} written, {Path(FLAGS.output).stat().st_size / 1e6:.1f} MB")
    if FLAGS.coco_dir:
        _print_cost(network, quantized_network(pruned) if FLAGS.int8 else pruned, categories, config)


def _print_cost(network: MaskRCNN, exported: MaskRCNN, categories: Categories, config: ConfigDict) -> None:
    """Evaluate the model and what is left of it in the file."""
    config.unlock().eval_train_limit = 0
    config.data.update({"source": "coco", "coco_dir": FLAGS.coco_dir, "eval_limit": FLAGS.limit})
    config.data.eval_split = FLAGS.split or config.data.eval_split
    evaluate = Evaluator(config, categories)
    before, after = evaluate(network).metrics, evaluate(exported).metrics
    for name, metric in (("box", "bbox_AP"), ("mask", "segm_AP")):
        print(f"{name} AP {before[metric]:.4f}, as exported {after[metric]:.4f}")


if __name__ == "__main__":
    run_app(main)
