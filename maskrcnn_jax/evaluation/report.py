"""An evaluation as one HTML page: metrics, precision and recall, confusions, errors by group, images, training curves.

With the detections of a second run, every table has its columns too, and every image is there twice.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.coco import COCO

from maskrcnn_jax import gallery, page
from maskrcnn_jax.evaluation.coco_metrics import COCO_DETECTIONS, statistics
from maskrcnn_jax.evaluation.confusion import MIN_OVERLAP, MIN_SCORE
from maskrcnn_jax.evaluation.failure_analysis import CROWDING, OCCLUSIONS, SIZES, Errors
from maskrcnn_jax.evaluation.report_data import KINDS, Counted, Run, objects_data, run_data
from maskrcnn_jax.evaluation.run_summary import read_lines
from maskrcnn_jax.paths import as_path

_KINDS = {"bbox": "box", "segm": "mask"}
_NUM_CURVES = 8  # categories in one plot
_LONGEST_LABEL = 32  # letters of a name in it


def write_report(
    path: str | Path,
    truth: COCO,
    runs: Sequence[Run],
    *,
    title: str,
    read: Callable[[int], np.ndarray | None],
    image_dir: Path | None = None,
    summary: Sequence[tuple[str, str]] = (),
    training: Path | None = None,
    max_detections: int = COCO_DETECTIONS,
) -> None:
    """Write the page.

    Args:
        path: the file; its folder is made if it does not exist.
        truth: annotations of the evaluated images, as ``ground_truth`` returns them.
        runs: the evaluated one, and one to compare it with if wanted.
        title: of the page.
        read: takes the id of an image and returns it, [h, w, 3] uint8 RGB, or None if it cannot be read.
        image_dir: where the images lie; None if they are not files.
        summary: names and values of what the run was made with.
        training: metrics.jsonl of the run, if there is one.
        max_detections: as the metrics were computed with.

    Raises:
        UserError: if the file cannot be written.
    """
    path = as_path(path)
    counted = [{kind: Counted(truth, run.results, kind, max_detections) for kind in _KINDS} for run in runs]
    objects, places = objects_data(truth)
    shown = [run_data(truth, run, places, of_run) for run, of_run in zip(runs, counted, strict=True)]
    worst_first = np.argsort(-np.sum([errors for _, errors in shown], axis=0), kind="stable").tolist()
    ids = list(truth.imgs)
    names = [str(image.get("file_name", image_id)) for image_id, image in truth.imgs.items()]
    data = {
        "classes": gallery.classes([category["name"] for category in truth.cats.values()]),
        "kinds": KINDS,
        "images": gallery.images(
            names,
            np.array([[i["height"], i["width"]] for i in truth.imgs.values()], np.int64).reshape(-1, 2),
            [image_dir and image_dir / name for name in names],
            gallery.thumbnails(worst_first, lambda row: read(ids[row])),
            path,
        ),
        "objects": objects,
        "runs": [of_run for of_run, _ in shown],
    }
    page.write_page(
        path,
        page.TEMPLATES / "report.html.j2",
        title=title,
        summary=summary,
        runs=[run.name for run in runs],
        num_images=len(truth.imgs),
        num_annotations=len(truth.anns),
        num_detections=[len(run.results) for run in runs],
        statistics=[[n, *_scores(runs, n)] for n in statistics(runs[0].metrics)],
        names=[category["name"] for category in truth.cats.values()],
        categories=_categories(truth, runs),
        precision_recall=_precision_recall(truth, runs, counted),
        min_score=MIN_SCORE,
        min_overlap=MIN_OVERLAP,
        lowest=max(of_run["lowest"] for of_run, _ in shown),
        groups=_groups(truth, runs, max_detections),
        training=_training(training),
        data=page.embed(data),
    )


def _scores(runs: Sequence[Run], name: str) -> list[float | str]:
    """Return a number of boxes and of masks of each run."""
    return [score for run in runs for score in _told(run.metrics[f"bbox_{name}"], run.metrics[f"segm_{name}"])]


def _categories(truth: COCO, runs: Sequence[Run]) -> list[list]:
    """Return colour, name, and box AP and mask AP of each run, of each category."""
    tables = [[run.metrics[f"{kind}_per_category"] for kind in _KINDS] for run in runs]
    labels, rows = list(truth.cats), []
    for category_id, name in zip(sorted(truth.cats), tables[0][0], strict=True):
        scores = [score for box, mask in tables for score in _told(box[name], mask[name])]
        rows.append([gallery.colour(labels.index(category_id)), name, *scores])
    return rows


def _told(box: float, mask: float) -> tuple[float | str, float | str]:
    """Return a box score and a mask score, or why there is none where COCO gives -1."""
    reason = "no objects" if box < 0 else "no masks"
    return box if box >= 0 else reason, mask if mask >= 0 else reason


def _precision_recall(truth: COCO, runs: Sequence[Run], counted: Sequence[dict[str, Counted]]) -> dict | None:
    """Plot precision against recall of masks; None if there are no annotated masks."""
    # [thresholds, recalls, categories] with the most detections; -1 where there are no objects
    precisions = [of_run["segm"].precision() for of_run in counted]
    known = np.flatnonzero((precisions[0] >= 0).all(axis=(0, 1)))
    if not len(known):
        return None
    params = counted[0]["segm"].evaluation.params
    recalls, ids = params.recThrs, [params.catIds[column] for column in known]
    labels = list(truth.cats)
    mean, axes = _plot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    for run, of_run, style in zip(runs, precisions, ("-", "--"), strict=False):
        precision, suffix = of_run[..., known], f", {_plain(run.name)}" if len(runs) > 1 else ""
        for colour, threshold, label in (("C0", 0, "IoU 0.50"), ("C1", 5, "IoU 0.75")):
            axes.plot(recalls, precision[threshold].mean(axis=-1), style, color=colour, label=label + suffix)
        label = "mean of IoU 0.50 to 0.95" + suffix
        axes.plot(recalls, precision.mean(axis=(0, 2)), style, color="C2", label=label)
    by_category, other_axes = _plot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    counts = Counter(annotation["category_id"] for annotation in truth.anns.values())
    for i in sorted(range(len(ids)), key=lambda i: -counts[ids[i]])[:_NUM_CURVES]:
        colour = gallery.colour(labels.index(ids[i]))
        other_axes.plot(recalls, precisions[0][0, :, known[i]], color=colour, label=_plain(truth.cats[ids[i]]["name"]))
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


def _plain(name: str) -> str:
    """Return a name that matplotlib shows as it is: its legends hide some, and take some for formulas."""
    if len(name) > _LONGEST_LABEL:  # the curves would have no room
        name = f"{name[: _LONGEST_LABEL // 2]}\u2026{name[-_LONGEST_LABEL // 2 :]}"
    shown = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _svg(figure: Figure) -> Markup:
    figure.axes[0].legend(fontsize="small")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the browser has more fonts
        return page.svg(figure)


def _groups(truth: COCO, runs: Sequence[Run], max_detections: int) -> list[list]:
    """Return group, number of objects, and box AP and mask AP of each run, of each group of objects."""
    errors = [[Errors(truth, run.results, kind, max_detections) for kind in _KINDS] for run in runs]
    no_draws = np.zeros((0, len(truth.imgs)))
    rows: list[list] = []
    for group in ("all", *OCCLUSIONS, *CROWDING, *SIZES):
        scores = [[e.average_precision(group, no_draws)[0] for e in of_run] for of_run in errors]
        rows.append([group, errors[0][0].number_of_objects(group), *(s for pair in scores for s in _told(*pair))])
    return rows


def _training(path: Path | None) -> dict | None:
    """Plot the losses and evaluations of a training run; None if there are none."""
    lines = read_lines(path)
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
