"""Time this project, beside torchvision where wanted: python tools/benchmark.py SUBJECT [--against=torchvision].

Subjects: inference, train, ops, data, eval, compile, memory, scaling, export. docs/benchmarks.md says what rows mean.
Both sides get the same weights and images and take turns in one process. Prints a table; --json and --docs keep it.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it
# JAX would take three quarters of a GPU's memory from torch and from the processes that this one starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the reference runs on one

from maskrcnn_jax.commands.app import at_least, run_command
from maskrcnn_jax.errors import UserError
from tools.benchmarks.inputs import NARROW, Settings
from tools.benchmarks.tables import write_docs
from tools.benchmarks.timing import Row, cell, environment, table, write_json

SUBJECTS = ("inference", "train", "ops", "data", "eval", "compile", "memory", "scaling", "export")


def run(subject: str, settings: Settings) -> Iterable[Row]:
    """Measure one subject; a subject of many points yields each as soon as it is there."""
    # Imported only now: those subjects that start processes must not have used a device before.
    return importlib.import_module(f"tools.benchmarks.{subject}").run(settings)


def collect(rows: Iterable[Row]) -> tuple[list[Row], bool]:
    """Take rows as they are measured, telling of each; returns them, and whether Ctrl-C came before the last."""
    found, start = [], time.monotonic()
    try:
        for row in rows:
            elapsed = f"{time.monotonic() - start:6.0f} s"
            print(f"{elapsed}  {row.name}: {cell(row.ours, row.unit)}", file=sys.stderr, flush=True)
            found.append(row)
    except KeyboardInterrupt:
        return found, True
    return found, False


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    parser.add_argument("subject", choices=SUBJECTS, metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--against", choices=["torchvision"], help="measure the reference too, in turns")
    parser.add_argument("--json", metavar="FILE", help="file for all rows")
    parser.add_argument("--docs", metavar="FILE", help="document whose rows of this subject and device these replace")
    parser.add_argument("--html", metavar="FILE", help="file for the plots of scaling")
    parser.add_argument("--images", default="", metavar="DIR", help="images; synthetic shapes if not given")
    parser.add_argument(
        "--coco_dir",
        default=os.environ.get("COCO_DIR", ""),
        metavar="DIR",
        help="COCO-format dataset with val2017, for data",
    )
    numbers = {
        "num_images": "images of data and eval",
        "height": "of the resized images before padding, pixels",
        "width": "of the resized images before padding, pixels",
        "batch_size": "images in each pass",
        "rounds": "timed calls of each side",
    }
    for name, meaning in numbers.items():
        parser.add_argument(
            f"--{name}", type=at_least(0), default=0, metavar="N", help=f"{meaning}; 0: the subject's own"
        )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="", help="float32 on a CPU, bfloat16 on a GPU if not given"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and objects")
    parser.add_argument("--narrow", action="store_true", help="a network a hundredth of the size, to try the tool")


def main(options: argparse.Namespace) -> None:
    """Measure the subject."""
    subject = options.subject
    common = ("images", "coco_dir", "num_images", "height", "width", "batch_size", "rounds", "dtype", "seed")
    settings = Settings(
        against=options.against is not None,
        options=NARROW if options.narrow else {},
        **{name: getattr(options, name) for name in common},
    )
    if options.html and subject != "scaling":
        raise UserError("--html plots scaling; leave it out, or measure scaling")
    rows, interrupted = collect(run(subject, settings))
    print(table(rows))
    if options.json:
        write_json(options.json, subject, rows)
    if options.docs and not interrupted:  # its rows would take the place of all that the document has
        write_docs(options.docs, subject, rows, environment())
    if options.html:
        from tools.benchmarks.scaling import write_html

        write_html(options.html, rows, environment())
    if interrupted:
        print("interrupted: these are the rows so far", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run_command(sys.modules[__name__])
