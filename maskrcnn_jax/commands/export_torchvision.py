"""Write a trained model as a state dict of torchvision's MaskRCNN, for load_state_dict(..., strict=True).

python tools/export_torchvision.py --workdir=runs/r50 --output=model.pth|model.safetensors [--checkpoint=best]

With --backbone_only it writes the backbone alone, for another training to start from: train.py --weights=FILE.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from absl import flags

from configs import base
from maskrcnn_jax.commands.app import run_app
from maskrcnn_jax.training.checkpoint import load_config, restore_model
from maskrcnn_jax.weights.convert import to_torchvision
from maskrcnn_jax.weights.files import write_arrays
from maskrcnn_jax.weights.torchvision import without_counterpart

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder that train.py wrote.", required=True)
flags.DEFINE_string("checkpoint", "latest", "latest, best (by mask AP) or a step.")
flags.DEFINE_bool("backbone_only", False, "Write the backbone alone, as torchvision's classifiers have it.")
flags.DEFINE_string("output", None, "File to write, .pth or .safetensors.", required=True)


def main() -> None:
    options = load_config(FLAGS.workdir, base.get_config()).model
    model, _ = restore_model(FLAGS.workdir, options, which=FLAGS.checkpoint)
    arrays = to_torchvision(model, backbone_only=FLAGS.backbone_only)
    write_arrays(FLAGS.output, arrays)
    print(f"{len(arrays)} arrays written to {FLAGS.output}")
    others = without_counterpart(options)
    if others and not FLAGS.backbone_only:
        print(f"torchvision's own model refuses them or finds something else, because of {', '.join(others)}")


if __name__ == "__main__":
    run_app(main)
