"""Write a model into one file that runs without this package: ONNX, or StableHLO.

    maskrcnn-jax export --workdir=runs/r50 --checkpoint=best --output=r50.onnx
    maskrcnn-jax export --workdir=runs/r50 --checkpoint=best --output=r50.mrcnn
    maskrcnn-jax export --weights=torchvision:maskrcnn_resnet50_fpn_v2 --output=coco.mrcnn \\
        --sizes=800x1088,1088x800 --int8 --coco_dir=COCO

.onnx is for OpenVINO, ONNX Runtime and others, .mrcnn (StableHLO) for JAX. --int8 stores the weights in a quarter of
the size; an ONNX file then computes with 8 bits too, and needs a dataset to measure the ranges of activations on.
--prune=0.3 removes that share of the channels inside the backbone's blocks and the box head. With a dataset, the AP
before and after is computed. docs/export.md explains more.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn_jax.commands.app import add_model_options, at_least, load
from maskrcnn_jax.errors import UserError

if TYPE_CHECKING:
    from maskrcnn_jax.inference.detect import Detect
    from maskrcnn_jax.inference.predictor import Predictor
    from maskrcnn_jax.models.mask_rcnn import MaskRCNN
    from maskrcnn_jax.options import Options

_TORCHVISION = (".pth", ".pt", ".safetensors")  # of another command
ENDINGS = {"onnx": ".onnx", "stablehlo": ".mrcnn"}  # of files, by their format


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_options(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, .onnx or .mrcnn")
    parser.add_argument("--format", choices=tuple(ENDINGS), help="of the file, which its ending tells if not given")
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=[],
        metavar="HEIGHTxWIDTH,...",
        help="padded sizes of images; if not given, those of the config, or any with ONNX, which takes at most one",
    )
    parser.add_argument(
        "--int8", action="store_true", help="store the weights in eight bits; with ONNX, compute with eight"
    )
    parser.add_argument(
        "--prune", type=float, default=0.0, metavar="SHARE", help="share of the channels to remove, below 1"
    )
    parser.add_argument(
        "--coco_dir",
        metavar="DIR",
        help="dataset for the AP before and after --int8 or --prune; --int8 with ONNX also measures ranges on it",
    )
    parser.add_argument("--split", help="of this dataset; data.eval_split of the config if not given")
    parser.add_argument(
        "--limit", type=at_least(0), default=0, metavar="N", help="evaluate only the first N images of the dataset"
    )


def main(options: argparse.Namespace) -> None:
    """Write the file, and evaluate what it computes."""
    form = _format(options)
    if options.coco_dir and not (options.int8 or options.prune):
        raise UserError("--coco_dir is for the AP that --int8 and --prune cost; give one of them, or use eval")
    if not options.coco_dir and (options.split or options.limit):
        raise UserError("--split and --limit choose images of a dataset; give it as --coco_dir, or leave them out")
    if form == "onnx" and options.int8 and not options.coco_dir:
        raise UserError("--int8 with ONNX measures the ranges of activations on images; give a dataset, --coco_dir")
    from maskrcnn_jax.inference.predictor import Predictor
    from maskrcnn_jax.inference.pruning import prune_channels
    from maskrcnn_jax.paths import local_path

    local_path(options.output, "the exported model")  # before the work
    model = load(options)
    pruned = prune_channels(model.network, options.prune) if options.prune else model.network
    smaller = Predictor(pruned, model.categories, model.options)
    export = _export_onnx if form == "onnx" else _export_stablehlo
    exported = export(smaller, options)
    print(f"{options.output} written, {Path(options.output).stat().st_size / 1e6:.1f} MB")
    if options.coco_dir:
        _print_cost(model, exported, options)


def _format(options: argparse.Namespace) -> str:
    """Return the format of the file, which --format and its ending must not contradict."""
    ending = Path(options.output).suffix
    if ending in _TORCHVISION:
        raise UserError(
            f"--output={options.output} is for torchvision; maskrcnn-jax export-torchvision writes .pth and "
            ".safetensors"
        )
    by_ending = next((form for form, known in ENDINGS.items() if known == ending), None)
    if by_ending is None:
        raise UserError(
            f"--output={options.output} ends in {ending or 'nothing'}; use .onnx for ONNX or .mrcnn for StableHLO"
        )
    if options.format not in (None, by_ending):
        raise UserError(
            f"--format={options.format} contradicts --output={options.output}; files of this format end in "
            f"{ENDINGS[options.format]}"
        )
    return by_ending


def _export_stablehlo(model: "Predictor", options: argparse.Namespace) -> "MaskRCNN":
    """Write the file and return a network that computes what it does."""
    from maskrcnn_jax.exporting.stablehlo import export_model, quantized_network

    export_model(model, options.output, sizes=options.sizes, int8=options.int8)
    return quantized_network(model.network) if options.int8 else model.network


def _export_onnx(model: "Predictor", options: argparse.Namespace) -> "MaskRCNN | Detect":
    """Write the file and return what computes what it does."""
    from maskrcnn_jax.exporting.onnx_file import export_onnx

    if not options.int8:
        export_onnx(model, options.output, sizes=options.sizes)
        return model.network
    from maskrcnn_jax.evaluation.evaluator import Evaluator
    from maskrcnn_jax.exporting.int8 import quantize_onnx
    from maskrcnn_jax.inference.runtimes import OnnxDetect, time_per_image
    from maskrcnn_jax.writing import replace_file

    batches = Evaluator(_evaluation_options(model, options), model.categories).batches()
    with tempfile.TemporaryDirectory() as folder:  # so that no file in float32 is left if this fails
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, sizes=options.sizes)
        before = OnnxDetect(path)
        quantize_onnx(path, batches)
        replace_file(options.output, path.read_bytes())
    after, batch = OnnxDetect(options.output), next(iter(batches))
    for name, detect in (("float32", before), ("8 bits", after)):
        print(
            f"{name}: {time_per_image(detect, batch.images, batch.sizes) * 1e3:.1f} ms per image in {detect.runtime}"
        )
    return after


def _print_cost(model: "Predictor", exported: "MaskRCNN | Detect", options: argparse.Namespace) -> None:
    """Evaluate the model and what is left of it in the file."""
    from maskrcnn_jax.evaluation.evaluator import Evaluator

    evaluate = Evaluator(_evaluation_options(model, options), model.categories)
    before, after = evaluate(model.network).metrics, evaluate(exported).metrics
    for name, metric in (("box", "bbox_AP"), ("mask", "segm_AP")):
        print(f"{name} AP {before[metric]:.4f}, as exported {after[metric]:.4f}")


def _evaluation_options(model: "Predictor", options: argparse.Namespace) -> "Options":
    """Return the options of evaluating on the dataset that the user named."""
    from maskrcnn_jax.api import evaluation_options

    return evaluation_options(model.options, coco_dir=options.coco_dir, split=options.split, limit=options.limit)


def _sizes(text: str) -> list[tuple[int, ...]]:
    wrong = [size for size in text.split(",") if not re.fullmatch(r"\d+x\d+", size)]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not HEIGHTxWIDTH, such as 800x1088")
    return [tuple(map(int, size.split("x"))) for size in text.split(",")]
