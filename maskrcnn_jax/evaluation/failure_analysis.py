"""Where a model fails: AP by occlusion, size and crowding, with confidence intervals, and two models compared.

    python -m maskrcnn_jax.evaluation.failure_analysis ANNOTATIONS DETECTIONS [--against=DETECTIONS]

An object belongs to one group of each kind:

- occlusion: the largest share of its box that the box of another object covers (crowds included): up to 5 % it is
  free, up to 35 % partly covered, beyond that mostly. Boxes, because annotated masks hold what is visible only.
- size: COCO's small, medium and large, by the area of the mask.
- crowding: how many objects are in its image: up to 3, up to 10, or more.

The AP of a group ignores the objects of the other groups, as COCO's APs, APm and APl do; what is found there counts
neither for nor against it. Detections that match nothing count in every group; in one of a size, if they have it.
Intervals come from drawing images with replacement, as many as there are; two models are compared on the same draws.
"""

import argparse
import contextlib
import copy
import io
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import (
    COCO_DETECTIONS,
    detection_limits,
    load_annotations,
    load_results,
    mask_truth,
)
from maskrcnn_jax.evaluation.detections_file import read_results
from maskrcnn_jax.paths import as_path
from maskrcnn_jax.writing import write_json

OCCLUSIONS = {"free": 0.05, "partly covered": 0.35, "mostly covered": np.inf}  # largest share of the box
CROWDING = {"1 to 3 objects": 3, "4 to 10 objects": 10, "more objects": np.inf}  # in the image
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # pixels, as COCO
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An AP, or the difference of two, and the middle share CONFIDENCE of what the draws give.

    With few objects the draws lie a little above the AP: precision is a maximum over recalls, which noise raises.
    """

    value: float  # -1 where there are no objects
    low: float
    high: float


class _Matched(NamedTuple):
    """The detections of one category, best first, and its objects."""

    image: np.ndarray  # [N] row of the image of each detection
    hit: np.ndarray  # [T, N] bool, by threshold of overlap
    miss: np.ndarray  # [T, N] bool; neither where the detection is ignored
    objects: np.ndarray  # [I] how many objects of each image count


def occlusion(annotations: Sequence[dict]) -> np.ndarray:
    """Return for each object of an image [G] the largest share of its box that another object's box covers."""
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    sides = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    shared = np.prod(np.maximum(sides, 0), axis=-1)
    np.fill_diagonal(shared, 0)
    return shared.max(axis=1, initial=0) / np.maximum(boxes[:, 2] * boxes[:, 3], 1e-9)


def average_precision(matched: Sequence[_Matched], weights: np.ndarray) -> float:
    """Return COCO's AP, with every image counted as often as its weight says.

    Args:
        matched: an entry per category.
        weights: [I] how often each image counts; all 1 gives pycocotools' number.

    Returns:
        The mean over categories with objects, thresholds of overlap and 101 recalls; -1 without objects.
    """
    precisions = []
    recalls = np.linspace(0, 1, 101)
    for category in matched:
        number = float(weights @ category.objects)
        if not number:
            continue
        weight = weights[category.image]
        hits = np.cumsum(category.hit * weight, axis=1, dtype=np.float64)
        misses = np.cumsum(category.miss * weight, axis=1, dtype=np.float64)
        precision = hits / (hits + misses + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))  # recalls that are never reached
        for of_threshold, recall in zip(precision, hits / number, strict=True):
            precisions.append(of_threshold[np.searchsorted(recall, recalls, side="left")].mean())
    return float(np.mean(precisions)) if precisions else -1.0


