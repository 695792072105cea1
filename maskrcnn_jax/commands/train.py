"""Train a Mask R-CNN.

    maskrcnn-jax train --config=r50_fpn --workdir=runs/r50 --config.data.coco_dir=COCO
    maskrcnn-jax train --config=r50_fpn --workdir=runs/r50 --config.optim.lr=1e-4 --config.batch_size=8
    maskrcnn-jax train --config=own_dataset --weights=torchvision:maskrcnn_resnet50_fpn_v2 --workdir=runs/own \\
        --config.data.coco_dir=DIR
    maskrcnn-jax train --config=paper:table=1,row=3 --workdir=runs/paper_1_3 --config.data.coco_dir=COCO

Every field of the config can be changed with --config.FIELD=VALUE; docs/options.md lists them. A training that was
stopped resumes from its newest checkpoint when it is started again with the same --workdir.
"""

import argparse

import maskrcnn_jax as mr
from maskrcnn_jax.commands.app import add_process_options, at_least


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--config", required=True, help="name or file of a config, such as r50_fpn or my_config.py")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="folder for checkpoints, metrics and pictures; created"
    )
    parser.add_argument(
        "--weights",
        metavar="FILE|NAME",
        help="what a new run starts from: .pth, .safetensors, .pkl or published weights, of a model or a backbone",
    )
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        type=at_least(1),
        default=0,
        help="write a trace of so many steps into DIR/profile, from the third of this start on, for TensorBoard or "
        "Perfetto",
    )
    add_process_options(parser)


def main(options: argparse.Namespace) -> None:
    """Train."""
    mr.train(options.config, options.workdir, weights=options.weights, profile_steps=options.profile)
