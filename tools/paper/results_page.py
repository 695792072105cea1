"""docs/results.md: the paper's numbers beside ours, its claims beside what the comparisons found, and fine-tuning."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.paper import ROWS
from maskrcnn_jax import page
from maskrcnn_jax.writing import write_json
from tools.finetuning.experiments import CLAIMS, PICTURED, RECIPES, finetuning_run
from tools.paper.experiments import COMPARED_IMAGES, COMPARISONS, Claim, Comparison, comparison_run, table_run
from tools.paper.figures import draw_curves, keep_picture
from tools.paper.running import RESULT

RESULTS = "results.json"
FINETUNING_PICTURE = "results_finetuning.jpg"
IMAGES_PER_SECOND = 50  # for estimates of what has not been run
_COLUMNS = {
    "box AP": "bbox_AP",
    "mask AP": "segm_AP",
    "mask AP75": "segm_AP75",
    "val accuracy": "eval_accuracy",
    "foreground accuracy": "eval_accuracy_foreground",
    "train accuracy": "train_accuracy",
    "train mask AP": "train_segm_AP",
}
_CURVES = {  # title of a panel -> label of a line -> metric
    "loss": {"training steps": "loss", "training images": "train_loss", "validation images": "eval_loss"},
    "accuracy of RoIs": {"training images": "train_accuracy", "validation images": "eval_accuracy"},
    "mask AP": {"training images": "train_segm_AP", "validation images": "segm_AP"},
}


def write_report(output: Path, docs: Path) -> None:
    """Add the finished runs below ``output`` to results.json; write results.md and its pictures from all results.

    Args:
        output: folder of the trainings.
        docs: folder of the documents.
    """
    results = load_results(docs)
    for path in output.rglob(RESULT):
        result = json.loads(path.read_text())
        results[result["run"]] = result
    write_json(docs / RESULTS, [results[name] for name in sorted(results)], indent=1)
    has_curves, has_predictions = _figures(results, output, docs)
    page.write_page(
        docs / "results.md",
        Path(__file__).with_suffix(".md.j2"),
        images_per_second=IMAGES_PER_SECOND,
        tables=_tables(results),
        starts=_starts(results),
        columns=list(_COLUMNS),
        comparisons=[_comparison(comparison, results) for comparison in COMPARISONS.values()],
        has_curves=has_curves,
        has_predictions=has_predictions,
        finetuning=_finetuning(results, docs),
    )


def load_results(docs: Path) -> dict[str, dict]:
    """Return the results that the documents hold, by name of the run."""
    path = docs / RESULTS
    return {result["run"]: result for result in json.loads(path.read_text())} if path.is_file() else {}


def _tables(results: Mapping[str, dict]) -> dict[int, list[dict]]:
    """Return the rows of each table of the paper: the paper's values, and ours at the last epoch or None."""
    tables = {}
    for (table, row), paper in sorted(ROWS.items()):
        result = results.get(table_run(table, row, 1, {}).name)
        hours = paper.epochs * paper.train_size / IMAGES_PER_SECOND / 3600
        last = result and result["curve"][-1]
        tables.setdefault(table, []).append({"row": row, "paper": paper, "last": last, "hours": hours})
    return tables


def _starts(results: Mapping[str, dict]) -> list[dict]:
    """Return the rows of the tables that were only started, or trained on less."""
    full = {table_run(table, row, 1, {}).name for table, row in ROWS}
    starts = []
    for name, result in results.items():
        if name.startswith("paper_table") and name not in full:
            row, changed, _ = name.split("/")
            names = {"row": row.removeprefix("paper_"), "changed": changed.replace("_", " ")}
            starts.append(result | names | {"lr": ", ".join(f"{rate:.2g}" for rate in result["lr"])})
    return starts


def _origins(found: Mapping[str, Mapping[int, dict]]) -> str:
    """Return the commits and dates of the trainings, each with its seeds if those differ."""
    seeds = {}
    for by_seed in found.values():
        for seed, result in by_seed.items():
            seeds.setdefault((result["date"], result["commit"]), set()).add(seed)
    differ = len(set(map(frozenset, seeds.values()))) > 1
    parts = [
        f"commit {commit}, {date}" + (f" (seed {', '.join(map(str, sorted(of)))})" if differ else "")
        for (date, commit), of in sorted(seeds.items())
    ]
    return "; ".join(parts)


