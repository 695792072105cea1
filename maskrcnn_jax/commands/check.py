"""Check a dataset in COCO's format before training on it.

    maskrcnn-jax check DIR [--config=r50_fpn] [--report=check.html] [--fix=cleaned.json]
    maskrcnn-jax check FILE.json --images=DIR

DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json; --train_split and --val_split name other
splits. Lists errors (training would stop, or learn something wrong) and warnings, and exits with status 1 if there are
errors. --fix writes a cleaned copy of the annotations of the training split, or of FILE.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

import maskrcnn_jax as mr
from maskrcnn_jax.checking.dataset import Options, Split, check_split, compare_splits
from maskrcnn_jax.checking.dataset_page import plain, summary, write_report
from maskrcnn_jax.checking.mend import mend
from maskrcnn_jax.config import to_options
from maskrcnn_jax.data.coco import annotations_name, locate
from maskrcnn_jax.errors import UserError

ROUNDS = 3  # of mending: what was mended may show what else is wrong


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "dataset", nargs="?", help="folder or annotation file; data.coco_dir of the config if not given"
    )
    parser.add_argument(
        "--config",
        default=mr.default_config(),
        help="what the dataset is for, by name or file: sizes of anchors and images, options of the data",
    )
    parser.add_argument("--train_split", metavar="SPLIT", help="data.train_split of the config if not given")
    parser.add_argument("--val_split", metavar="SPLIT", help="data.eval_split of the config if not given")
    parser.add_argument("--images", metavar="DIR", help="folder of the images of an annotation file")
    parser.add_argument(
        "--noopen_images", dest="open_images", action="store_false", help="only look whether the image files exist"
    )
    parser.add_argument("--report", metavar="FILE", help="HTML page to write, with pictures of examples")
    parser.add_argument("--fix", metavar="FILE", help="cleaned copy of the annotations to write")


def check(config: mr.Options, dataset: str, images: str | None, open_images: bool = True) -> list[Split]:
    """Check a dataset, or one annotation file with the images in ``images``.

    Raises:
      UserError: there is no such dataset.
    """
    from maskrcnn_jax.training.check_data import anchors_of

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


def fix(config: mr.Options, splits: list[Split], output: Path, open_images: bool) -> None:
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
        (split,) = check(config, str(output), str(split.image_dir), open_images)
        if not split.num_errors:
            break
    print(plain(f"{output} is written: {summary([split])}"))
    for finding in split.findings:
        print(plain(f"  {finding.sentence}"))


def main(options: argparse.Namespace) -> None:
    """Check the dataset."""
    data = options.config.unlock().data
    data.train_split = options.train_split or data.train_split
    data.eval_split = options.val_split or data.eval_split
    config = to_options(options.config)
    splits = check(config, options.dataset or data.coco_dir, options.images, options.open_images)
    for split in splits:
        for finding in split.findings:
            kind = "error" if finding.is_error else "warning"
            print(plain(f"{kind}: {split.name}: {finding.sentence}"))
            for example in finding.examples:
                print(plain(f"    {example}"))
    print(summary(splits))
    if options.report:
        write_report(Path(options.report), splits)
    if options.fix:
        fix(config, splits, Path(options.fix), options.open_images)
    if any(split.num_errors for split in splits):
        sys.exit(1)
