"""Check a dataset in COCO's format before training on it.

    python tools/check_dataset.py DIR [--config=configs/r50_fpn.py] [--report=check.html] [--fix=cleaned.json]
    python tools/check_dataset.py FILE.json --images=DIR

DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json; --train_split and --val_split say what
the splits are called otherwise. Lists errors (training would stop, or learn something wrong) and warnings, and exits
with status 1 if there are errors. --fix writes a cleaned copy of the annotations of the training split, or of FILE.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from maskrcnn_jax.checking.dataset import Options, Split, check_dataset
from maskrcnn_jax.checking.dataset_page import plain, summary, write_report
from maskrcnn_jax.checking.mend import fix_dataset
from maskrcnn_jax.commands.app import run_app

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the options; only where this is the program, since other tools have options of the same names."""
    base = Path(__file__).resolve().parent.parent / "configs" / "base.py"
    config_flags.DEFINE_config_file("config", str(base), "What it is for: anchors, sizes, options of the data.")
    flags.DEFINE_string("dataset", "", "Folder or annotation file; may be given as the first word.")
    flags.DEFINE_string("train_split", None, "Instead of config.data.train_split.")
    flags.DEFINE_string("val_split", None, "Instead of config.data.eval_split.")
    flags.DEFINE_string("images", None, "Folder of the images, with an annotation file.")
    flags.DEFINE_bool("open_images", True, "Also open the images; without, their files are only looked for.")
    flags.DEFINE_string("report", None, "HTML page to write, with pictures of examples.")
    flags.DEFINE_string("fix", None, "Cleaned copy of the annotations to write.")


def _progress(items: Iterable, total: int, description: str) -> Iterable:
    return tqdm(items, total=total, desc=description, unit="image")


def _print_findings(splits: list[Split]) -> None:
    for split in splits:
        for finding in split.findings:
            kind = "error" if finding.is_error else "warning"
            print(plain(f"{kind}: {split.name}: {finding.sentence}"))
            for example in finding.examples:
                print(plain(f"    {example}"))
            if 0 < len(finding.examples) < len(finding.rows):
                print(f"    and {len(finding.rows) - len(finding.examples)} more")
    print(summary(splits))


def main() -> None:
    config = FLAGS.config.unlock()
    data = config.data
    data.train_split = FLAGS.train_split or data.train_split
    data.eval_split = FLAGS.val_split or data.eval_split
    options = Options.from_config(config, images=FLAGS.open_images)
    splits = check_dataset(FLAGS.dataset or data.coco_dir, options, image_dir=FLAGS.images, progress=_progress)
    _print_findings(splits)
    if FLAGS.report:
        write_report(Path(FLAGS.report), splits)
    if FLAGS.fix:
        cleaned, changes = fix_dataset(splits, FLAGS.fix, options, progress=_progress)
        for change, names in changes.items():
            print(plain(f"  {len(names)} {change}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"))
        print(plain(f"The cleaned copy is {FLAGS.fix}:"))
        _print_findings([cleaned])
    if any(split.num_errors for split in splits):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--dataset={sys.argv[1]}"
    run_app(main)
