"""COCO's box and mask AP, as a dictionary, a table and files.

faster-coco-eval computes them where it is installed, in less time, pycocotools where it is not: the same numbers to
the last digit. They are what pycocotools gives for the written ``detections.json``, also in one point where
detectron2 and torchvision's training scripts differ: a result that holds both a box and a mask is counted as small,
medium or large by the area of its box. They remove the box before they evaluate masks; this moves segm_APs, segm_APm
and segm_APl a little and leaves segm_AP as it is.

COCO counts the best 100 detections of an image and category. A model that makes more is measured with as many: in all
numbers but AR1, AR10 and AR100, and in one more recall, such as AR300.
"""

import contextlib
import functools
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax.data.annotations import read_annotations
from maskrcnn_jax.data.areas import drop_impossible_areas
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path
from maskrcnn_jax.writing import write_json

_log = logging.getLogger(__name__)

# The order of COCOeval.stats.
STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
COCO_DETECTIONS = 100  # that count in an image


def load_annotations(path: str | os.PathLike) -> COCO:
    """Read a COCO annotation file as ground truth; no image is needed.

    Args:
        path: a COCO ``instances_*.json``.

    Raises:
        UserError: the file is missing, is no JSON or holds no COCO annotations.
    """
    return ground_truth(drop_impossible_areas(read_annotations(as_path(path), keep_unlisted=True)))


def ground_truth(dataset: CocoDataset, rows: Iterable[int] | None = None) -> COCO:
    """Build what COCOeval compares results with.

    It differs from what training sees: boxes are as in the file and not clipped, and those without area count.

    Args:
        dataset: with the annotations whose box has no area (``keep_flat``).
        rows: of the images that are evaluated, None for all.

    Returns:
        The ground truth. Masks are run lengths; objects without one have no ``segmentation``. Objects without ``area``
        or ``bbox`` get their mask's. They are numbered from 1, since for COCOeval an object 0 is none, and of two with
        one id it keeps one.
    """
    rows = range(len(dataset)) if rows is None else sorted(map(int, rows))
    images: list[dict] = []
    annotations: list[dict] = []
    for i in rows:
        height, width = dataset.sizes[i].tolist()
        image_id, file_name = int(dataset.image_ids[i]), str(dataset.file_names[i])
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for row in range(dataset.offsets[i], dataset.offsets[i + 1]):
            entry = _ground_truth_of(dataset, row, height, width)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id} | entry)
    pairs = zip(dataset.categories.ids, dataset.categories.names, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in pairs]
    return _make_coco(COCO, {"images": images, "annotations": annotations, "categories": categories})


def _ground_truth_of(dataset: CocoDataset, row: int, height: int, width: int) -> dict:
    entry: dict[str, Any] = {"category_id": int(dataset.category_ids[row]), "iscrowd": int(dataset.iscrowd[row])}
    box, area = dataset.file_boxes[row], float(dataset.areas[row])
    if dataset.num_parts[row] >= 0:
        rle = entry["segmentation"] = dataset.rle(row, height, width)
        box = coco_mask.toBbox(rle) if np.isnan(box).any() else box
        area = float(coco_mask.area(rle)) if math.isnan(area) else area
    entry["bbox"] = box.tolist()
    entry["area"] = float(box[2] * box[3]) if math.isnan(area) else area
    return entry


def mask_truth(coco: COCO) -> COCO:
    """Return what masks are evaluated with: where only a box is known, what is found in it counts for nothing.

    Args:
        coco: as ``ground_truth`` returns it, which boxes are evaluated with.
    """
    annotations = coco.dataset["annotations"]
    if all("segmentation" in annotation for annotation in annotations):
        return coco
    return _make_coco(type(coco), coco.dataset | {"annotations": [_with_mask(a) for a in annotations]})


def _with_mask(annotation: dict) -> dict:
    """Return an annotation whose mask is unknown as a crowd that fills its box."""
    if "segmentation" in annotation:
        return annotation
    x, y, width, height = annotation["bbox"]
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return annotation | {"iscrowd": 1, "segmentation": [corners]}


