"""An evaluation as one HTML page: AP, precision and recall, confusion, errors by group, images, training curves."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax import page
from maskrcnn_jax.evaluation.coco_metrics import STATISTICS, load_results, mask_truth
from maskrcnn_jax.evaluation.confusion import MIN_OVERLAP, MIN_SCORE, ImageErrors, confusion
from maskrcnn_jax.evaluation.failure_analysis import CROWDING, OCCLUSIONS, SIZES, Errors
from maskrcnn_jax.writing import replace_file

_KINDS = {"bbox": "box", "segm": "mask"}
_MOST_CLASSES = 20  # in a matrix of confusion; of more, so many of the confusions are listed
_CURVES = 8  # of categories in one plot
_IMAGES = 6  # of the best and of the worst
_NOTHING = "nothing"


def write_report(
    path: str | Path,
    truth: COCO,
    results: list[dict],
    metrics: dict,
    *,
    title: str,
    draw: Callable[[int], np.ndarray | None],
    training: Path | None = None,
) -> None:
    """Write the page.

    Args:
      path: the file; its folder is made.
      truth: annotations of the images that were evaluated, as ``load_annotations`` returns them.
      results: COCO results.
      metrics: as ``coco_eval.evaluate`` returns them.
      title: of the page.
      draw: returns ground truth beside predictions for the id of an image, RGB uint8, or None where it has no picture.
      training: metrics.jsonl of the run, if there is one.

    Raises:
      UserError: when the file cannot be written.
    """
    pairs, images = confusion(truth, results)
    sections = [
        page.paragraph(
            f"{len(truth.imgs)} images, {len(truth.anns)} annotations, {len(results)} detections. "
            f"Box AP {_text(metrics['bbox_AP'])}, mask AP {_text(metrics['segm_AP'])}."
        ),
        *_average_precision(metrics),
        *_precision_recall(truth, results),
        *_confusion(truth, pairs),
        *_groups(truth, results),
        *_pictures(images, truth, draw),
        *_training(training),
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page.page(title, sections))


def _average_precision(metrics: dict) -> Iterator[str]:
    yield page.heading("Average precision")
    rows = [[kind, *(_text(metrics[f"{key}_{name}"]) for name in STATISTICS)] for key, kind in _KINDS.items()]
    yield page.table(["", *STATISTICS], rows)
    boxes, masks = (metrics[f"{key}_per_category"] for key in _KINDS)
    yield page.table(
        ["category", "box AP", "mask AP"], [[name, _text(boxes[name]), _text(masks[name])] for name in boxes]
    )


def _text(value: float) -> float | str:
    """Return an AP for a table; COCO's -1 means that there are no objects, or none with a mask."""
    return "none to find" if value < 0 else round(value, 3)


