"""Write a dataset in COCO's format as a TFDS dataset: few large files instead of many small ones.

    maskrcnn-jax build-tfds --coco_dir=COCO --tfds_dir=TFDS [--splits=train2017,val2017]
    maskrcnn-jax train --config=r50_fpn --workdir=runs/r50 --config.data.source=tfds --config.data.tfds_dir=TFDS

Training and evaluation then need only the folder TFDS, and give the same bits as from COCO. Every image is decoded
once, so that broken images are found now instead of in training.
"""

import argparse

from maskrcnn_jax.commands.app import comma_separated


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--coco_dir", required=True, metavar="DIR", help="folder with annotations/instances_*.json and images"
    )
    parser.add_argument("--tfds_dir", required=True, metavar="DIR", help="where the dataset goes (TFDS's data_dir)")
    parser.add_argument(
        "--splits",
        type=comma_separated,
        metavar="SPLIT,...",
        help="splits to write; all that have annotations if not given",
    )
    parser.add_argument(
        "--skip_broken",
        action="store_true",
        help="also store images that cannot be read, for trainings with data.skip_broken",
    )


def main(options: argparse.Namespace) -> None:
    """Write the dataset."""
    from maskrcnn_jax.data.tfds_builder import build

    folder = build(options.coco_dir, options.tfds_dir, splits=options.splits, skip_broken=options.skip_broken)
    print(f"{folder} written; train on it with --config.data.source=tfds --config.data.tfds_dir={options.tfds_dir}")