def detection_limits(max_detections: int) -> list[int]:
    """Return COCO's ``maxDets`` for a model that makes so many detections of an image; AP goes by the last."""
    return [1, 10, COCO_DETECTIONS, *([max_detections] if max_detections > COCO_DETECTIONS else [])]


def evaluate(
    annotations: str | os.PathLike | COCO,
    results: list[dict],
    *,
    image_ids: Sequence[int] | None = None,
    max_detections: int = COCO_DETECTIONS,
) -> dict:
    """Compute COCO's twelve numbers for boxes and for masks, and the AP of each category.

    Args:
        annotations: a COCO annotation file, or one that is loaded already.
        results: COCO results with bbox and segmentation; left as they are.
        image_ids: evaluate these images only; None means all of the annotation file.
        max_detections: detections of an image that the model makes (``model.box_detections_per_img``).

    Returns:
        ``bbox_AP`` ... ``bbox_ARl`` and ``segm_AP`` ... ``segm_ARl``, floats in 0..1, or -1 where no object falls
        under the number; ``bbox_per_category`` and ``segm_per_category``, category name -> AP. Above 100
        ``max_detections``, also a recall such as ``bbox_AR300``.

    Raises:
        UserError: if the annotations cannot be read, or results belong to images that are not annotated there.
    """
    coco = annotations if isinstance(annotations, COCO) else load_annotations(annotations)
    unknown = {result["image_id"] for result in results} - set(coco.imgs)
    if unknown:
        raise UserError(
            f"{len(unknown)} images with results are not in the annotation file, image {min(unknown)} for one; "
            "evaluate with the annotations of the split that was detected on"
        )
    _warn_of_many_objects(coco, image_ids, max_detections)
    metrics: dict[str, Any] = {}
    coco_class, evaluation_class = _library()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _make_coco(coco_class, coco.dataset)
        detected = load_results(truth, results)
        for kind, known in (("bbox", truth), ("segm", mask_truth(truth))):
            evaluation = evaluation_class(known, detected, kind)
            if image_ids is not None:
                evaluation.params.imgIds = sorted({int(image_id) for image_id in image_ids})
            evaluation.params.maxDets = detection_limits(max_detections)
            evaluation.evaluate()
            evaluation.accumulate()
            metrics |= {f"{kind}_{name}": value for name, value in _summarize(evaluation).items()}
            metrics[f"{kind}_per_category"] = _per_category(coco, evaluation)
    return metrics


def _warn_of_many_objects(coco: COCO, image_ids: Sequence[int] | None, max_detections: int) -> None:
    evaluated = set(coco.imgs if image_ids is None else map(int, image_ids))
    objects = Counter(a["image_id"] for a in coco.dataset["annotations"] if not a["iscrowd"])
    many = [count for image_id, count in objects.items() if image_id in evaluated and count > max_detections]
    if many:
        _log.warning("%s", Kind.MANY_OBJECTS.tell(len(many), limit=max_detections, most=max(many)))


def _summarize(evaluation: COCOeval) -> dict[str, float]:
    """Compute what ``COCOeval.summarize`` does, which gives an AP of -1 unless 100 is the last limit."""
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # [T, R, K, A, M] and [T, K, A, M]
    areas = dict(enumerate("sml", 1))  # after that of all objects
    values = {"AP": precision[..., 0, -1], "AP50": precision[0, ..., 0, -1], "AP75": precision[5, ..., 0, -1]}
    values |= {f"AP{name}": precision[..., area, -1] for area, name in areas.items()}
    values |= {f"AR{limit}": recall[..., 0, m] for m, limit in enumerate(evaluation.params.maxDets)}
    values |= {f"AR{name}": recall[..., area, -1] for area, name in areas.items()}
    return {name: float(np.mean(known)) if (known := v[v > -1]).size else -1.0 for name, v in values.items()}


