"""How our cost grows with the image, the batch, objects, detections, devices and the dataset; a table and plots."""

import dataclasses
import functools
import html
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from configs import shapes
from maskrcnn_jax.data.coco import load_index
from maskrcnn_jax.structures import Batch
from tests.data import large_index
from tools.benchmarks import inference, train
from tools.benchmarks.child import peak_memory, run_child
from tools.benchmarks.inputs import Settings, default_dtype, make_batch, make_model, random_objects, read_photos
from tools.benchmarks.timing import OURS, Row, Spread, cell, measure

SIDE = 256  # pixels; most of the time goes into compiling, which takes as long for larger images
SIDES = (0.5, 1, 1.5, 2)  # times that
BATCHES = (1, 2, 4)
DETECTIONS = (10, 50, 100)
OBJECTS = (1, 8, 64)
DEVICES = (1, 2, 4)
IMAGES = (10_000, 40_000, 118_287)


class Axis(NamedTuple):
    """What is measured over what."""

    name: str
    unit: str  # of the numbers along the axis
    at: str  # what does not change

    def row(self, x: int, value: Spread, unit: str = "s") -> Row:
        """Return the row of a point."""
        said = {"axis": self.name, "x": x, "x_unit": self.unit, "at": f"{self.name}: {self.at}"}
        return Row(f"{self.name}: {x:,} {self.unit}", value, unit=unit, settings=said)


def run(settings: Settings) -> Iterator[Row]:
    """Measure every axis, at images of SIDE or of --height, a batch of 1, 100 detections and 7 objects."""
    side = settings.height or SIDE
    settings = settings.having(height=side, width=side, rounds=3, dtype=default_dtype())
    one, network = dataclasses.replace(settings, batch_size=1), settings.model_options["backbone"]
    square = f"{side}x{side}"
    infer = functools.partial(inference.time_of_ours, make_model(one, box_score_thresh=0.0))

    axis = Axis("inference by image area", "pixels", f"{network}, square images, batch 1, 100 detections")
    for scaled in (int(factor * side) for factor in SIDES):
        at = dataclasses.replace(one, height=scaled, width=scaled)
        yield axis.row(scaled**2, infer(at))

    axis = Axis("inference by batch", "images", f"{network}, {square}, 100 detections an image")
    for batch_size in BATCHES:
        yield axis.row(batch_size, infer(dataclasses.replace(one, batch_size=batch_size)))

    axis = Axis("inference by detections", "detections", f"{network}, {square}, batch 1")
    for number in DETECTIONS:
        model = make_model(one, box_score_thresh=0.0, box_detections_per_img=number)
        yield axis.row(number, inference.time_of_ours(model, one))

    axis = Axis("training step by objects", "objects an image", f"{network}, {square}, batch 1")
    training = train.OurTraining(make_model(one), _batch(one, max(OBJECTS)))
    for number in OBJECTS:
        training.load(_batch(one, number))
        yield axis.row(number, _time_step(training, one))

    if jax.default_backend() == "cpu":
        yield from _devices(settings)
    yield from _datasets(settings)


