"""Objects and detections of an evaluation as the data of its page, which counts and draws them in the browser.

The browser counts at any score: precision and recall from COCO's matches at an IoU of 0.50, confusions and errors from
those of ``confusion.match``. Both matches of a detection depend only on detections with higher scores, so those above
a score are counted as if there were no others.
"""

import contextlib
import io
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax import gallery, page
from maskrcnn_jax.evaluation.coco_metrics import detection_limits, load_results, mask_truth
from maskrcnn_jax.evaluation.confusion import MATCHED, MIN_SCORE, Kind, match

MAX_SHOWN = 200_000  # detections of a run on the page, those with the highest scores
KINDS = tuple(Kind)
_MATCHED = [KINDS.index(kind) for kind in MATCHED]
HIT, MISS, NOT_COUNTED = 1, 0, -1  # a detection by COCO's rules


@dataclass(frozen=True)
class Run:
    """A model's detections on the evaluated images."""

    name: str
    results: list[dict]  # COCO results
    metrics: dict  # as ``coco_metrics.evaluate`` returns them


class Counted:
    """Which detections and objects COCO counts, with boxes or masks."""

    def __init__(self, truth: COCO, results: list[dict], kind: str, max_detections: int):
        """Evaluate.

        Args:
            truth: as ``ground_truth`` returns it.
            results: COCO results.
            kind: "bbox" or "segm".
            max_detections: as the metrics were computed with.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            known = truth if kind == "bbox" else mask_truth(truth)
            self.evaluation = COCOeval(known, load_results(known, results), kind)
            params = self.evaluation.params
            params.maxDets = detection_limits(max_detections)
            params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]  # all sizes
            self.evaluation.evaluate()
        # Number of objects by category id, and [N] HIT, MISS or NOT_COUNTED of each detection at an IoU of 0.50.
        self.objects: dict[int, int] = defaultdict(int)
        self.verdicts = np.full(len(results), NOT_COUNTED, np.int8)
        for cell in self.evaluation.evalImgs:
            if cell is None:
                continue
            self.objects[cell["category_id"]] += int(np.sum(np.asarray(cell["gtIgnore"]) == 0))
            places = np.array(cell["dtIds"], np.int64) - 1  # loadRes numbers results from 1
            verdicts = np.where(cell["dtMatches"][0] > 0, HIT, MISS)
            self.verdicts[places] = np.where(cell["dtIgnore"][0], NOT_COUNTED, verdicts)

    def precision(self) -> np.ndarray:
        """Return COCO's precision [thresholds, recalls, categories]; -1 where there are no objects."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluation.accumulate()
        return self.evaluation.eval["precision"][..., 0, -1]


def image_rows(truth: COCO) -> dict[int, int]:
    """Return the row of each image on the page by its id."""
    return {image_id: row for row, image_id in enumerate(truth.imgs)}


def objects_data(truth: COCO) -> tuple[dict[str, Any], dict[int, int]]:
    """Return the annotated objects as data of the page, and their places in it by annotation id."""
    labels = {category_id: i for i, category_id in enumerate(truth.cats)}
    rows = image_rows(truth)
    ordered = [annotation for image_id in rows for annotation in truth.imgToAnns.get(image_id, [])]
    masks = [annotation.get("segmentation") for annotation in ordered]
    order = sorted(range(len(ordered)), key=lambda i: -ordered[i]["area"])
    outlines = gallery.outlines(order, len(ordered), lambda i: gallery.trace_mask(masks[i]) if masks[i] else [])
    data = gallery.instances(
        np.array([rows[a["image_id"]] for a in ordered], np.int64),
        len(rows),
        np.array([labels[a["category_id"]] for a in ordered], np.int64),
        np.array([a["bbox"] for a in ordered], np.float64).reshape(-1, 4),
        np.array([a["area"] for a in ordered], np.float64),
        outlines,
    )
    data["crowds"] = page.pack([int(bool(a.get("iscrowd", 0))) for a in ordered], np.uint8)
    return data, {a["id"]: i for i, a in enumerate(ordered)}


