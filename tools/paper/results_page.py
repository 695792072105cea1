"""docs/results.md: the paper's numbers beside ours, what its text claims beside what the comparisons found."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np

from configs.paper import ROWS
from maskrcnn_jax.writing import write_json
from tools.paper.experiments import COMPARED_IMAGES, COMPARISONS, Comparison, comparison_run, table_run
from tools.paper.running import RESULT

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402 the backend is to be chosen first

RESULTS = "results.json"
PICTURE_WIDTH = 1200  # pixels
IMAGES_PER_SECOND = 50  # for estimates of what has not been run
_COLUMNS = {
    "box AP": "bbox_AP",
    "mask AP": "segm_AP",
    "mask AP75": "segm_AP75",
    "val accuracy": "eval_accuracy",
    "of objects": "eval_accuracy_foreground",
    "train accuracy": "train_accuracy",
    "train mask AP": "train_segm_AP",
}


def write_report(output: Path, docs: Path) -> None:
    """Add the finished runs below ``output`` to results.json; write results.md and its pictures from all there are.

    Args:
      output: folder of the trainings.
      docs: folder of the documents.
    """
    results = load_results(docs)
    for path in output.rglob(RESULT):
        result = json.loads(path.read_text())
        results[result["run"]] = result
    write_json(docs / RESULTS, [results[name] for name in sorted(results)], indent=1)
    lines = [_INTRODUCTION, *_tables(results), *_starts(results)]
    for comparison in COMPARISONS.values():
        lines += _comparison(comparison, results)
    lines += _figures(results, output, docs)
    (docs / "results.md").write_text("\n".join(lines).rstrip() + "\n")


def load_results(docs: Path) -> dict[str, dict]:
    """Return the results that the documents hold, by name of the run."""
    path = docs / RESULTS
    return {result["run"]: result for result in json.loads(path.read_text())} if path.is_file() else {}


_INTRODUCTION = f"""# Results