class Errors:
    """The results of one model on an annotated dataset, matched with the objects of every group."""

    def __init__(self, truth: COCO, results: list[dict], kind: str, max_detections: int = COCO_DETECTIONS):
        """Match.

        Args:
            truth: as ``ground_truth`` returns it.
            results: COCO results.
            kind: "bbox" or "segm".
            max_detections: as of ``coco_metrics.evaluate``.
        """
        limit = detection_limits(max_detections)[-1]
        self.image_ids = sorted(truth.imgs)
        occlusions, crowding = _groups_of(truth)
        truth = truth if kind == "bbox" else mask_truth(truth)
        by_size = _match(truth, results, kind, limit, {"all": (0, 1e10), **SIZES})
        self.groups = {
            "all": by_size.pop("all"),
            **_match_groups(truth, results, kind, limit, occlusions, OCCLUSIONS),
            **_match_groups(truth, results, kind, limit, crowding, CROWDING),
            **by_size,
        }

    def number_of_objects(self, group: str) -> int:
        """Return how many objects count in a group."""
        return sum(int(category.objects.sum()) for category in self.groups[group])

    def average_precision(self, group: str, draws: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the AP of a group, and that of every draw [S]; draws: [S, I] how often each image was drawn."""
        matched = self.groups[group]
        value = average_precision(matched, np.ones(len(self.image_ids)))
        return value, np.array([average_precision(matched, weights) for weights in draws])


def draw_images(number: int, num_draws: int, seed: int = 0) -> np.ndarray:
    """Return [num_draws, number]: how often each image comes when as many as there are are drawn with replacement."""
    return np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=num_draws)


def intervals(errors: Errors, draws: np.ndarray) -> dict[str, Interval]:
    """Return the AP of every group with its interval, as the draws spread."""
    table = {}
    for group in tqdm(errors.groups, desc="intervals", unit="group"):
        value, drawn = errors.average_precision(group, draws)
        table[group] = Interval(value, *_middle(drawn[drawn >= 0], value))
    return table


def differences(errors: Errors, against: Errors, draws: np.ndarray) -> dict[str, tuple[Interval, float]]:
    """Return how much higher the first AP is in every group, and how likely so large a difference is by chance.

    The probability is twice the share of draws on whose images the other model is at least as good, the data
    themselves counted as one more draw, so that it is never 0.
    """
    table = {}
    for group in tqdm(errors.groups, desc="differences", unit="group"):
        (ours, drawn), (theirs, their_drawn) = (e.average_precision(group, draws) for e in (errors, against))
        apart = (drawn - their_drawn)[(drawn >= 0) & (their_drawn >= 0)]
        fewer = min(np.sum(apart <= 0), np.sum(apart >= 0))
        chance = min(1.0, 2 * float(fewer + 1) / (len(apart) + 1))
        table[group] = Interval(ours - theirs, *_middle(apart, ours - theirs)), chance
    return table


def _middle(drawn: np.ndarray, value: float) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    if not len(drawn):
        return value, value
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _groups_of(truth: COCO) -> tuple[dict[int, int], dict[int, int]]:
    """Return the number of the group in OCCLUSIONS of every object, by its id, and that in CROWDING."""
    occlusions, crowding = {}, {}
    for annotations in truth.imgToAnns.values():
        number = sum(not annotation["iscrowd"] for annotation in annotations)
        for annotation, share in zip(annotations, occlusion(annotations), strict=True):
            occlusions[annotation["id"]] = int(np.searchsorted([*OCCLUSIONS.values()], share))
            crowding[annotation["id"]] = int(np.searchsorted([*CROWDING.values()], number))
    return occlusions, crowding


def _match_groups(
    truth: COCO, results: list[dict], kind: str, limit: int, groups: dict[int, int], names: Iterable[str]
) -> dict[str, list[_Matched]]:
    """Match detections with the objects of each group, by name; groups: the number of the group of each object."""
    # COCOeval ignores by area only, so the number takes its place.
    truth = copy.copy(truth)
    truth.dataset = truth.dataset | {
        "annotations": [a | {"area": groups[a["id"]]} for a in truth.dataset["annotations"]]
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    ranges = {name: (number, number) for number, name in enumerate(names)}
    return _match(truth, results, kind, limit, ranges, limits_misses=False)


def _match(
    truth: COCO,
    results: list[dict],
    kind: str,
    limit: int,
    ranges: Mapping[str, tuple[float, float]],
    *,
    limits_misses: bool = True,
) -> dict[str, list[_Matched]]:
    """Match detections with objects by pycocotools' rule, for each range of areas without the objects of other areas.

    With ``limits_misses``, detections of other areas that match nothing are ignored too.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, load_results(truth, results), kind)
    params = evaluation.params
    params.maxDets = [limit]
    # As evaluate() does, but only where there is something: most images have few of the categories.
    evaluation._prepare()
    images, categories = (
        {int(number): row for row, number in enumerate(ids)} for ids in (params.imgIds, params.catIds)
    )
    pairs = sorted({key for of in (evaluation._gts, evaluation._dts) for key, entries in of.items() if entries})
    evaluation.ious = {pair: evaluation.computeIoU(*pair) for pair in pairs}
    matched = {}
    for name, areas in ranges.items():
        cells: list[list[tuple[int, dict]]] = [[] for _ in categories]
        for image, category in evaluation.ious:
            cells[categories[category]].append((images[image], evaluation.evaluateImg(image, category, areas, limit)))
        matched[name] = [_collect(row, len(images), len(params.iouThrs), limits_misses) for row in cells]
    return matched