def run_data(
    truth: COCO, run: Run, places: dict[int, int], counted: dict[str, Counted]
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the detections of a run as data of the page, and the number of errors in each image [N].

    The errors are those of the detections with a score of MIN_SCORE and more.

    Args:
        truth: as ``ground_truth`` returns it.
        run: the model's.
        places: of the objects, as ``objects_data`` returns them.
        counted: "bbox" and "segm" of the run.
    """
    labels = {category_id: i for i, category_id in enumerate(truth.cats)}
    rows = image_rows(truth)
    scores = np.array([result["score"] for result in run.results], np.float64)
    shown = np.sort(np.argsort(-scores, kind="stable")[:MAX_SHOWN])
    image = np.array([rows[run.results[i]["image_id"]] for i in shown], np.int64)
    shown = shown[np.lexsort((-scores[shown], image))]  # by image, in descending order of score
    image = np.sort(image)
    ordered = [run.results[i] for i in shown]
    kinds, nearest = _matches(truth, ordered, places)
    order = np.argsort(-scores[shown], kind="stable").tolist()
    outlines = gallery.outlines(order, len(ordered), lambda i: gallery.trace_mask(ordered[i]["segmentation"]))
    boxes = np.array([result["bbox"] for result in ordered], np.float64).reshape(-1, 4)
    classes = np.array([labels[result["category_id"]] for result in ordered], np.int64)
    counts = scores[shown] >= MIN_SCORE
    data = gallery.instances(image, len(rows), classes, boxes, boxes[:, 2] * boxes[:, 3], outlines)
    return data | {
        "name": run.name,
        "scores": page.pack(scores[shown], np.float32),
        "kinds": page.pack(kinds, np.uint8),
        "objects": page.pack(nearest, np.int32),
        "lowest": _lowest(scores[shown]) if len(shown) < len(scores) else 0.0,
        "verdicts": {kind: page.pack(c.verdicts[shown], np.int8) for kind, c in counted.items()},
        "counts": {kind: [c.objects[i] for i in truth.cats] for kind, c in counted.items()},
    }, _errors(truth, image[counts], kinds[counts])


def _lowest(scores: np.ndarray) -> float:
    """Return the lowest place of the slider, in hundredths, above the lowest score that is shown."""
    return (math.floor(100 * scores.min() + 1e-6) + 1) / 100


def _matches(truth: COCO, ordered: list[dict], places: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of each detection, and the place of the object that decides it, or -1; both [D]."""
    by_image: defaultdict[int, list[int]] = defaultdict(list)
    for i, result in enumerate(ordered):
        by_image[result["image_id"]].append(i)
    kinds, nearest = np.zeros(len(ordered), np.uint8), np.full(len(ordered), -1, np.int32)
    for image_id, rows in by_image.items():
        objects = truth.imgToAnns.get(image_id, [])
        for i, (kind, place) in zip(rows, match(objects, [ordered[i] for i in rows]), strict=True):
            kinds[i] = KINDS.index(kind)
            nearest[i] = -1 if place is None else places[objects[place]["id"]]
    return kinds, nearest


def _errors(truth: COCO, image: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return [N] the errors in each image: objects missed, and detections that are neither correct nor ignored."""
    rows = image_rows(truth)
    objects = [rows[a["image_id"]] for a in truth.anns.values() if not a.get("iscrowd", 0)]
    found = np.isin(kinds, _MATCHED)
    wrong = ~np.isin(kinds, [KINDS.index(Kind.CORRECT), KINDS.index(Kind.IGNORED)])
    counts = [
        np.bincount(np.array(part, np.int64), minlength=len(rows)) for part in (objects, image[found], image[wrong])
    ]
    return counts[0] - counts[1] + counts[2]
