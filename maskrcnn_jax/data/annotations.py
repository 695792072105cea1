"""Reads the JSON of a COCO-format dataset and checks that it is consistent."""

import logging
from array import array
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.entries import NO_NAME, Annotations, Images, malformed, read_sections, short, to_numpy
from maskrcnn_jax.data.findings import Finding, Kind, Report, stop
from maskrcnn_jax.data.formats import polygon_bounds
from maskrcnn_jax.data.numbers import plain
from maskrcnn_jax.data.run_lengths import num_pixels
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)

_NO_SUPERCATEGORY = (None, "", "none")


def read_annotations(
    path: Path,
    image_dir: Path = Path(),
    *,
    contiguous_labels: bool = False,
    keep_unlisted: bool = False,
    report: Report = stop,
) -> CocoDataset:
    """Read an annotation file. Where an annotation has a mask only, its box is the one around the mask.

    Args:
        path: the JSON.
        image_dir: folder that the file names are relative to; nothing in it is read.
        contiguous_labels: number COCO's categories from 1 to 80 instead of by their ids.
        keep_unlisted: accept annotations of categories that the file does not list, as crowds.
        report: called with every finding: a malformed entry, duplicate ids, annotations that refer to an image or a
            category which the file does not list. If it returns, reading goes on without these entries.

    Returns:
        The dataset; ``clip_boxes`` has yet to clip its boxes.

    Raises:
        UserError: broken JSON, a missing or empty section; and what ``report`` raises.
    """
    images, annotations = Images(path, report), Annotations(path, report)
    names = _categories(path, read_sections(path, images, annotations), report, set(annotations.category_ids))
    category_ids, category_names = list(names), list(names.values())
    if not images.file_names:
        raise UserError(f"{path} lists no images; at least one is needed")
    first = _first_of_each(path, images, report)
    image_ids, sizes = to_numpy(images.ids, np.int64)[first], to_numpy(images.sizes, np.int32).reshape(-1, 2)[first]
    file_names = np.array([images.file_names[i] for i in first], dtype=np.str_)
    image_rows = _positions(image_ids, annotations.image_ids)
    _report_unlisted(path, annotations, "image", image_rows, report)
    shift = 0 if keep_unlisted else _check_shift(path, annotations, category_ids, report)
    category_rows = _positions(np.array(category_ids) - shift, annotations.category_ids)
    if not keep_unlisted:
        _report_unlisted(path, annotations, "category", category_rows, report)
    columns, masks = annotations.columns(), annotations.masks()
    has_mask, without_box = columns["num_parts"] >= 0, np.isnan(columns["file_boxes"]).all(axis=1)
    boxes, is_finite = _corners(columns, masks, annotations.rle_sizes)
    fits, other_size = _run_lengths_that_fit(annotations, columns, masks, file_names, sizes, image_rows, report)
    kinds = {
        Kind.ONLY_BOX: ~has_mask & ~without_box,
        Kind.NO_BOX_NOR_MASK: ~has_mask & without_box,
        Kind.NOT_FINITE: ~is_finite & ~without_box,
        Kind.IGNORED: (category_rows < 0) & keep_unlisted,
        Kind.OTHER_SIZE: other_size,
    }
    problems = {kind: columns["places"][rows] for kind, rows in kinds.items() if rows.any()}
    problems |= {kind: to_numpy(places, np.int64) for kind, places in annotations.problems.items()}
    categories = Categories.create(category_ids, category_names, contiguous_labels)
    # The row -1, of categories that are not listed, finds the last one.
    labels = np.array([*(categories.labels[categories.ids.index(i)] for i in category_ids), 0], np.int32)
    rows = np.flatnonzero(fits & is_finite & ((category_rows >= 0) | keep_unlisted))
    rows = rows[np.argsort(image_rows[rows], kind="stable")]
    columns |= {"category_ids": columns["category_ids"] + shift, "labels": labels[category_rows], "boxes": boxes}
    return CocoDataset(
        annotation_path=path,
        image_dir=image_dir,
        categories=categories,
        category_shift=shift,
        num_annotations=annotations.num_seen,
        problem_places=problems,
        missing=np.zeros(0, np.int64),
        image_places=to_numpy(images.places, np.int64)[first],
        image_ids=image_ids,
        sizes=sizes,
        file_names=file_names,
        offsets=np.searchsorted(image_rows[rows], np.arange(len(sizes) + 1)),
        **{name: values.take(rows, axis=0) for name, values in columns.items()},
        **masks,
    )


