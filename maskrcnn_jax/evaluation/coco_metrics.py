"""COCO's box and mask AP, as a dictionary, a table and files.

faster-coco-eval computes them where it is installed, in less time, pycocotools where it is not: the same numbers to
the last digit. They are what pycocotools gives for the written ``detections.json``, also in one point where
detectron2 and torchvision's training scripts differ: a result that holds both a box and a mask is counted as small,
medium or large by the area of its box. They remove the box before they evaluate masks; this moves segm_APs, segm_APm
and segm_APl a little and leaves segm_AP as it is.
"""

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax.data.annotation_file import polygon_problem, read_annotation_file
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.writing import write_json

# The order of COCOeval.stats.
STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def load_annotations(path: str | os.PathLike, image_ids: Collection[int] | None = None) -> COCO:
    """Read a COCO annotation file quietly and fill in what COCOeval needs and small datasets often leave out.

    Args:
        path: a COCO ``instances_*.json``.
        image_ids: read what belongs to these images only, which takes less memory: for all of COCO's training set
            pycocotools needs several gigabytes.

    Returns:
        The dataset; objects without ``iscrowd`` are no crowds, those without ``area`` or ``bbox`` get their mask's,
        those without a mask have no ``segmentation``. Those with neither, with boxes that are not finite or masks of
        another size than their image are left out, as in training; boxes without area stay, as pycocotools has them.
        The objects are numbered from 1.

    Raises:
        UserError: if the file is missing, is no JSON or holds no COCO annotations.
    """
    try:
        if image_ids is None:
            # Raises for what pycocotools would crash at; of the images of a split, loading it did so.
            read_annotation_file(Path(path), keep_unlisted=True)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(os.fspath(path)) if image_ids is None else _read_part(Path(path), set(image_ids))
            completed = [_complete(coco, annotation) for annotation in coco.dataset["annotations"]]
            # Numbered anew: for COCOeval 0 is no object, and of two with one id it keeps one.
            numbered = [a | {"id": i} for i, a in enumerate(filter(None, completed), 1)]
            coco = _make_coco(COCO, coco.dataset | {"annotations": numbered})
    except (ValueError, LookupError, AssertionError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no COCO annotation file; give an instances_*.json") from error
    if not coco.dataset.get("images") or not coco.dataset.get("categories"):
        raise UserError(f"{path} holds no images or no categories; give a COCO instances_*.json")
    return coco


def _complete(coco: COCO, annotation: dict) -> dict | None:
    """Fill in what an annotation leaves out; None for one that nothing can be compared with."""
    complete = annotation | {"iscrowd": annotation.get("iscrowd") or 0}
    mask, box = complete.pop("segmentation", None), annotation.get("bbox")
    if isinstance(mask, dict):
        image = coco.imgs[annotation["image_id"]]
        if list(mask["size"]) != [image["height"], image["width"]]:
            return None
    else:
        mask = [polygon for polygon in mask or () if not polygon_problem(polygon)]
    if mask:
        complete["segmentation"] = mask
    elif not box:
        return None
    complete["bbox"] = box or coco_mask.toBbox(coco.annToRLE(complete)).tolist()
    if not isinstance(annotation.get("area"), int | float):
        _, _, width, height = complete["bbox"]
        complete["area"] = float(coco_mask.area(coco.annToRLE(complete)) if mask else width * height)
    return complete if all(map(math.isfinite, complete["bbox"])) else None


def mask_truth(coco: COCO) -> COCO:
    """Return what masks are evaluated with: where only a box is known, what is found in it counts for nothing.

    Args:
        coco: as ``load_annotations`` returns it, which boxes are evaluated with.
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


def _read_part(path: Path, image_ids: set[int]) -> COCO:
    kept: dict[str, list[dict]] = {"images": [], "annotations": []}

    def keep(section: str, key: str) -> Callable[[dict], None]:
        return lambda entry: kept[section].append(entry) if entry[key] in image_ids else None

    rest = stream_json(path, {"images": keep("images", "id"), "annotations": keep("annotations", "image_id")})
    return _make_coco(COCO, rest | kept)


def evaluate(
    annotations: str | os.PathLike | COCO, results: list[dict], *, image_ids: Sequence[int] | None = None
) -> dict:
    """Compute COCO's twelve numbers for boxes and for masks, and the AP of each category.

    Args:
        annotations: a COCO annotation file, or one that is loaded already.
        results: COCO results with bbox and segmentation; left as they are.
        image_ids: evaluate these images only; None means all of the annotation file.

    Returns:
        ``bbox_AP`` ... ``bbox_ARl`` and ``segm_AP`` ... ``segm_ARl``, floats in 0..1, or -1 where no object falls
        under the number; ``bbox_per_category`` and ``segm_per_category``, category name -> AP.

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
    metrics: dict[str, Any] = {}
    coco_class, evaluation_class = _library()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _make_coco(coco_class, coco.dataset)
        detected = load_results(truth, results)
        for kind, known in (("bbox", truth), ("segm", mask_truth(truth))):
            evaluation = evaluation_class(known, detected, kind)
            if image_ids is not None:
                evaluation.params.imgIds = sorted({int(image_id) for image_id in image_ids})
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats = (float(value) for value in evaluation.stats)
            metrics |= {f"{kind}_{name}": value for name, value in zip(STATISTICS, stats, strict=True)}
            metrics[f"{kind}_per_category"] = _per_category(coco, evaluation)
    return metrics


def format_table(metrics: dict) -> str:
    """Lay out the metrics for a terminal; the last line is ``box AP 0.xxx  mask AP 0.xxx``.

    Args:
        metrics: as ``evaluate`` returns them, and those of ``accuracy.measure_losses`` under ``eval_`` if wanted.
    """
    lines = [f"{'':8}{'box':>8}{'mask':>8}"]
    lines += [f"{name:8}{metrics[f'bbox_{name}']:8.3f}{metrics[f'segm_{name}']:8.3f}" for name in STATISTICS]
    per_category = metrics["bbox_per_category"]
    width = max([len("category"), *map(len, per_category)])
    lines += ["", f"{'category':{width}}{'box AP':>8}{'mask AP':>9}"]
    for name, box_ap in per_category.items():
        lines.append(f"{name:{width}}{box_ap:8.3f}{metrics['segm_per_category'][name]:9.3f}")
    if "eval_loss" in metrics:
        lines += [
            "",
            f"loss {metrics['eval_loss']:.3f}  accuracy of RoIs {metrics['eval_accuracy']:.3f}, "
            f"of those of objects {metrics['eval_accuracy_foreground']:.3f}",
        ]
    lines += ["", f"box AP {metrics['bbox_AP']:.3f}  mask AP {metrics['segm_AP']:.3f}"]
    return "\n".join(lines)


def write_files(directory: str | os.PathLike, metrics: dict, results: list[dict]) -> None:
    """Write ``metrics.json`` and ``detections.json``; each replaces an older one in a single step.

    Args:
        directory: made if it does not exist.
        metrics: as ``evaluate`` returns them.
        results: COCO results.
    """
    write_json(Path(directory) / "detections.json", results)
    write_json(Path(directory) / "metrics.json", metrics, indent=2)


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
    # precision is [T, R, K, A, M]: the first area range is "all", the last limit is 100 detections.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    table = {}
    for index, (name, category) in enumerate(zip(names, categories, strict=True)):
        known = precision[:, :, index]
        known = known[known > -1]
        key = name if names.count(name) == 1 else f"{name} ({category['id']})"
        table[key] = float(np.mean(known)) if known.size else -1.0
    return table
