"""An evaluation as one HTML page: AP, precision and recall, confusion, errors by group, images, training curves."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax import page
from maskrcnn_jax.evaluation.coco_metrics import (
    COCO_DETECTIONS,
    detection_limits,
    load_results,
    mask_truth,
    statistics,
)
from maskrcnn_jax.evaluation.confusion import MIN_OVERLAP, MIN_SCORE, ImageErrors, confusion
from maskrcnn_jax.evaluation.failure_analysis import CROWDING, OCCLUSIONS, SIZES, Errors
from maskrcnn_jax.paths import read_bytes

_KINDS = {"bbox": "box", "segm": "mask"}
_MAX_CLASSES = 20  # in a confusion matrix; with more categories, as many of the most frequent confusions are listed
_NUM_CURVES = 8  # categories in one plot
_NUM_IMAGES = 6  # best and worst ones


def write_report(
    path: str | Path,
    truth: COCO,
    results: list[dict],
    metrics: dict,
    *,
    title: str,
    draw: Callable[[int], np.ndarray | None],
    training: Path | None = None,
    max_detections: int = COCO_DETECTIONS,
) -> None:
    """Write the page.

    Args:
        path: the file; its folder is made if it does not exist.
        truth: annotations of the evaluated images, as ``ground_truth`` returns them.
        results: COCO results.
        metrics: as ``coco_metrics.evaluate`` returns them.
        title: of the page.
        draw: takes the id of an image and returns ground truth beside predictions, [h, w, 3] uint8 RGB, or None if the
            image cannot be read.
        training: metrics.jsonl of the run, if there is one.
        max_detections: as the metrics were computed with.

    Raises:
        UserError: if the file cannot be written.
    """
    pairs, images = confusion(truth, results)
    per_category = metrics["segm_per_category"]
    page.write_page(
        path,
        page.TEMPLATES / "report.html.j2",
        title=title,
        num_images=len(truth.imgs),
        num_annotations=len(truth.anns),
        num_detections=len(results),
        statistics=[[n, *_scores(metrics[f"bbox_{n}"], metrics[f"segm_{n}"])] for n in statistics(metrics)],
        categories=[[name, *_scores(ap, per_category[name])] for name, ap in metrics["bbox_per_category"].items()],
        precision_recall=_precision_recall(truth, results, max_detections),
        min_score=MIN_SCORE,
        min_overlap=MIN_OVERLAP,
        confusion=_confusion(truth, pairs),
        groups=_groups(truth, results, max_detections),
        training=_training(training),
        **_images(images, truth, draw),
    )


def _scores(box: float, mask: float) -> tuple[float | str, float | str]:
    """Return a box score and a mask score, or why there is none where COCO gives -1."""
    reason = "no objects" if box < 0 else "no masks"
    return box if box >= 0 else reason, mask if mask >= 0 else reason


def _precision_recall(truth: COCO, results: list[dict], max_detections: int) -> dict | None:
    """Plot precision against recall of masks; None if there are no annotated masks."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(mask_truth(truth), load_results(truth, results), "segm")
        evaluation.params.maxDets = detection_limits(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
    # [thresholds, recalls, categories] of all areas with the most detections; -1 where there are no objects
    precision = evaluation.eval["precision"][..., 0, -1]
    known = np.flatnonzero((precision >= 0).all(axis=(0, 1)))
    if not len(known):
        return None
    precision, recalls = precision[..., known], evaluation.params.recThrs
    ids = [evaluation.params.catIds[column] for column in known]
    mean, axes = _plot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    for threshold, label in ((0, "IoU 0.50"), (5, "IoU 0.75")):
        axes.plot(recalls, precision[threshold].mean(axis=-1), label=label)
    axes.plot(recalls, precision.mean(axis=(0, 2)), label="mean of IoU 0.50 to 0.95")
    by_category, other_axes = _plot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    counts = Counter(annotation["category_id"] for annotation in truth.anns.values())
    for i in sorted(range(len(ids)), key=lambda i: -counts[ids[i]])[:_NUM_CURVES]:
        other_axes.plot(recalls, precision[0, :, i], label=truth.cats[ids[i]]["name"])
    return {
        "mean": _svg(mean),
        "by_category": _svg(by_category),
        "num_shown": _NUM_CURVES if len(ids) > _NUM_CURVES else None,
    }


def _plot(**settings) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.5, 4))
    axes = figure.subplots()
    axes.set(**settings)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    figure.axes[0].legend(fontsize="small")
    return page.svg(figure)


