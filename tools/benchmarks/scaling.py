"""How our cost grows with the image, the batch, objects, detections, devices and the dataset; a table and plots."""

import dataclasses
import html
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from maskrcnn_jax.data.coco import load_index
from tests.data import large_index
from tools.benchmarks import inference, train
from tools.benchmarks.child import peak_memory, run_child
from tools.benchmarks.inputs import Settings, default_dtype, make_batch, make_model, random_objects, read_photos
from tools.benchmarks.timing import OURS, Row, Spread, measure

SIDES = (256, 384, 512, 768, 1024)
BATCHES = (1, 2, 4, 8)
OBJECTS = (1, 8, 32, 96)
DETECTIONS = (5, 25, 100, 200)
DEVICES = (1, 2, 4, 8)
IMAGES = (10_000, 40_000, 118_287)


def run(settings: Settings) -> list[Row]:
    """Measure every axis, the others kept at 512x512, batch 1, 7 objects and 100 detections."""
    side = settings.height or 512
    settings = settings.having(height=side, width=side, rounds=3, dtype=default_dtype())
    one = settings.having(batch_size=1)
    rows = []
    for scaled in (s * side // 512 for s in SIDES):
        at = dataclasses.replace(one, height=scaled, width=scaled)
        rows.append(_row("inference by image area, pixels", scaled**2, inference.time_of_ours(at).ours))
    for batch_size in BATCHES:
        at = dataclasses.replace(settings, batch_size=batch_size)
        rows.append(_row("inference by batch", batch_size, inference.time_of_ours(at).ours))
    for number in DETECTIONS:
        time = inference.time_of_ours(one, box_detections_per_img=number).ours
        rows.append(_row("inference by detections", number, time))
    rows += [_row("training step by objects an image", n, _train_step(one, n)) for n in OBJECTS]
    for number in DEVICES if jax.default_backend() == "cpu" else ():
        at = dataclasses.replace(settings, batch_size=max(DEVICES))
        others = os.environ.get("XLA_FLAGS", "")
        flags = {"XLA_FLAGS": f"{others} --xla_force_host_platform_device_count={number}".strip()}
        seconds = run_child("scaling:time_train_step", at, environment=flags)["seconds"]
        rows.append(_row(f"training step of {max(DEVICES)} images by simulated devices", number, Spread(*seconds)))
    for number in sorted({min(n, settings.num_images or n) for n in IMAGES}):
        with tempfile.TemporaryDirectory() as folder:
            run_child("scaling:write_dataset", settings, folder, number)
            opened = run_child("scaling:open_dataset", settings, folder)
        rows.append(_row("opening a dataset by images", number, Spread.of([opened["seconds"]])))
        rows.append(_row("memory of a dataset by images", number, Spread.of([opened["mb"]]), unit="mb"))
    return rows


def _row(axis: str, x: int, value: Spread, unit: str = "s") -> Row:
    return Row(f"{axis}: {x}", value, unit=unit, settings={"axis": axis, "x": x})


def _train_step(settings: Settings, num_objects: int) -> Spread:
    photos, rng = read_photos(settings, settings.batch_size), np.random.default_rng(settings.seed)
    batch = make_batch(photos, [random_objects(settings, num_objects, rng) for _ in photos])
    return measure({OURS: train.OurTraining(make_model(settings), batch).step}, settings.rounds)[OURS]


def time_train_step(settings: Settings) -> dict:
    """Time our training step on the devices of this process."""
    return {"seconds": _train_step(settings, train.ORDINARY)}


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


WIDTH, HEIGHT, LEFT, BOTTOM = 460, 240, 60, 40


def write_html(path: str | Path, rows: Sequence[Row]) -> None:
    """Write one page with a plot of every axis; both scales start at zero, so that a straight line is linear cost."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>How cost grows</title><h1>How cost grows</h1>"]
    for axis in dict.fromkeys(row.settings["axis"] for row in rows):
        parts.append(_plot(axis, [row for row in rows if row.settings["axis"] == axis]))
    Path(path).write_text("\n".join([*parts, "</html>\n"]), encoding="utf-8")


def _plot(axis: str, rows: Sequence[Row]) -> str:
    """Draw the median of each row over its x, with a bar between the quartiles, as SVG."""
    right, top = max(row.settings["x"] for row in rows), max(row.ours.high for row in rows) or 1.0

    def place(x, y):
        return LEFT + x / right * (WIDTH - LEFT - 20), HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - 20)

    points, marks = [], []
    for row in rows:
        x, y = place(row.settings["x"], row.ours.median)
        low, high = (place(0, value)[1] for value in (row.ours.low, row.ours.high))
        points.append(f"{x:.1f},{y:.1f}")
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="#000"/>'
        )
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{row.settings["x"]}</text>')
    (x0, y0), (x1, y1), name = place(0, 0), place(right, top), html.escape(axis)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="11" font-family="sans-serif" role="img" '
        f'aria-label="{name}"><path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#888"/>'
        f'<text x="{LEFT - 6}" y="{y1 + 4:.1f}" text-anchor="end">{top:.3g} {rows[0].unit}</text>'
        f'<text x="{LEFT - 6}" y="{y0 + 4:.1f}" text-anchor="end">0</text>'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="#3b6fb6"/>{"".join(marks)}'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{name}</text></svg>'
    )