def _corners(
    columns: dict[str, np.ndarray], masks: dict[str, np.ndarray], rle_sizes: array
) -> tuple[np.ndarray, np.ndarray]:
    """Convert the boxes of the file; where there are none, take those around the masks.

    Returns:
        [K, 4] float32 x1, y1, x2, y2, and [K] bool, False where the file's numbers are not finite or nothing is known.
    """
    boxes, num_parts, first_part = columns["file_boxes"].copy(), columns["num_parts"], columns["first_part"]
    missing = np.isnan(boxes).all(axis=1)
    rows = np.flatnonzero(missing & (num_parts > 0))
    bounds = polygon_bounds(masks["coordinates"], masks["part_offsets"], first_part[rows], num_parts[rows])
    boxes[rows] = np.concatenate([bounds[:, :2], bounds[:, 2:] - bounds[:, :2]], axis=1)
    for row in np.flatnonzero(missing & (num_parts == 0)).tolist():
        first = first_part[row]
        start, stop = masks["rle_offsets"][[first, first + 1]]
        rle = {"size": list(rle_sizes[2 * first : 2 * first + 2]), "counts": masks["rle_counts"][start:stop].tobytes()}
        boxes[row] = coco_mask.toBbox(rle)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = boxes.astype(np.float32)
        is_finite = np.isfinite(boxes).all(axis=1)
        boxes[:, 2:] += boxes[:, :2]
    return boxes, is_finite


def _categories(path: Path, entries: object, report: Report, used: set[int]) -> dict[int, str]:
    """Return the names of the categories by id, without those that are only the heading of others."""
    names: dict[int, str] = {}
    above: dict[int, object] = {}  # supercategory by id
    twice: dict[int, int] = {}

    def report_malformed(reason: str) -> None:
        report(malformed(path, Kind.MALFORMED_CATEGORY, place, entry, ValueError(reason)))

    for place, entry in enumerate(map(plain, entries) if isinstance(entries, list) else ()):
        known = isinstance(entry, dict)
        if not known or not isinstance(entry.get("id"), int) or not isinstance(entry.get("name"), str | int | float):
            report_malformed("id and name are needed")
        elif NO_NAME.search(str(entry["name"])):
            report_malformed(f"its name is {short(entry['name'])}")
        elif not -(2**63) <= entry["id"] < 2**63:
            report_malformed("its id is too large")
        elif entry["id"] in names:
            twice[place] = entry["id"]
        else:
            names[entry["id"]] = str(entry["name"])
            above[entry["id"]] = entry.get("supercategory")
    if twice:
        report(_twice(path, Kind.CATEGORY_IDS_TWICE, twice))
    if not names:
        raise UserError(f"{path} lists no categories; at least one is needed")
    for category_id in _headings(names, above) - used:
        _log.info(
            "%s: category %s (id %d) is left out, as it has no objects and is the supercategory of others",
            path,
            names.pop(category_id),
            category_id,
        )
    return names


def _headings(names: dict[int, str], above: dict[int, object]) -> set[int]:
    """Return the categories that others name as their supercategory, such as Roboflow's with id 0."""
    tops = {i for i, supercategory in above.items() if supercategory in _NO_SUPERCATEGORY}
    return {i for i in tops if any(above[other] == names[i] for other in names.keys() - tops)}


