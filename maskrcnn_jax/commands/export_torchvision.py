"""Write the model of a run as a state dict of torchvision's MaskRCNN.

    maskrcnn-jax export-torchvision --workdir=runs/r50 [--checkpoint=best] --output=model.pth|model.safetensors

torchvision reads it with load_state_dict(..., strict=True). With --backbone_only the file holds the backbone alone,
for other trainings to start from: maskrcnn-jax train --weights=FILE.
"""

import argparse

from maskrcnn_jax.commands.app import add_run_options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_run_options(parser, required=True)
    parser.add_argument(
        "--backbone_only", action="store_true", help="write the backbone alone, as torchvision's classifiers have it"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, .pth (needs torch) or .safetensors"
    )


def main(options: argparse.Namespace) -> None:
    """Write the file."""
    from maskrcnn_jax.run_folder import load_run
    from maskrcnn_jax.weights.constructor import constructor
    from maskrcnn_jax.weights.convert import to_torchvision
    from maskrcnn_jax.weights.files import write_arrays
    from maskrcnn_jax.weights.torchvision import without_counterpart

    model, categories, trained = load_run(options.workdir, checkpoint=options.checkpoint)
    arrays = to_torchvision(model, backbone_only=options.backbone_only)
    write_arrays(options.output, arrays)
    print(f"{len(arrays)} arrays written to {options.output}")
    if options.backbone_only:
        return
    expression = constructor(trained, categories.num_classes)
    if expression is None:
        print("torchvision has no constructor for a network of these options; build its MaskRCNN from parts")
    else:
        print(f"{expression} has the arrays of this file")
    others = without_counterpart(trained.model)
    if others:
        print(f"torchvision's own model refuses them or finds something else, because of {', '.join(others)}")
