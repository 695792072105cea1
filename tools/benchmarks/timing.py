"""Timing in turns (A B A B ...), so that a slow minute of the machine meets both sides; rows, their table and JSON."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
OURS = "maskrcnn_jax"


class Spread(NamedTuple):
    """What repeated measurements came to."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise measurements; of a single one all three are the same."""
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median, low, high)


class Row(NamedTuple):
    """One measured quantity, of which less is better."""

    name: str
    ours: Spread
    reference: Spread | None = None
    reference_name: str = ""
    unit: str = "s"
    settings: Mapping[str, Any] = {}

    @property
    def ratio(self) -> float | None:
        """The reference's median over ours: above 1 we need less."""
        return None if self.reference is None else self.reference.median / self.ours.median

    def as_json(self) -> dict:
        """Return name, ours_s, reference_s, ratio, quartiles and settings; in place of _s the row's unit."""
        columns = {"name": self.name}
        for side, spread in (("ours", self.ours), ("reference", self.reference)):
            columns[f"{side}_{self.unit}"] = spread and spread.median
            columns[f"{side}_low_{self.unit}"] = spread and spread.low
            columns[f"{side}_high_{self.unit}"] = spread and spread.high
        return columns | {"ratio": self.ratio, "reference": self.reference_name, "settings": dict(self.settings)}


def wait_for(value: Any) -> None:
    """Block until what a function started on a device has been computed, by either library."""
    jax.block_until_ready(value)
    torch = sys.modules.get("torch")  # not imported by a run without a reference
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Time functions in turns.

    Args:
        contenders: name -> function of no arguments; what it returns is waited for.
        rounds: calls that count, of each function.
        warmup: calls before, of each function, that do not count: compilation, caches, buffers.
        clock: seconds.

    Returns:
        Name -> seconds of a call.
    """
    for function in contenders.values():
        for _ in range(warmup):
            wait_for(function())
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            start = clock()
            wait_for(function())
            seconds[name].append(clock() - start)
    return {name: Spread.of(values) for name, values in seconds.items()}


def compare(name: str, ours: Callable, references: Mapping[str, Callable], rounds: int, **settings) -> Row:
    """Time our function and the reference in each of its settings; the fastest of these is what we are compared to."""
    times = measure({OURS: ours, **references}, rounds)
    our_time = times.pop(OURS)
    settings["rounds"] = rounds
    if not times:
        return Row(name, our_time, settings=settings)
    best = min(times, key=lambda setting: times[setting].median)
    if len(times) > 1:
        settings["reference_settings_s"] = {setting: spread.median for setting, spread in times.items()}
    return Row(name, our_time, times[best], best, settings=settings)


def table(rows: Sequence[Row]) -> str:
    """Lay out rows for a terminal: medians with quartiles, the ratio, and what the reference was."""
    lines = [f"{'':58} {'ours':>27} {'reference':>27} {'ratio':>6}"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = f"{cell(row.ours, row.unit):>27} {cell(row.reference, row.unit):>27} {ratio:>6}"
        lines.append(f"{row.name[:58]:58} {cells}  {row.reference_name}".rstrip())
    return "\n".join(lines)


def cell(spread: Spread | None, unit: str) -> str:
    """Return a median with its quartiles, in a readable unit; nothing where nothing was measured."""
    if spread is None:
        return ""
    if unit == "s" and spread.median < 1:
        spread, unit = Spread(*(1000 * value for value in spread)), "ms"
    return f"{spread.median:.4g} {unit} ({spread.low:.4g}..{spread.high:.4g})"


def environment() -> dict:
    """Return the hardware, the versions, the commit and the date of a measurement."""
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "numpy", "torch", "torchvision", "pycocotools", "faster-coco-eval"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    on_gpu = jax.default_backend() == "gpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = {"cpu": _cpu_model(), "cores": cores, "gpu": jax.devices()[0].device_kind if on_gpu else None}
    return {
        "hardware": hardware,
        "versions": versions,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def write_json(path: str | Path, subject: str, rows: Sequence[Row]) -> None:
    """Write rows with all that says where they were measured."""
    content = {"subject": subject, **environment(), "rows": [row.as_json() for row in rows]}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit that is checked out, marked where files are changed other than documents, which hold rows."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str | None:
    """Return what git says of the checkout, or nothing where there is none."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
