"""COCO's evaluation: ours beside pycocotools on the same results, and the host's part of detecting."""

import contextlib
import io
import os

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import STATISTICS, evaluate
from maskrcnn_jax.inference.detect import run_detection
from maskrcnn_jax.inference.paste import encode_rle
from maskrcnn_jax.structures import Batch, Detections
from tools.benchmarks.inputs import Settings
from tools.benchmarks.ops import random_boxes, random_masks
from tools.benchmarks.timing import OURS, Row, compare, measure

SIZE, CATEGORIES, OBJECTS, DETECTIONS = (480, 640), 80, 7, 100
BATCH = 8


def run(settings: Settings) -> list[Row]:
    """Measure on synthetic results of as many images as wanted, a hundred detections each."""
    settings = settings.having(num_images=200, rounds=3)
    rng = np.random.default_rng(settings.seed)
    dataset, results = make_results(rng, settings.num_images)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
    contenders = {"pycocotools": lambda: _statistics(dataset, results)}
    wanted = contenders["pycocotools"]()
    _check("evaluate()", _of(evaluate(coco, results)), wanted)
    said = {"images": settings.num_images, "detections": len(results)}
    name = f"COCO box and mask AP, {settings.num_images} images"
    return [
        compare(name, lambda: evaluate(coco, results), contenders, settings.rounds, **said),
        *(_host_part(settings, rng, workers) for workers in (0, os.cpu_count())),
    ]


def make_results(rng: np.random.Generator, num_images: int) -> tuple[dict, list[dict]]:
    """Return a COCO dataset of ellipses, and results: each object found a little displaced, and much else."""
    annotations, results = [], []
    for image in range(1, num_images + 1):
        truth = random_boxes(rng, SIZE, OBJECTS)
        labels = rng.integers(1, CATEGORIES + 1, OBJECTS)
        for box, label in zip(truth, labels, strict=True):
            fields = {"image_id": image, "category_id": int(label), "iscrowd": 0, **_region(box)}
            fields["area"] = float(coco_mask.area(fields["segmentation"]))
            annotations.append(fields | {"id": len(annotations) + 1})
        which = rng.integers(OBJECTS, size=DETECTIONS)
        moved = truth[which] + rng.normal(scale=8, size=(DETECTIONS, 4)).astype(np.float32)
        guessed = np.where(rng.random(DETECTIONS) < 0.6, labels[which], rng.integers(1, CATEGORIES + 1, DETECTIONS))
        for box, label, score in zip(moved, guessed, rng.random(DETECTIONS), strict=True):
            results.append({"image_id": image, "category_id": int(label), "score": float(score), **_region(box)})
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(1, num_images + 1)]
    categories = [{"id": i, "name": str(i)} for i in range(1, CATEGORIES + 1)]
    return {"images": images, "categories": categories, "annotations": annotations, "info": {}}, results


def _region(box: np.ndarray) -> dict:
    """Return the bbox and the run lengths of the ellipse in a box [4], cut off at the image."""
    x1, y1 = np.clip(box[:2], 0, np.array(SIZE[::-1]) - 3).astype(int)
    x2, y2 = np.clip(box[2:].astype(int), (x1 + 2, y1 + 2), SIZE[::-1])
    y, x = np.ogrid[-1 : 1 : (y2 - y1) * 1j, -1 : 1 : (x2 - x1) * 1j]
    bbox = [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]
    return {"bbox": bbox, "segmentation": encode_rle((x**2 + y**2 <= 1.1).astype(np.uint8), int(y1), int(x1), SIZE)}


def _statistics(dataset: dict, results: list[dict]) -> list[float]:
    """Return COCO's twelve numbers for boxes, then for masks, by pycocotools."""
    numbers = []
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
        detected = coco.loadRes([dict(result) for result in results])
        for kind in ("bbox", "segm"):
            evaluation = COCOeval(coco, detected, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers += [float(value) for value in evaluation.stats]
    return numbers


def _of(metrics: dict) -> list[float]:
    return [metrics[f"{kind}_{name}"] for kind in ("bbox", "segm") for name in STATISTICS]


def _check(name: str, numbers: list[float], wanted: list[float]) -> None:
    if not np.allclose(numbers, wanted, rtol=0, atol=1e-12):
        raise UserError(f"{name} gives other numbers than pycocotools: {numbers} and {wanted}")


def _host_part(settings: Settings, rng: np.random.Generator, workers: int) -> Row:
    """Time what the host does with detections that are there: scaling boxes, pasting, encoding."""
    boxes, masks = random_boxes(rng, SIZE, BATCH, DETECTIONS), random_masks(rng, BATCH * DETECTIONS)
    found = Detections(
        boxes,
        np.ones((BATCH, DETECTIONS), np.float32),
        np.ones((BATCH, DETECTIONS), np.int32),
        masks.reshape(BATCH, DETECTIONS, *masks.shape[1:]),
        np.ones((BATCH, DETECTIONS), bool),
    )
    sizes, number = np.full((BATCH, 2), SIZE, np.int32), -(-settings.num_images // BATCH) * BATCH
    images = np.zeros((BATCH, 1, 1, 3), np.uint8)

    def batches():
        for start in range(0, number, BATCH):
            rows = np.arange(start, start + BATCH, dtype=np.int32)
            yield Batch(images, sizes, sizes, rows, np.ones(BATCH, bool), None)

    def call():
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            ids = np.arange(number)
            options = {"image_ids": ids, "category_ids": {1: 1}, "num_images": number, "workers": workers}
            return run_detection(lambda images, sizes: found, batches(), **options)

    time = measure({OURS: call}, settings.rounds)[OURS]
    where = f"{workers} processes" if workers else "one process"
    name = f"host part of detecting, {number} images of {DETECTIONS} detections, {where}"
    return Row(name, time, settings={"images_per_s": number / time.median, "rounds": settings.rounds})