def _precision_recall(truth: COCO, results: list[dict]) -> Iterator[str]:
    yield page.heading("Precision and recall")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(mask_truth(truth), load_results(truth, results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    # [thresholds, recalls, categories], of all areas with a hundred detections; -1 where there are no objects
    precision = evaluation.eval["precision"][..., 0, -1]
    known = np.flatnonzero((precision >= 0).all(axis=(0, 1)))
    if not len(known):
        yield page.paragraph("There are no objects with masks to find.")
        return
    precision, recalls = precision[..., known], evaluation.params.recThrs
    names = [truth.cats[evaluation.params.catIds[column]]["name"] for column in known]
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2, sharey=True)
    for threshold, label in ((0, "overlap 0.50"), (5, "overlap 0.75")):
        left.plot(recalls, precision[threshold].mean(axis=-1), label=label)
    left.plot(recalls, precision.mean(axis=(0, 2)), label="mean of 0.50 to 0.95")
    numbers = Counter(annotation["category_id"] for annotation in truth.anns.values())
    by_number = sorted(range(len(known)), key=lambda i: -numbers[evaluation.params.catIds[known[i]]])[:_CURVES]
    for i in by_number:
        right.plot(recalls, precision[0, :, i], label=names[i])
    left.set_title("masks, mean of the categories")
    right.set_title("masks, overlap 0.50" + (f", {_CURVES} categories" if len(known) > _CURVES else ""))
    left.set_ylabel("precision")
    for axes in (left, right):
        axes.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    yield page.plot(figure, "Share of right ones among the detections, against the share of objects that they find.")


def _confusion(truth: COCO, pairs: Counter) -> Iterator[str]:
    yield page.heading("Which classes are taken for which")
    yield page.paragraph(
        f"Detections with a score of {MIN_SCORE} and more, matched with the objects whose boxes they overlap by "
        f"{MIN_OVERLAP} and more. Rows are what is there, columns what was said."
    )
    names = {None: _NOTHING} | {category["id"]: category["name"] for category in truth.cats.values()}
    if len(names) - 1 <= _MOST_CLASSES:
        ids = [*truth.cats, None]
        rows = [[names[i], *(pairs[i, j] if (i, j) != (None, None) else "" for j in ids)] for i in ids]
        yield page.table(["", *(names[i] for i in ids)], rows)
        return
    wrong = Counter({pair: number for pair, number in pairs.items() if pair[0] != pair[1]})
    rows = [[names[there], names[said], number] for (there, said), number in wrong.most_common(_MOST_CLASSES)]
    yield page.table(["there is", "said to be", "times"], rows)


def _groups(truth: COCO, results: list[dict]) -> Iterator[str]:
    yield page.heading("By occlusion, crowding and size")
    errors = [Errors(truth, results, kind) for kind in _KINDS]
    nothing = np.zeros((0, len(truth.imgs)))
    rows = [
        [group, errors[0].number_of_objects(group), *(_text(e.average_precision(group, nothing)[0]) for e in errors)]
        for group in ("all", *OCCLUSIONS, *CROWDING, *SIZES)
    ]
    yield page.table(["objects", "number", "box AP", "mask AP"], rows)
    yield page.paragraph(
        "Intervals and comparisons with another model: python -m maskrcnn_jax.evaluation.failure_analysis"
    )


def _pictures(images: dict[int, ImageErrors], truth: COCO, draw: Callable[[int], np.ndarray | None]) -> Iterator[str]:
    order = sorted(images, key=lambda i: (images[i].share_right, -images[i].errors, -images[i].right))
    worst = [i for i in order if images[i].errors][:_IMAGES]
    best = [i for i in order[::-1] if images[i].right and i not in worst][:_IMAGES]
    for heading, chosen in (("Worst images", worst), ("Best images", best)):
        yield page.heading(heading)
        yield page.paragraph(
            "By the share of right ones among all objects and detections where nothing is; of equal ones those with "
            "more objects or errors come first."
        )
        pictures = [(i, draw(i)) for i in chosen]
        drawn = [
            page.picture(picture, f"{truth.imgs[i].get('file_name', i)}: {_sentence(images[i])}")
            for i, picture in pictures
            if picture is not None
        ]
        yield f"<div>{''.join(drawn)}</div>" if drawn else page.paragraph("There are none.")


def _sentence(errors: ImageErrors) -> str:
    return (
        f"{errors.right} right, {errors.confused} of another class, {errors.missed} missed, "
        f"{errors.invented} where nothing is"
    )


def _training(path: Path | None) -> Iterator[str]:
    if path is None or not path.is_file():
        return
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # cut off when the run was killed
            lines.append(json.loads(line))
    steps = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "segm_AP" in line]
    if not steps:
        return
    yield page.heading("Training")
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for name in ("loss", *sorted(key for key in steps[0] if key.startswith("loss_") and key != "loss_scale")):
        left.plot([line["step"] for line in steps], [line.get(name, np.nan) for line in steps], label=name)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    for key, kind in _KINDS.items():
        points = [line["step"] for line in evaluated], [line[f"{key}_AP"] for line in evaluated]
        right.plot(*points, marker="o", label=f"{kind} AP")
    right.set(xlabel="step", ylabel="AP", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    yield page.plot(figure, "Losses of the training steps, and AP of the evaluations.")
