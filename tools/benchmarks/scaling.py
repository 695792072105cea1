"""How our cost grows with the image, the batch, objects, detections, devices and the dataset; a table and plots."""

import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from maskrcnn_jax import page
from maskrcnn_jax.config import load_config
from maskrcnn_jax.data.dataset import load_coco
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
    one, network = dataclasses.replace(settings, batch_size=1), settings.model_options.backbone
    square = f"{side}x{side}"
    infer = functools.partial(inference.time_of_ours, make_model(one, box_score_thresh=0.0))

    axis = Axis("inference by image area", "pixels", f"{network}, square images, batch 1, 100 detections")
    for scaled in (int(factor * side) for factor in SIDES):
        at = dataclasses.replace(one, height=scaled, width=scaled)
        yield axis.row(scaled**2, infer(at))

    axis = Axis("inference by batch", "images", f"{network}, {square}, 100 detections per image")
    for batch_size in BATCHES:
        yield axis.row(batch_size, infer(dataclasses.replace(one, batch_size=batch_size)))

    axis = Axis("inference by detections", "detections", f"{network}, {square}, batch 1")
    for number in DETECTIONS:
        model = make_model(one, box_score_thresh=0.0, box_detections_per_img=number)
        yield axis.row(number, inference.time_of_ours(model, one))

    axis = Axis("training step by objects", "objects per image", f"{network}, {square}, batch 1")
    training = train.OurTraining(make_model(one), _batch(one, max(OBJECTS)))
    for number in OBJECTS:
        training.load(_batch(one, number))
        yield axis.row(number, _time_step(training, one))

    if jax.default_backend() == "cpu":
        yield from _devices(settings)
    yield from _datasets(settings)


def _devices(settings: Settings) -> Iterator[Row]:
    """Measure simulated devices, which share the cores: what dividing the work costs, with a network that is small."""
    options = load_config("shapes").model.to_dict() | dict(settings.options)
    side, batch_size = settings.height // 2, 2 * max(DEVICES)
    settings = dataclasses.replace(settings, height=side, width=side, batch_size=batch_size, options=options)
    at = f"the network of configs/shapes.py, batch {batch_size}, {side}x{side}, {train.ORDINARY} objects per image"
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
    at = f"{large_index.NUM_ANNOTATIONS / large_index.NUM_IMAGES:.1f} objects per image, measured once"
    start_up, memory = (Axis(f"{what} of opening a dataset", "images", at) for what in ("time", "peak memory"))
    for number in sorted({min(n, settings.num_images or n) for n in IMAGES}):
        with tempfile.TemporaryDirectory() as folder:
            run_child("scaling:write_dataset", settings, folder, number)
            opened = run_child("scaling:open_dataset", settings, folder)
        yield start_up.row(number, Spread.of([opened["seconds"]]))
        yield memory.row(number, Spread.of([opened["mb"]]), unit="MB")


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
    """Write a COCO-format dataset of so many empty images, with as many objects per image as COCO has."""
    share = int(num_images) / large_index.NUM_IMAGES
    large_index.NUM_ANNOTATIONS = round(large_index.NUM_ANNOTATIONS * share)
    large_index.NUM_IMAGES = int(num_images)
    large_index.write(Path(folder) / "dataset")
    return {}


def open_dataset(settings: Settings, folder: str) -> dict:
    """Open that dataset; returns the seconds, and the peak memory beyond that of the libraries."""
    before, start = peak_memory(), time.perf_counter()
    load_coco(Path(folder) / "dataset", "train2017")
    return {"seconds": time.perf_counter() - start, "mb": peak_memory() - before}


def write_html(path: str | Path, rows: Sequence[Row], environment: Mapping) -> None:
    """Write one page with a plot and a table of every axis.

    Args:
        path: of the page, which needs no other file.
        rows: as run yields them.
        environment: as timing.environment returns it.
    """
    sections = {}
    for row in rows:
        sections.setdefault(row.settings["axis"], []).append(row)
    page.write_page(
        path,
        Path(__file__).with_suffix(".html.j2"),
        title="How cost grows",
        environment=environment,
        sections=[_section(of_axis) for of_axis in sections.values()],
    )


def _section(rows: Sequence[Row]) -> dict:
    """Return the name, the plot and the table of an axis."""
    settings, unit = rows[0].settings, {"s": "seconds"}.get(rows[0].unit, rows[0].unit)
    name, _, at = settings["at"].partition(": ")
    figure = Figure(figsize=(6, 3.2))
    axes = figure.subplots()
    medians = np.array([row.ours.median for row in rows])
    around = np.abs([[row.ours.low for row in rows] - medians, [row.ours.high for row in rows] - medians])
    axes.errorbar([row.settings["x"] for row in rows], medians, around, marker="o", ecolor="black")
    axes.set(xlabel=settings["x_unit"], ylabel=unit, xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    return {
        "name": name,
        "at": at,
        "unit": settings["x_unit"],
        "plot": page.svg(figure),
        "rows": [[f"{row.settings['x']:,}", cell(row.ours, row.unit)] for row in rows],
    }
