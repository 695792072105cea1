"""Whether two sides that were trained with the same seeds differ beyond chance: paired t-tests, a page and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from maskrcnn_jax import page
from maskrcnn_jax.writing import write_json

TERMS = ("loss", "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
_AP = {"box AP": "bbox_AP", "mask AP": "segm_AP"}
LEVEL, POWER = 0.05, 0.8
SIDES = ("maskrcnn_jax", "torchvision")


class PairedTest(NamedTuple):
    """One quantity of both sides over the seeds, and the t-test of its differences, ours minus torchvision's."""

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    difference: float  # mean
    interval: tuple[float, float]  # 95 % confidence interval of the mean difference
    spreads: float  # the mean difference in standard deviations over the seeds within a side
    p: float
    adjusted_p: float  # by Holm's method, over all quantities
    detectable: float  # smallest true difference that the test would find in 80 % of all such comparisons

    @property
    def differs(self) -> bool:
        """Whether the difference is beyond chance; never with a single seed."""
        return self.adjusted_p < LEVEL


def paired_test(name: str, ours: Sequence[float], theirs: Sequence[float]) -> PairedTest:
    """Test whether the mean of the differences is zero; without a second seed, all about chance is NaN."""
    differences = np.subtract(ours, theirs)
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return PairedTest(name, (*ours,), (*theirs,), mean, (math.nan, math.nan), *[math.nan] * 4)
    error = float(np.std(differences, ddof=1)) / n**0.5
    within = float(np.mean([np.var(ours, ddof=1), np.var(theirs, ddof=1)])) ** 0.5
    reach = float(stats.t.ppf(1 - LEVEL / 2, n - 1))
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return PairedTest(
        name,
        (*ours,),
        (*theirs,),
        mean,
        (mean - reach * error, mean + reach * error),
        mean / within if within else math.copysign(math.inf, mean) if mean else 0.0,
        p,
        p,
        (reach + float(stats.t.ppf(POWER, n - 1))) * error,
    )


def adjust(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """Adjust the p-values of several tests by Holm's method: the k-th smallest counts (number of tests - k) times."""
    order = np.argsort([test.p for test in tests])
    adjusted, largest = list(tests), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(tests[i].p * (len(tests) - rank), 1.0))
        adjusted[i] = tests[i]._replace(adjusted_p=math.nan if math.isnan(tests[i].p) else largest)
    return adjusted


