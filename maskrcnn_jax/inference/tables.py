"""Detections as tables that spreadsheets open: one of all objects, and one of how many there are. Without JAX."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pycocotools import mask as coco_mask

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.writing import replace_file


def write_tables(output: Path, images: Sequence[dict], results: Sequence[dict], categories: Categories) -> None:
    """Write ``detections.csv``, a row for each object, and ``counts.csv``, a row for each image.

    Args:
        output: folder.
        images: as in a COCO annotation file: id and file_name; ``frame`` of those of videos.
        results: COCO results of these images.
        categories: of the model.
    """
    names = dict(zip(categories.ids, categories.names, strict=True))
    files = {image["id"]: image["file_name"] for image in images}
    rows: list[list] = [
        ["image_id", "file_name", "category_id", "category", "score", "x1", "y1", "x2", "y2", "mask_pixels"]
    ]
    for result in results:
        image_id, category = result["image_id"], result["category_id"]
        x, y, width, height = result["bbox"]
        box = [f"{value:.2f}" for value in (x, y, x + width, y + height)]
        pixels = int(coco_mask.area(result["segmentation"]))
        rows.append([image_id, files[image_id], category, names[category], f"{result['score']:.4f}", *box, pixels])
    _write(output / "detections.csv", rows)

    counts = Counter((result["image_id"], result["category_id"]) for result in results)
    rows = [["image_id", "file_name", *categories.names, "all"]]
    for image_id, file in files.items():
        numbers = [counts[image_id, category] for category in categories.ids]
        rows.append([image_id, file, *numbers, sum(numbers)])
    _write(output / "counts.csv", rows)


def _write(path: Path, rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    # Spreadsheets take a file without this mark for one in the encoding of the system. File names need not be UTF-8;
    # what is not is escaped as in images.json.
    replace_file(path, text.getvalue().encode("utf-8-sig", errors="backslashreplace"))