def _devices(settings: Settings) -> Iterator[Row]:
    """Measure simulated devices, which share the cores: what dividing the work costs, with a network that is small."""
    options = shapes.get_config().model.to_dict() | dict(settings.options)
    side, batch_size = settings.height // 2, 2 * max(DEVICES)
    settings = dataclasses.replace(settings, height=side, width=side, batch_size=batch_size, options=options)
    at = f"the network of configs/shapes.py, batch {batch_size}, {side}x{side}, {train.ORDINARY} objects an image"
    axis = Axis("training step by simulated devices", "devices", at)
    # Set by the entry points for their own process only. Compiling takes most of the time here.
    environment = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    others = os.environ.get("XLA_FLAGS", "")
    for number in DEVICES:
        environment["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={number}".strip()
        seconds = run_child("scaling:time_train_step", settings, environment=environment)["seconds"]
        yield axis.row(number, Spread(*seconds))


def _datasets(settings: Settings) -> Iterator[Row]:
    """Measure what opening a dataset takes, once each."""
    at = f"{large_index.NUM_ANNOTATIONS / large_index.NUM_IMAGES:.1f} objects an image, measured once"
    start_up, memory = (Axis(f"{what} of opening a dataset", "images", at) for what in ("time", "peak memory"))
    for number in sorted({min(n, settings.num_images or n) for n in IMAGES}):
        with tempfile.TemporaryDirectory() as folder:
            run_child("scaling:write_dataset", settings, folder, number)
            opened = run_child("scaling:open_dataset", settings, folder)
        yield start_up.row(number, Spread.of([opened["seconds"]]))
        yield memory.row(number, Spread.of([opened["mb"]]), unit="mb")


def _batch(settings: Settings, num_objects: int) -> Batch:
    """Return a batch of images with so many objects each."""
    photos, rng = read_photos(settings, settings.batch_size), np.random.default_rng(settings.seed)
    return make_batch(photos, [random_objects(settings, num_objects, rng) for _ in photos])


def _time_step(training: train.OurTraining, settings: Settings) -> Spread:
    return measure({OURS: training.step}, settings.rounds)[OURS]


def time_train_step(settings: Settings) -> dict:
    """Time our training step on the devices of this process."""
    training = train.OurTraining(make_model(settings), _batch(settings, train.ORDINARY))
    return {"seconds": _time_step(training, settings)}


def write_dataset(settings: Settings, folder: str, num_images: str) -> dict:
    """Write a COCO-format dataset of so many empty images, with as many objects an image as COCO has."""
    share = int(num_images) / large_index.NUM_IMAGES
    large_index.NUM_ANNOTATIONS = round(large_index.NUM_ANNOTATIONS * share)
    large_index.NUM_IMAGES = int(num_images)
    large_index.write(Path(folder) / "dataset")
    return {}


def open_dataset(settings: Settings, folder: str) -> dict:
    """Open that dataset; returns the seconds, and the peak memory beyond that of the libraries."""
    before, start = peak_memory(), time.perf_counter()
    load_index(Path(folder) / "dataset", "train2017")
    return {"seconds": time.perf_counter() - start, "mb": peak_memory() - before}


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 260, 70, 30, 14, 44
STYLE = """
body { font: 14px sans-serif; margin: 24px; max-width: 1080px }
main { display: flex; flex-wrap: wrap; gap: 32px }
section { width: 480px }
h2 { font-size: 16px; margin: 0 }
p { margin: 4px 0 8px }
td, th { padding: 1px 16px 1px 0; text-align: right }
svg { font-size: 12px }
.grid { stroke: #ddd }
.tick { fill: #555 }
"""


def write_html(path: str | Path, rows: Sequence[Row], environment: Mapping) -> None:
    """Write one page with a plot and a table of every axis.

    Args:
      path: of the page, which needs no other file.
      rows: as run yields them.
      environment: as timing.environment returns it.
    """
    hardware, versions = environment["hardware"], environment["versions"]
    where = f"{hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, jax {versions['jax']}"
    about = f"{where}; commit {environment['commit']}, {environment['date']}. Median, and a bar between the quartiles."
    sections = []
    for axis in dict.fromkeys(row.settings["axis"] for row in rows):
        sections.append(_section([row for row in rows if row.settings["axis"] == axis]))
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>How cost grows</title><style>{STYLE}</style>
<h1>How cost grows</h1><p>{html.escape(about)}</p><p>Both scales start at zero: a straight line through the origin is
cost in proportion.</p>
<main>{"".join(sections)}</main></html>
"""
    Path(path).write_text(page, encoding="utf-8")


def _section(rows: Sequence[Row]) -> str:
    """Return the plot and the table of an axis."""
    said = rows[0].settings
    name, _, at = said["at"].partition(": ")
    cells = "".join(f"<tr><td>{row.settings['x']:,}</td><td>{cell(row.ours, row.unit)}</td></tr>" for row in rows)
    return f"""<section><h2>{html.escape(name)}</h2><p>{html.escape(at)}</p>{_plot(rows)}
<table><tr><th>{said["x_unit"]}</th><th>median (quartiles)</th></tr>{cells}</table></section>
"""


def _plot(rows: Sequence[Row]) -> str:
    """Draw the median of each row over its x, with a bar between the quartiles, as SVG."""
    unit = {"s": "seconds", "mb": "MB"}[rows[0].unit]
    x_ticks = _ticks(max(row.settings["x"] for row in rows))
    y_ticks = _ticks(max(row.ours.high for row in rows))

    def place(x, y):
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + x / x_ticks[-1] * width, HEIGHT - BOTTOM - y / y_ticks[-1] * height

    (left, bottom), (right, top) = place(0, 0), place(x_ticks[-1], y_ticks[-1])
    parts = []
    for y in y_ticks:
        height = place(0, y)[1]
        parts.append(f'<path class="grid" d="M{left} {height:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{height + 4:.1f}" text-anchor="end">{y:,.4g}</text>')
    for x in x_ticks:
        along = place(x, 0)[0]
        parts.append(f'<text class="tick" x="{along:.1f}" y="{bottom + 16}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#888"/>')
    points = [place(row.settings["x"], row.ours.median) for row in rows]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#3b6fb6"/>')
    for row, (x, y) in zip(rows, points, strict=True):
        low, high = (place(0, value)[1] for value in (row.ours.low, row.ours.high))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#3b6fb6"/>')
        parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="#000"/>')
    x, y, said = (left + right) / 2, (top + bottom) / 2, rows[0].settings
    parts.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{said["x_unit"]}</text>')
    parts.append(f'<text transform="translate(14 {y}) rotate(-90)" text-anchor="middle">{unit}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
    return f'<svg {size} role="img" aria-label="{said["axis"]}">{"".join(parts)}</svg>'


def _ticks(highest: float) -> list[float]:
    """Return up to six round numbers from zero to the first that is not below ``highest``."""
    power = 10 ** math.floor(math.log10(highest or 1))
    step = next(step for step in (0.2 * power, 0.5 * power, power, 2 * power) if highest <= 5 * step)
    return [i * step for i in range(max(1, math.ceil(highest / step)) + 1)]
