"""Write a COCO-format dataset as a TFDS dataset with masks, coco_instances: few large files instead of many.

    python tools/build_tfds.py --coco_dir=COCO --tfds_dir=TFDS [--splits=train2017,val2017]
    python train.py --config=configs/r50_fpn.py --workdir=runs/r50 \
        --config.data.source=tfds --config.data.tfds_dir=TFDS

Training and evaluation then need nothing but the folder TFDS, and give the same bits as from COCO. Every image is
decoded once, to find the broken ones before training does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from absl import flags

from maskrcnn_jax.commands.app import run_app
from maskrcnn_jax.data.tfds_builder import build

FLAGS = flags.FLAGS
flags.DEFINE_string("coco_dir", None, "Folder with annotations/instances_*.json and images.", required=True)
flags.DEFINE_string("tfds_dir", None, "Where the dataset goes: TFDS's data_dir.", required=True)
flags.DEFINE_list("splits", None, "Splits to write; all that have annotations if not given.")
flags.DEFINE_bool("skip_broken", False, "Keep images that cannot be read, for training with data.skip_broken.")


def main() -> None:
    folder = build(FLAGS.coco_dir, FLAGS.tfds_dir, splits=FLAGS.splits, skip_broken=FLAGS.skip_broken)
    print(f"{folder} written; read it by --config.data.source=tfds --config.data.tfds_dir={FLAGS.tfds_dir}")


if __name__ == "__main__":
    run_app(main)