def _first_of_each(path: Path, images: Images, report: Report) -> np.ndarray:
    """Return the rows of the images without those whose id came before."""
    later = repetitions(to_numpy(images.ids, np.int64))
    if len(later):
        twice = {images.places[i]: images.ids[i] for i in later.tolist()}
        report(_twice(path, Kind.IMAGE_IDS_TWICE, twice))
    return np.delete(np.arange(len(images.ids)), later)


def repetitions(values: np.ndarray) -> np.ndarray:
    """Return the rows, in order, whose value is also that of an earlier row.

    np.unique and np.setdiff1d of NumPy 2.4 take a second for as many integers as COCO has annotations.
    """
    order = np.argsort(values, kind="stable")
    return np.sort(order[1:][values[order[1:]] == values[order[:-1]]])


def _twice(path: Path, kind: Kind, ids: dict[int, int]) -> Finding:
    """Make the finding of duplicate ids, given by the place of each repetition."""
    return kind.finding(list(ids), path=path, ids=", ".join(map(str, sorted(set(ids.values()))[:3])))


def _positions(known: np.ndarray, wanted: array) -> np.ndarray:
    """Return the position in ``known`` of each id that the annotations refer to, -1 where it is not there."""
    ids = to_numpy(wanted, np.int64)
    order = np.argsort(known)
    rows = order[np.searchsorted(known[order], ids).clip(max=len(known) - 1)]
    return np.where(known[rows] == ids, rows, -1)


def _report_unlisted(path: Path, annotations: Annotations, what: str, rows: np.ndarray, report: Report) -> None:
    wrong = np.flatnonzero(rows < 0)
    if not len(wrong):
        return
    kind, ids = Kind.UNLISTED_IMAGE, annotations.image_ids
    if what == "category":
        kind, ids = Kind.UNLISTED_CATEGORY, annotations.category_ids
    first, places = wrong[0], to_numpy(annotations.places, np.int64)[wrong]
    report(kind.finding(places, path=path, annotation=annotations.ids[first], id=ids[first]))


def _check_shift(path: Path, annotations: Annotations, listed: list[int], report: Report) -> int:
    """Return what turns the ids of the annotations into all those that are listed: 1 or -1, or 0 for neither."""
    used = np.unique(to_numpy(annotations.category_ids, np.int64))
    for step in (1, -1):
        # Of all of them: one wild id must not move the others.
        if np.array_equal(used + step, np.sort(listed)):
            places = to_numpy(annotations.places, np.int64)
            bounds = f"{used[0]}..{used[-1]}", f"{min(listed)}..{max(listed)}"
            report(Kind.OFF_BY_ONE.finding(places, path=path, used=bounds[0], listed=bounds[1]))
            return step
    return 0


def _run_lengths_that_fit(
    annotations: Annotations,
    columns: dict[str, np.ndarray],
    masks: dict[str, np.ndarray],
    file_names: np.ndarray,
    sizes: np.ndarray,
    image_rows: np.ndarray,
    report: Report,
) -> tuple[np.ndarray, np.ndarray]:
    """Return which annotations of listed images have no run-length mask or one that fills its image, and which have
    one of another size.
    """
    fits, other_size = image_rows >= 0, np.zeros(len(image_rows), bool)
    rows = np.flatnonzero(fits & (columns["num_parts"] == 0))
    mask_rows = columns["first_part"][rows]
    image_sizes = sizes[image_rows[rows]].astype(np.int64)
    rle_sizes = to_numpy(annotations.rle_sizes, np.int64).reshape(-1, 2)[mask_rows]
    other_size[rows] = (rle_sizes != image_sizes).any(axis=1)
    filled = num_pixels(masks["rle_counts"], masks["rle_offsets"])[mask_rows]
    for row in rows[(filled != image_sizes.prod(axis=1)) & ~other_size[rows]].tolist():
        image = image_rows[row]
        details = {"image": file_names[image], "size": "x".join(map(str, sizes[image]))}
        report(Kind.UNFILLED.finding([annotations.places[row]], annotation=annotations.ids[row], **details))
        fits[row] = False
    return fits & ~other_size, other_size