def statistics(metrics: dict) -> list[str]:
    """Return the names of the numbers of ``evaluate``: STATISTICS, and a recall such as AR300."""
    names = [name.removeprefix("bbox_") for name in metrics if name.startswith("bbox_")]
    return [name for name in names if name != "per_category"]


def format_table(metrics: dict) -> str:
    """Lay out the metrics for a terminal; the last line is ``box AP 0.xxx  mask AP 0.xxx``.

    Where COCO gives -1, because there are no objects or no masks, the table says "none".

    Args:
        metrics: as ``evaluate`` returns them, and those of ``accuracy.measure_losses`` under ``eval_`` if wanted.
    """
    lines = [f"{'':8}{'box':>8}{'mask':>8}"]
    scores = {name: (_score(metrics[f"bbox_{name}"]), _score(metrics[f"segm_{name}"])) for name in statistics(metrics)}
    lines += [f"{name:8}{box:>8}{mask:>8}" for name, (box, mask) in scores.items()]
    per_category = metrics["bbox_per_category"]
    width = max([len("category"), *map(len, per_category)])
    lines += ["", f"{'category':{width}}{'box AP':>8}{'mask AP':>9}"]
    for name, box_ap in per_category.items():
        lines.append(f"{name:{width}}{_score(box_ap):>8}{_score(metrics['segm_per_category'][name]):>9}")
    if "eval_loss" in metrics:
        lines += [
            "",
            f"loss {metrics['eval_loss']:.3f}  accuracy of RoIs {metrics['eval_accuracy']:.3f}, "
            f"of those of objects {metrics['eval_accuracy_foreground']:.3f}",
        ]
    lines.append("")
    if "without_tta_bbox_AP" in metrics:
        box, mask = (_score(metrics[f"without_tta_{kind}_AP"]) for kind in ("bbox", "segm"))
        lines.append(f"without test-time augmentation: box AP {box}  mask AP {mask}")
    lines.append("box AP {}  mask AP {}".format(*scores["AP"]))
    return "\n".join(lines)


def _score(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "none"


def write_files(directory: str | os.PathLike, metrics: dict, results: list[dict]) -> None:
    """Write ``metrics.json`` and ``detections.json``; each replaces an older one in a single step.

    Args:
        directory: made if it does not exist.
        metrics: as ``evaluate`` returns them.
        results: COCO results.
    """
    write_json(as_path(directory) / "detections.json", results)
    write_json(as_path(directory) / "metrics.json", metrics, indent=2)


def _library() -> tuple[Callable, Callable]:
    """Return ``COCO`` and ``COCOeval`` of the fastest library that is installed."""
    try:
        import faster_coco_eval
    except ImportError:
        return COCO, COCOeval
    silent = functools.partial(faster_coco_eval.COCOeval_faster, print_function=lambda *_: None)
    return faster_coco_eval.COCO, silent


def _make_coco(coco_class: Callable, dataset: dict) -> COCO:
    coco = coco_class()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def load_results(coco: COCO, results: list[dict]) -> COCO:
    """As ``COCO.loadRes``, which fails on an empty list and writes into the dicts it is given."""
    if results:
        return coco.loadRes([dict(result) for result in results])
    nothing = {"images": coco.dataset["images"], "categories": coco.dataset["categories"], "annotations": []}
    return _make_coco(type(coco), nothing)


def _per_category(coco: COCO, evaluation: COCOeval) -> dict[str, float]:
    """Average the precision of each category over thresholds and recalls, as ``summarize`` does over all of them."""
    categories = coco.loadCats(evaluation.params.catIds)
    names = [category["name"] for category in categories]
    # precision is [T, R, K, A, M]: the first area range is "all", the last limit is the highest.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    table = {}
    for index, (name, category) in enumerate(zip(names, categories, strict=True)):
        known = precision[:, :, index]
        known = known[known > -1]
        key = name if names.count(name) == 1 else f"{name} ({category['id']})"
        table[key] = float(np.mean(known)) if known.size else -1.0
    return table