def _collect(
    present: Sequence[tuple[int, dict]], num_images: int, num_thresholds: int, limits_misses: bool
) -> _Matched:
    """Put the results of a category in images together; present: the row of each image and what COCOeval has of it."""
    objects = np.zeros(num_images, np.int64)
    for i, cell in present:
        objects[i] = np.sum(np.asarray(cell["gtIgnore"]) == 0)
    scores = np.concatenate([np.zeros(0), *(cell["dtScores"] for _, cell in present)])
    nothing = np.zeros((num_thresholds, 0), bool)
    found = np.concatenate([nothing, *(cell["dtMatches"] > 0 for _, cell in present)], axis=1)
    ignored = np.concatenate([nothing, *(cell["dtIgnore"].astype(bool) for _, cell in present)], axis=1)
    image = np.concatenate([np.zeros(0, int), *(np.full(len(cell["dtScores"]), i) for i, cell in present)])
    order = np.argsort(-scores, kind="stable")
    missed = ~found & ~ignored if limits_misses else ~found
    return _Matched(image[order], (found & ~ignored)[:, order], missed[:, order], objects)


def _warn_of_many_detections(results: list[dict], max_detections: int) -> None:
    counts = Counter((result["image_id"], result["category_id"]) for result in results)
    most = max(counts.values(), default=0)
    if most > max_detections:
        print(
            f"an image has {most} detections of a category, of which the best {max_detections} count; set "
            f"--max_detections={most} to count all",
            file=sys.stderr,
        )


def main() -> int:
    """Print the tables of boxes and masks."""
    parser = argparse.ArgumentParser(description="Splits AP by occlusion, size and crowding, with intervals.")
    parser.add_argument("annotations", help="COCO's instances_*.json")
    parser.add_argument("detections", help="detections.json of maskrcnn-jax eval or train")
    parser.add_argument("--against", help="detections.json of another model, to compare with")
    parser.add_argument("--draws", type=int, default=200, help="how often images are drawn for the intervals")
    parser.add_argument(
        "--max_detections", type=int, default=COCO_DETECTIONS, help="detections of an image that the model makes"
    )
    parser.add_argument("--json", help="file for all numbers")
    args = parser.parse_args()
    try:
        _print_tables(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _print_tables(args: argparse.Namespace) -> None:
    truth = load_annotations(args.annotations)
    found = read_results(as_path(args.detections), truth.imgs, truth.cats)
    other = read_results(as_path(args.against), truth.imgs, truth.cats) if args.against else None
    _warn_of_many_detections(found + (other or []), args.max_detections)
    draws = draw_images(len(truth.imgs), args.draws)
    written = {}
    for kind, title, missing in (("bbox", "box", "no objects"), ("segm", "mask", "no masks")):
        errors = Errors(truth, found, kind, args.max_detections)
        table = intervals(errors, draws)
        compared = {}
        if other is not None:
            compared = differences(errors, Errors(truth, other, kind, args.max_detections), draws)
        print(f"{title} AP with the interval of {CONFIDENCE:.0%} over {len(truth.imgs)} images")
        for group, (value, low, high) in table.items():
            if value < 0:
                print(f"  {group:16} {missing}")
                continue
            line = f"  {group:16} {value:6.3f} ({low:.3f} to {high:.3f}) {errors.number_of_objects(group):7} objects"
            if group in compared:
                (apart, least, most), chance = compared[group]
                line += f"   {apart:+.3f} ({least:+.3f} to {most:+.3f}) p = {chance:.3f}"
            print(line)
        written[kind] = {
            group: {"AP": table[group]._asdict(), "objects": errors.number_of_objects(group)}
            | ({"difference": compared[group][0]._asdict(), "p": compared[group][1]} if group in compared else {})
            for group in table
        }
    if args.json:
        write_json(as_path(args.json), written, indent=2)


if __name__ == "__main__":
    sys.exit(main())