class PairedResults:
    """The results of both sides, seed by seed."""

    def __init__(self):
        self.ours: list[dict] = []
        self.theirs: list[dict] = []

    def add(self, ours: dict, theirs: dict) -> None:
        """Add a seed: of each side a dict of "curve", "metrics" and "seconds"."""
        self.ours.append(ours)
        self.theirs.append(theirs)

    @property
    def _sides(self) -> tuple[list[dict], list[dict]]:
        return self.ours, self.theirs

    @property
    def tests(self) -> list[PairedTest]:
        """AP after training, and every loss, its mean over the last half of the steps."""
        values = {name: [[run["metrics"][key] for run in side] for side in self._sides] for name, key in _AP.items()}
        values |= {term: [[late_mean(run["curve"], term) for run in side] for side in self._sides] for term in TERMS}
        tests = [paired_test(name, *of_sides) for name, of_sides in values.items()]
        return adjust(tests)

    @property
    def differs(self) -> bool:
        """Whether any quantity differs beyond chance."""
        return any(test.differs for test in self.tests)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if len(self.ours) < 2:
            return "One seed says nothing about chance; give --seeds=3 or more."
        names = [test.name for test in self.tests if test.differs]
        seeds = f"{len(self.ours)} seeds, paired t-tests, p < {LEVEL} after Holm's correction"
        return f"Beyond chance differ: {', '.join(names)} ({seeds})." if names else f"Nothing differs ({seeds})."

    def table(self) -> str:
        """Return a text table."""
        columns = ("difference", "95 % interval", "in spreads", "p", "p (Holm)", "could see")
        lines = [f"{'':17} {SIDES[0]:>17} {SIDES[1]:>17} {columns[0]:>10} {columns[1]:>20}" + _right(columns[2:])]
        for test in self.tests:
            low, high = test.interval
            numbers = f"{test.spreads:.1f}", f"{test.p:.3f}", f"{test.adjusted_p:.3f}", f"{test.detectable:.4f}"
            mark = "  DIFFERS" if test.differs else ""
            lines.append(
                f"{test.name:17} {spread(test.ours):>17} {spread(test.theirs):>17} {test.difference:+10.4f} "
                f"{f'{low:+.4f} .. {high:+.4f}':>20}{_right(numbers)}{mark}"
            )
        return "\n".join([*lines, "", self.verdict])

    def write_json(self, path: str | Path) -> None:
        """Write the tests and all curves."""
        tests = [test._asdict() | {"differs": test.differs} for test in self.tests]
        for test in tests:  # JSON has no NaN
            test |= {name: None for name, value in test.items() if isinstance(value, float) and math.isnan(value)}
        write_json(Path(path), {"tests": tests, SIDES[0]: self.ours, SIDES[1]: self.theirs}, indent=1)

    def write_html(self, path: str | Path, title: str) -> None:
        """Write one self-contained page: the plot, the table, and what the numbers mean."""
        page.write_page(
            path,
            Path(__file__).with_suffix(".html.j2"),
            title=title,
            verdict=self.verdict,
            plot=page.svg(self.figure()),
            sides=SIDES,
            tests=[
                (
                    test.name,
                    spread(test.ours),
                    spread(test.theirs),
                    f"{test.difference:+.4f}",
                    "{:+.4f} .. {:+.4f}".format(*test.interval),
                    f"{test.spreads:.1f}",
                    f"{test.p:.3f}",
                    f"{test.adjusted_p:.3f}",
                    f"{test.detectable:.4f}",
                )
                for test in self.tests
            ],
            seconds=[spread([r["seconds"] for r in side]) for side in self._sides],
        )

    def write_plot(self, path: str | Path) -> None:
        """Write the plot as .svg or .png, by the ending of the name."""
        self.figure().savefig(path, dpi=90, bbox_inches="tight")

    def figure(self) -> Figure:
        """Plot the losses, with the range of the seeds, and the AP of every seed."""
        figure = Figure(figsize=(11, 5), layout="constrained")
        axes = figure.subplots(2, 4)
        for axis, term in zip(axes.flat, TERMS, strict=False):
            for side, runs, color in zip(SIDES, self._sides, ("tab:blue", "tab:orange"), strict=True):
                # A run that was interrupted has a point more.
                steps = min(([point["step"] for point in run["curve"]] for run in runs), key=len)
                values = np.stack([smooth(at_steps(run["curve"], term, steps)) for run in runs])
                axis.plot(steps, values.mean(axis=0), color=color, label=side, linewidth=1)
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.25, linewidth=0)
            axis.set(title=term, xlabel="step", ylim=(0, None))
        axes.flat[0].legend(fontsize="small")
        for axis, (title, key) in zip(axes.flat[len(TERMS) :], _AP.items(), strict=True):
            pairs = [[run["metrics"][key] for run in pair] for pair in zip(self.ours, self.theirs, strict=True)]
            for pair in pairs:
                axis.plot(SIDES, pair, marker="o", color="tab:gray")
            top = 1.2 * max(max(pair) for pair in pairs)
            axis.set(title=f"{title}, seed by seed", xlim=(-0.3, 1.3), ylim=(0, top or None))
        return figure


def late_mean(curve: Sequence[dict], term: str) -> float:
    """Return the mean of a loss over the last half of the steps, which have left the start behind."""
    steps = np.array([point["step"] for point in curve])
    late = steps > steps[-1] / 2
    values = np.array([point[term] for point in curve])
    return float(np.average(values[late], weights=np.diff(steps, prepend=0)[late]))


def at_steps(curve: Sequence[dict], term: str, steps: Sequence[int]) -> np.ndarray:
    """Return a loss at other steps than those that were logged."""
    return np.interp(steps, [point["step"] for point in curve], [point[term] for point in curve])


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return a running mean over a twentieth of the curve, shorter at its ends."""
    kernel = np.ones(max(len(values) // 20, 1))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation over the seeds."""
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def _right(texts: Sequence[str]) -> str:
    return "".join(f" {text:>10}" for text in texts)
