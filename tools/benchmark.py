"""Time this project, beside torchvision where wanted: python tools/benchmark.py SUBJECT [--against=torchvision].

Subjects: inference, train, ops, data, eval, compile, memory, scaling; docs/benchmarks.md says what each row means.
Both sides get the same weights and images and take turns in one process. Prints a table; --json and --docs keep it.
"""

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

from absl import flags

from maskrcnn_jax.commands.app import run_app
from tools.benchmarks.inputs import NARROW, Settings
from tools.benchmarks.tables import write_docs
from tools.benchmarks.timing import Row, cell, environment, table, write_json

SUBJECTS = ("inference", "train", "ops", "data", "eval", "compile", "memory", "scaling")


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


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the options; only where this is the program, since other tools have options of the same names."""
    flags.DEFINE_enum("against", None, ["torchvision"], "Measure the reference too, in turns.")
    flags.DEFINE_string("json", None, "File for all rows.")
    flags.DEFINE_string("docs", None, "Document whose rows of this subject and device these replace.")
    flags.DEFINE_string("html", None, "File for the plots of scaling.")
    flags.DEFINE_string("images", "", "Folder of images; synthetic shapes if not given.")
    flags.DEFINE_string("coco_dir", os.environ.get("COCO_DIR", ""), "COCO-format dataset with val2017, for data.")
    flags.DEFINE_integer("num_images", 0, "Images of data and eval; 0 means the subject's own number.", lower_bound=0)
    flags.DEFINE_integer(
        "height", 0, "Of the resized images before padding; 0 means the subject's own.", lower_bound=0
    )
    flags.DEFINE_integer("width", 0, "Likewise.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 0, "Images in each pass; 0 means the subject's own.", lower_bound=0)
    flags.DEFINE_integer("rounds", 0, "Timed calls of each side; 0 means the subject's own number.", lower_bound=0)
    flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Default: float32 on a CPU, bfloat16 on a GPU.")
    flags.DEFINE_integer("seed", 0, "Of weights, images and objects.")
    flags.DEFINE_bool("narrow", False, "A network a hundredth of the size, to try the tool.")
    # run_app takes options only, so that the subject becomes one.
    flags.DEFINE_enum("subject", None, SUBJECTS, "What to measure; may be given as the first word.", required=True)


def main() -> None:
    subject = FLAGS.subject
    common = ("images", "coco_dir", "num_images", "height", "width", "batch_size", "rounds", "dtype", "seed")
    settings = Settings(
        against=FLAGS.against is not None,
        options=NARROW if FLAGS.narrow else {},
        **{name: FLAGS[name].value for name in common},
    )
    rows, interrupted = collect(run(subject, settings))
    print(table(rows))
    if FLAGS.json:
        write_json(FLAGS.json, subject, rows)
    if FLAGS.docs and not interrupted:  # its rows would take the place of all that the document has
        write_docs(FLAGS.docs, subject, rows, environment())
    if FLAGS.html and subject == "scaling":
        from tools.benchmarks.scaling import write_html

        write_html(FLAGS.html, rows, environment())
    if interrupted:
        print("interrupted: these are the rows so far", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    define_flags()
    if len(sys.argv) > 1 and sys.argv[1] in SUBJECTS:
        sys.argv[1] = f"--subject={sys.argv[1]}"
    run_app(main)
