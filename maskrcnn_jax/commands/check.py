"""Check a dataset in COCO's format before training on it.

    python tools/check_dataset.py DIR [--config=configs/r50_fpn.py] [--report=check.html] [--fix=cleaned.json]
    python tools/check_dataset.py FILE.json --images=DIR

DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json; --train_split and --val_split say what
the splits are called otherwise. Lists errors (training would stop, or learn something wrong) and warnings, and exits
with status 1 if there are errors. --fix writes a cleaned copy of the annotations of the training split, or of FILE.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from maskrcnn_jax.checking.dataset import Options, Split, check_split, compare_splits
from maskrcnn_jax.checking.dataset_page import plain, summary, write_report
from maskrcnn_jax.checking.mend import mend
from maskrcnn_jax.commands.app import run_app
from maskrcnn_jax.data.coco import annotations_name
from maskrcnn_jax.data.dataset import locate
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.training.check_data import anchors_of

ROUNDS = 3  # of mending: what was mended may show what else is wrong

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


def check(config: ConfigDict, dataset: str, images: str | None, open_images: bool = True) -> list[Split]:
    """Check a dataset, or one annotation file with the images in ``images``.

    Raises:
      UserError: there is no such dataset.
    """
    data = config.data
    options = Options(
        anchors=anchors_of(config),
        channels=config.model.in_channels,
        skip_broken=data.skip_broken,
        keep_unlisted=data.ignore_regions,
        contiguous_labels=data.contiguous_labels,
        images=open_images,
        threads=data.threads,
    )

    def progress(items, total, what):
        return tqdm(items, total=total, desc=what, unit="image")

    if os.path.isfile(dataset):
        if not images or not os.path.isdir(images):
            raise UserError(f"--images={images or ''} must name the folder with the images of {dataset}")
        return [check_split(Path(dataset).stem, Path(dataset), Path(images), options, progress=progress)]
    training = check_split(data.train_split, *locate(dataset, data.train_split), options, progress=progress)
    if not any((Path(dataset) / part).exists() for part in (data.eval_split, annotations_name(data.eval_split))):
        print(f"{dataset} has no split {data.eval_split}: training needs --config.eval_every=0 then")
        return [training]
    evaluated = check_split(
        data.eval_split, *locate(dataset, data.eval_split), options, evaluated=True, progress=progress
    )
    return list(compare_splits(training, evaluated))


def fix(config: ConfigDict, splits: list[Split], output: Path) -> None:
    """Write the cleaned copy of the first split, check it, and say what was done and what is left.

    Raises:
      UserError: it cannot be mended or written.
    """
    split = splits[0]
    if any(output.resolve() == s.json_path.resolve() for s in splits):
        raise UserError(f"--fix={output} would overwrite the annotations; give another name")
    for _ in range(ROUNDS):
        for what, names in mend(split, output).items():
            print(plain(f"  {len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"))
        (split,) = check(config, str(output), str(split.image_dir), FLAGS.open_images)
        if not split.num_errors:
            break
    print(plain(f"{output} is written: {summary([split])}"))
    for finding in split.findings:
        print(plain(f"  {finding.sentence}"))


def main() -> None:
    config = FLAGS.config.unlock()
    data = config.data
    data.train_split = FLAGS.train_split or data.train_split
    data.eval_split = FLAGS.val_split or data.eval_split
    splits = check(config, FLAGS.dataset or data.coco_dir, FLAGS.images, FLAGS.open_images)
    for split in splits:
        for finding in split.findings:
            kind = "error" if finding.is_error else "warning"
            print(plain(f"{kind}: {split.name}: {finding.sentence}"))
            for example in finding.examples:
                print(plain(f"    {example}"))
    print(summary(splits))
    if FLAGS.report:
        write_report(Path(FLAGS.report), splits)
    if FLAGS.fix:
        fix(config, splits, Path(FLAGS.fix))
    if any(split.num_errors for split in splits):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--dataset={sys.argv[1]}"
    run_app(main)