def _confusion(truth: COCO, pairs: Counter) -> dict:
    """Return the confusion matrix, or the most frequent confusions if there are too many categories for a matrix."""
    names = {category["id"]: category["name"] for category in truth.cats.values()}
    if len(names) <= _MAX_CLASSES:
        ids = [*names, None]  # None: missed objects in the columns, false positives in the rows
        matrix = [[pairs[i, j] if (i, j) != (None, None) else "" for j in ids] for i in ids]
        return {"names": list(names.values()), "matrix": matrix}
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    names[None] = "nothing"
    return {"pairs": [[names[i], names[j], count] for (i, j), count in wrong.most_common(_MAX_CLASSES)]}


def _groups(truth: COCO, results: list[dict], max_detections: int) -> list[list]:
    """Return group, number of objects, box AP and mask AP of each group of objects."""
    errors = [Errors(truth, results, kind, max_detections) for kind in _KINDS]
    no_draws = np.zeros((0, len(truth.imgs)))
    return [
        [
            group,
            errors[0].number_of_objects(group),
            *_scores(*(e.average_precision(group, no_draws)[0] for e in errors)),
        ]
        for group in ("all", *OCCLUSIONS, *CROWDING, *SIZES)
    ]


def _images(
    images: dict[int, ImageErrors], truth: COCO, draw: Callable[[int], np.ndarray | None]
) -> dict[str, list[dict]]:
    """Return the pictures of the worst and the best images; no image is both."""
    order = sorted(images, key=lambda i: (images[i].share_right, -images[i].errors))
    worst = [i for i in order if images[i].errors][:_NUM_IMAGES]
    order = sorted(images, key=lambda i: (-images[i].share_right, -images[i].right))
    best = [i for i in order if images[i].right and i not in worst][:_NUM_IMAGES]

    def drawn(chosen: list[int]) -> list[dict]:
        pictures = [(i, draw(i)) for i in chosen]
        return [
            {
                "source": page.image_source(picture),
                "name": truth.imgs[i].get("file_name", i),
                "errors": images[i],
            }
            for i, picture in pictures
            if picture is not None
        ]

    return {"worst": drawn(worst), "best": drawn(best)}


def _training(path: Path | None) -> dict | None:
    """Plot the losses and evaluations of a training run; None if there are none."""
    if path is None or not path.is_file():
        return None
    lines = []
    for line in read_bytes(path).decode().splitlines():
        with contextlib.suppress(ValueError):  # the last line is cut off if the run was killed
            lines.append(json.loads(line))
    steps = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "segm_AP" in line]
    if not steps:
        return None
    losses, axes = _plot(xlabel="step", ylabel="loss")
    for name in ("loss", *sorted(key for key in steps[0] if key.startswith("loss_") and key != "loss_scale")):
        axes.plot([line["step"] for line in steps], [line.get(name, np.nan) for line in steps], label=name)
    scores, other_axes = _plot(xlabel="step", ylabel="AP")
    for key, kind in _KINDS.items():
        points = [line["step"] for line in evaluated], [line[f"{key}_AP"] for line in evaluated]
        other_axes.plot(*points, marker="o", label=f"{kind} AP")
    for either in (axes, other_axes):
        either.set_ylim(bottom=0)
    return {"losses": _svg(losses), "average_precision": _svg(scores)}
