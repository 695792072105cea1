"""Check a dataset before training on it.

    maskrcnn-jax check DIR [--config=r50_fpn] [--report=check.html] [--fix=cleaned.json]
    maskrcnn-jax check FILE.json --images=DIR
    maskrcnn-jax check DIR --config=r50_fpn --augmented=sheet.jpg

DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json, or another layout that convert knows;
--train_split and --val_split name other splits. Lists errors (training would stop, or learn something wrong) and
warnings, and exits with status 1 if there are errors. --fix writes a cleaned copy of the annotations of the training
split, or of FILE. --augmented draws what training sees: the first images with masks and boxes, augmented as the config
says.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from maskrcnn_jax.checking.dataset import Split, check_dataset
from maskrcnn_jax.checking.dataset_page import printable, summary, write_report
from maskrcnn_jax.checking.mend import fix_dataset
from maskrcnn_jax.config import default_config, to_options
from maskrcnn_jax.converting.convert import in_coco_format
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import as_path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "dataset", nargs="?", help="folder or annotation file; data.coco_dir of the config if not given"
    )
    parser.add_argument(
        "--config",
        default=default_config(),
        help="what the dataset is for, by name or file: sizes of anchors and images, options of the data",
    )
    parser.add_argument("--train_split", metavar="SPLIT", help="data.train_split of the config if not given")
    parser.add_argument("--val_split", metavar="SPLIT", help="data.eval_split of the config if not given")
    parser.add_argument("--images", metavar="DIR", help="folder of the images of an annotation file")
    parser.add_argument(
        "--noopen_images", dest="open_images", action="store_false", help="only look whether the image files exist"
    )
    parser.add_argument("--report", metavar="FILE", help="HTML page to write, with pictures of examples")
    parser.add_argument("--augmented", metavar="FILE", help="picture to write of images as training sees them")
    parser.add_argument("--fix", metavar="FILE", help="cleaned copy of the annotations to write")


def _progress(items: Iterable, total: int, description: str) -> Iterable:
    return tqdm(items, total=total, desc=description, unit="image")


def _print_findings(splits: list[Split]) -> None:
    for split in splits:
        for finding in split.findings:
            kind = "error" if finding.is_error else "warning"
            print(printable(f"{kind}: {split.name}: {finding.sentence}"))
            for example in finding.examples:
                print(printable(f"    {example}"))
            if 0 < len(finding.examples) < len(finding.rows):
                print(f"    and {len(finding.rows) - len(finding.examples)} more")
    print(summary(splits))


def _draw_augmented(path: str, config: Options, folder: Path) -> None:
    from maskrcnn_jax.checking.training_sheet import write_sheet  # imports Grain

    if not folder.is_dir():
        raise UserError(f"--augmented needs the folder of a dataset, not the file {folder}")
    # Which images val_share holds out, a training draws first.
    data = replace(config.data, source="coco", coco_dir=str(folder), val_share=0.0)
    write_sheet(path, replace(config, data=data))


def main(options: argparse.Namespace) -> None:
    """Check the dataset."""
    data = options.config.unlock().data
    data.train_split = options.train_split or data.train_split
    data.eval_split = options.val_split or data.eval_split
    config, how = to_options(options.config), {"open_images": options.open_images, "progress": _progress}
    dataset = options.dataset or config.data.coco_dir
    with in_coco_format(dataset) as folder:
        if options.fix and folder != as_path(dataset):
            raise UserError(
                f"--fix mends annotations in COCO's format; run maskrcnn-jax convert {dataset} OUT and check OUT"
            )
        splits = check_dataset(
            dataset if folder == as_path(dataset) else folder, config, image_dir=options.images, **how
        )
        _print_findings(splits)
        if options.report:
            write_report(as_path(options.report), splits)
        if options.augmented:
            _draw_augmented(options.augmented, config, folder)
    if options.fix:
        cleaned, changes = fix_dataset(splits, options.fix, config, **how)
        print(printable(f"The cleaned copy {options.fix}:"))
        for change, names in changes.items():
            print(printable(f"  {len(names)} {change}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"))
        _print_findings([cleaned])
    if any(split.num_errors for split in splits):
        sys.exit(1)