def _comparison(comparison: Comparison, results: Mapping[str, dict]) -> dict:
    """Return the section of a comparison, at the scale with the most results; only its title if there are none."""
    found = _of_variants(comparison, results)
    if not found:
        return {"title": comparison.title, "variants": []}
    trained = [result for by_seed in found.values() for result in by_seed.values()]
    return {
        "title": comparison.title,
        "images": _join(map(_images, trained)),
        "steps": _join(result["steps"] for result in trained),
        "origins": _origins(found),
        "variants": [
            (name, len(by_seed), [_mean(_at_end(by_seed, key)) for key in _COLUMNS.values()])
            for name, by_seed in found.items()
        ],
        "claims": _judged(comparison.claims, found),
        "note": comparison.note,
    }


def _judged(claims: Iterable[Claim], found: Mapping[str, Mapping[int, dict]]) -> list[dict]:
    """Return what the seeds that two variants share say of each claim; nothing where they share none."""
    judged = []
    for claim in claims:
        better, worse = found[claim.better], found[claim.worse]
        seeds = sorted(better.keys() & worse.keys())
        differences = [better[s]["curve"][-1][claim.metric] - worse[s]["curve"][-1][claim.metric] for s in seeds]
        if differences:
            told = {"verdict": _verdict(differences), "difference": _mean(differences, "+")}
            judged.append({"text": claim.text, "metric": claim.metric} | told)
    return judged


def _join(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(numbers))))


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
    if len(differences) == 1:
        return "undecided (one seed)"
    held = sum(difference > 0 for difference in differences)
    verdict = {len(differences): "holds", 0: "does not hold"}.get(held, "undecided")
    return f"{verdict} ({held} of {len(differences)} seeds)"


def _figures(results: Mapping[str, dict], output: Path, docs: Path) -> tuple[bool, bool]:
    """Draw the curves of Fig. 4 and keep the pictures of Fig. 5 and 6 of the same run; return which of them exist."""
    found = _of_variants(COMPARISONS["curves"], results)
    if not found:
        return False, False
    result = next(iter(found["10 epochs"].values()))
    curve = result["curve"]
    epochs = [point["epoch"] for point in curve]
    draw_curves(
        {
            title: {label: (epochs, [[point[key] for point in curve]]) for label, key in lines.items()}
            for title, lines in _CURVES.items()
        },
        docs / "results_curves.png",
    )
    picture, kept = output / result["run"] / "predictions.jpg", docs / "results_predictions.jpg"
    if picture.is_file():
        keep_picture(picture, kept)
    return True, kept.is_file()


def _finetuning(results: Mapping[str, dict], docs: Path) -> dict:
    """Return the section on fine-tuning, and draw its curves."""
    found = {name: _of_recipe(name, results) for name in RECIPES}
    trained = [result for by_seed in found.values() for result in by_seed.values()]
    curves = {
        name: (range(1, len(losses[0]) + 1), losses)
        for name, by_seed in found.items()
        if (losses := [result["losses"] for result in by_seed.values()])
    }
    if curves:
        draw_curves({"training loss": curves}, docs / "results_finetuning.png")
    columns = {"box AP": "bbox_AP", "box AP50": "bbox_AP50", "mask AP": "segm_AP", "mask AP50": "segm_AP50"}
    return {
        "columns": list(columns),
        "rows": [
            (name, len(by_seed), [_mean(_at_end(by_seed, key)) for key in columns.values()])
            for name, by_seed in found.items()
        ],
        "claims": _judged(CLAIMS, found),
        "steps": _join(result["steps"] for result in trained),
        "origins": _origins(found),
        "hardware": " or ".join(sorted({_hardware(**result["hardware"]) for result in trained})),
        "minutes": sorted(
            {round(time(result["seconds"] for result in trained) / 60) for time in (min, max) if trained}
        ),
        "has_curves": bool(curves),
        "pictured": list(PICTURED) if (docs / FINETUNING_PICTURE).is_file() else [],
    }


def _hardware(cores: int, cpu: str, **_: object) -> str:
    return f"{cores} CPU core{'s' if cores > 1 else ''} ({cpu})"


def _of_recipe(name: str, results: Mapping[str, dict]) -> dict[int, dict]:
    """Return the results of the trainings by a recipe, by seed."""
    seeds = {run: int(run.rpartition("/seed")[2]) for run in results}
    return {seed: results[run] for run, seed in seeds.items() if finetuning_run(name, seed).name == run}


def _at_end(by_seed: Mapping[int, dict], metric: str) -> list[float]:
    return [result["curve"][-1][metric] for result in by_seed.values()]