What the paper reports beside what this project finds; `tools/reproduce_paper.py` trains it and writes this file, and
its head says how. The paper gives no AP but an accuracy that it does not define. Ours is the share of RoIs whose most
probable class is right, background included, as `maskrcnn_jax/evaluation/accuracy.py` says; "of objects" is the share
among the RoIs of objects. `results.json` holds every number, with its command, commit, hardware, versions and date.
Costs of what has not been run are estimates at {IMAGES_PER_SECOND} images a second. By chance
alone a claim holds with each of three seeds one time in eight.
"""


_STARTS = """What is changed is what a laptop has no time for; the network has its full width. A few steps show that a
row starts: from random values and not from ImageNet's weights, without warm-up, which is cut to a tenth of so short a
run. At the full learning rate, which Table 2 has higher, the loss may then rise at first.
"""


def _tables(results: Mapping[str, dict]) -> list[str]:
    lines = []
    for table in sorted({table for table, _ in ROWS}):
        rows = [
            "| row | backbone | epochs | images | lr | paper: train, val accuracy | ours | box, mask AP |",
            "|---|---|---|---|---|---|---|---|",
        ]
        commands = []
        for (of, row), values in ROWS.items():
            if of != table:
                continue
            run = table_run(table, row, 1, {})
            head = f"| {row} | {values.backbone} | {values.epochs} | {values.train_size} | {values.lr:g} "
            head += f"| {values.train_accuracy}, {values.val_accuracy} |"
            if run.name in results:
                last = results[run.name]["curve"][-1]
                accuracies = f"{100 * last['train_accuracy']:.0f}, {100 * last['eval_accuracy']:.0f}"
                rows.append(f"{head} {accuracies} | {last['bbox_AP']:.3f}, {last['segm_AP']:.3f} |")
            else:
                hours = values.epochs * values.train_size / IMAGES_PER_SECOND / 3600
                rows.append(f"{head} not run | not run |")
                commands.append(
                    f"python tools/reproduce_paper.py --table={table} --rows={row} --coco_dir=COCO "
                    f"--weights={values.backbone}.pth  # about {hours:.0f} hours"
                )
        lines += [f"## Table {table}", "", *rows, ""]
        if commands:
            lines += ["```", *commands, "```", ""]
    return lines


def _starts(results: Mapping[str, dict]) -> list[str]:
    """Return a table of the rows that have been started only, or been trained on less."""
    full = {table_run(table, row, 1, {}).name for table, row in ROWS}
    started = {name: result for name, result in results.items() if name.startswith("paper_table") and name not in full}
    if not started:
        return []
    lines = ["## Rows of the tables tried at another scale", "", _STARTS]
    lines += ["| row | changed | steps | first, last loss | lr first, highest, last |", "|---|---|---|---|---|"]
    for name, result in started.items():
        row, changed, _ = name.split("/")
        rates = ", ".join(f"{rate:.2g}" for rate in result["lr"])
        lines.append(
            f"| {row.removeprefix('paper_')} | {changed.replace('_', ' ')} | {result['steps']} "
            f"| {result['first_loss']:.2f}, {result['last_loss']:.2f} | {rates} |"
        )
    return [*lines, ""]


def _origins(found: Mapping[str, Mapping[int, dict]]) -> str:
    """Say which seeds were trained at which commit, on which day."""
    seeds = {}
    for by_seed in found.values():
        for seed, result in by_seed.items():
            seeds.setdefault((result["date"], result["commit"]), set()).add(seed)
    parts = [
        f"commit {commit}, {date}" + (f" (seed {', '.join(map(str, sorted(of)))})" if len(seeds) > 1 else "")
        for (date, commit), of in sorted(seeds.items())
    ]
    return "; ".join(parts)


def _comparison(comparison: Comparison, results: Mapping[str, dict]) -> list[str]:
    """Return the section of a comparison, at the scale for which there are most results."""
    found = _of_variants(comparison, results)
    if not found:
        return [f"## {comparison.title}", "", "Not run.", ""]
    trained = [result for by_seed in found.values() for result in by_seed.values()]
    images, steps = (
        " or ".join(map(str, sorted(set(numbers))))
        for numbers in (map(_images, trained), (result["steps"] for result in trained))
    )
    lines = [f"## {comparison.title}", ""]
    lines += [f"{images} training images, {steps} steps; {_origins(found)}.", ""]
    lines += ["| | seeds | " + " | ".join(_COLUMNS) + " |", "|---" * (len(_COLUMNS) + 2) + "|"]
    for name, by_seed in found.items():
        cells = [_mean([result["curve"][-1][key] for result in by_seed.values()]) for key in _COLUMNS.values()]
        lines.append(f"| {name} | {len(by_seed)} | " + " | ".join(cells) + " |")
    lines.append("")
    for claim in comparison.claims:
        better, worse = found[claim.better], found[claim.worse]
        seeds = sorted(better.keys() & worse.keys())
        differences = [better[s]["curve"][-1][claim.metric] - worse[s]["curve"][-1][claim.metric] for s in seeds]
        if differences:
            lines += [f"- {claim.text}: **{_verdict(differences)}**; {claim.metric} {_mean(differences, '+')}.", ""]
    return [*lines, comparison.note, ""] if comparison.note else lines


def _of_variants(comparison: Comparison, results: Mapping[str, dict]) -> dict[str, dict[int, dict]]:
    """Return the results of each variant by seed, of the seeds that all have if there are any; nothing without any."""
    by_scale = {}
    for result in results.values():
        fields, seed = result["run"].split("/")[-2:]
        if "train_limit=" not in fields:
            continue
        for name, changes in comparison.variants.items():
            seed_number = int(seed.removeprefix("seed"))
            scale = _images(result) / (COMPARED_IMAGES * changes.get("share", 1))
            if comparison_run(dict(changes), seed_number, scale).name == result["run"]:
                variants = by_scale.setdefault(scale, {name: {} for name in comparison.variants})
                variants[name][seed_number] = result
    found = max(by_scale.values(), key=lambda found: sum(map(len, found.values())), default={})
    # Means of other seeds could not be compared: seeds differ by as much as most variants do.
    common = set.intersection(*(set(by_seed) for by_seed in found.values())) if found else set()
    if not common:
        return found
    return {name: {seed: by_seed[seed] for seed in sorted(common)} for name, by_seed in found.items()}


def _images(result: Mapping) -> int:
    return int(result["run"].split("train_limit=")[1].split("_")[0].split("/")[0])


def _mean(values: Sequence[float], sign: str = "") -> str:
    """Return mean and standard deviation of the seeds, for a table."""
    if not values:
        return "not run"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.3f}{spread}"


def _verdict(differences: Sequence[float]) -> str:
    if all(difference > 0 for difference in differences):
        return f"held, with each of {len(differences)} seeds"
    if all(difference <= 0 for difference in differences):
        return f"did not hold, with any of {len(differences)} seeds"
    return "undecided, the seeds disagree"


def _figures(results: Mapping[str, dict], output: Path, docs: Path) -> list[str]:
    """Draw the curves of Fig. 4 and keep the pictures of Fig. 5 and 6 of the run that they belong to."""
    found = _of_variants(COMPARISONS["curves"], results)
    if not found:
        return []
    result = next(iter(found["10 epochs"].values()))
    _draw_curves(result["curve"], docs / "results_curves.png")
    lines = ["![loss, accuracy and AP by epoch](results_curves.png)", ""]
    pictures = output / result["run"] / "predictions.jpg"
    if pictures.is_file():
        picture = cv2.imread(str(pictures))
        height = round(picture.shape[0] * PICTURE_WIDTH / picture.shape[1])
        picture = cv2.resize(picture, (PICTURE_WIDTH, height), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(docs / "results_predictions.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not (docs / "results_predictions.jpg").is_file():
        return lines
    return [
        *lines,
        "## Predictions (Fig. 5, 6)",
        "",
        "Of the network of these curves, on images that it has not seen: annotated on the left, found on the right.",
        "",
        "![annotated and found objects](results_predictions.jpg)",
    ]


def _draw_curves(curve: Sequence[Mapping[str, float]], path: Path) -> None:
    panels = {
        "loss": {"training steps": "loss", "training images": "train_loss", "validation images": "eval_loss"},
        "accuracy of RoIs": {"training images": "train_accuracy", "validation images": "eval_accuracy"},
        "mask AP": {"training images": "train_segm_AP", "validation images": "segm_AP"},
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.5), layout="constrained")
    epochs = [point["epoch"] for point in curve]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, key in lines.items():
            axis.plot(epochs, [point[key] for point in curve], marker="o", markersize=3, label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
