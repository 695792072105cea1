"""Compile for TPUs or GPUs without having one: python tools/compile_for.py --config=r50_fpn --topology=v5e:4x4.

Reports how much of a chip's memory a training step takes (or detection, with --what=detect) and whether it fits, how
much it moves through HBM, what the chips exchange, and what in the program looks wrong. Nothing runs on a device; only
its compiler is needed: pip install "jax[tpu]", or "jax[cuda12]" for GPUs.

    python tools/compile_for.py --config=r50_fpn --topology=v5e:4x4 --config.batch_size=64
    python tools/compile_for.py --config=r50_fpn --topology=v5p:2x2x2 --slices=2 --json=report.json
    python tools/compile_for.py --config=r50_fpn --topology=h100:1x8 --what=detect
    python tools/compile_for.py --config=r50_fpn --topology=v6e:2x4 --sweep
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from ml_collections import ConfigDict

from maskrcnn_jax.commands.app import at_least, run_command
from maskrcnn_jax.config import to_options
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.writing import write_json
from tools.compiling.compiler import check_installed, compile_program
from tools.compiling.program import image_size
from tools.compiling.report import HEADER, as_row, as_text, make_report
from tools.compiling.sweep import Fit, largest_that_fits
from tools.compiling.targets import Target, parse_target


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    parser.add_argument("--config", required=True, help="name or file of a config, as for training")
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x4, v5p:2x2x2 or h100:2x8 (nodes x GPUs)"
    )
    parser.add_argument("--slices", type=at_least(1), default=1, metavar="N", help="number of such TPU slices")
    parser.add_argument(
        "--what", choices=["train", "detect"], default="train", help="a training step (default) or detection"
    )
    parser.add_argument("--num_classes", type=at_least(2), default=91, metavar="N", help="background included")
    parser.add_argument(
        "--num_objects", type=at_least(1), default=96, metavar="N", help="most objects in an image of the dataset"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="find the largest batch that fits, with and without model.remat"
    )
    parser.add_argument("--full", action="store_true", help="compile to the end: the size of the code, in minutes")
    parser.add_argument("--json", metavar="FILE", help="file for the report")
    parser.add_argument("--markdown", action="store_true", help="print a row of the table in docs/cluster.md")
    parser.add_argument("--keep", metavar="DIR", help="folder in which XLA's files are kept")


def main(options: argparse.Namespace) -> None:
    """Compile and report."""
    target = parse_target(options.topology, options.slices)
    check_installed(target)
    if options.sweep:
        reports = [report for remat in (False, True) if (report := largest_batch(options, target, remat=remat))]
        print("\n".join([HEADER, *(as_row(report, target) for report in reports)]))
    else:
        report = compile_and_report(make_settings(options, target), target, full=options.full, keep=options.keep)
        print(f"{HEADER}\n{as_row(report, target)}" if options.markdown else as_text(report, target))
    if options.json:
        write_json(options.json, {"sweep": reports} if options.sweep else report, indent=2)


def largest_batch(options: argparse.Namespace, target: Target, *, remat: bool) -> dict | None:
    """Return the report of the largest batch that fits, if any does."""
    unit = target.chips * (options.config.optim.accumulate if options.what == "train" else 1)
    options.config.model.remat = remat
    reports: dict[int, dict] = {}

    def measure(number: int) -> Fit:
        options.config.batch_size = number * unit
        report = reports[number] = compile_and_report(make_settings(options, target), target)
        size = report["memory_bytes"]["total"]
        verdict = "fits" if report["fits"] else "does not fit"
        print(f"remat {remat}, batch {number * unit}: {size / 2**30:.2f} GiB, {verdict}", file=sys.stderr, flush=True)
        return Fit(report["fits"], size)

    number = largest_that_fits(measure, target.chip.memory)
    return reports[number] if number else None


def make_settings(options: argparse.Namespace, target: Target) -> dict:
    """Return what the child process compiles.

    Raises:
        UserError: if an option is wrong, or the chips cannot share the batch.
    """
    config: ConfigDict = options.config
    checked = to_options(config)
    batch_size, parts = checked.batch_size, checked.optim.accumulate if options.what == "train" else 1
    if batch_size % (target.chips * parts):
        raise UserError(
            f"batch_size {batch_size} is not divisible by {target.chips} chips"
            + (f" times {parts} accumulation steps" if parts > 1 else "")
            + f"; use --config.batch_size={-(-batch_size // (target.chips * parts)) * target.chips * parts}"
        )
    return {
        "config": config.to_dict(),
        "topology": options.topology,
        "slices": options.slices,
        "what": options.what,
        "num_classes": options.num_classes,
        "num_objects": options.num_objects,
        "image_size": image_size(checked.data, train=options.what == "train"),
    }


def compile_and_report(settings: dict, target: Target, *, full: bool = False, keep: str | None = None) -> dict:
    """Compile a program in a child process and return the report."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return make_report(compile_program(settings, target, folder, full=full), target, settings)


if __name__ == "__main__":
    run_command(sys.modules[__name__])
