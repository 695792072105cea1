"""Whatever lies in a file of results or in the folder of a run: it is read, or refused in a sentence."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.evaluation.coco_metrics import evaluate
from maskrcnn_jax.evaluation.detections_file import read_results
from maskrcnn_jax.options import Options
from maskrcnn_jax.run_folder import load_options, save_options
from tests.hostile import change_document, changes, damage_bytes, damages, hostile

_HELD = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
_FOLDER = Path(_HELD.name)
_RLE = coco_mask.encode(np.asfortranarray(np.eye(20, 24, dtype=np.uint8)))["counts"].decode()
_MASK = {"size": [20, 24], "counts": _RLE}
_TRUTH = {
    "info": {},
    "images": [{"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 24} for i in (1, 2)],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [0, 0, 20, 20], "segmentation": _MASK, "area": 20},
    ],
}
_RESULTS = [
    {"image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9.5], "score": 0.5, "segmentation": _MASK} for i in (1, 2)
]
_CONFIG = json.dumps(dataclasses.asdict(Options()))
_CATEGORIES = {"num_classes": 3, "categories": [{"id": i, "name": "cat", "label": i} for i in (1, 2)]}


def _write(name, document, changes, damages):
    path = _FOLDER / name
    document = change_document(json.loads(json.dumps([document])), changes)
    path.write_bytes(damage_bytes(json.dumps(document)[1:-1].encode(), damages))
    return path


_rarely = st.one_of(st.just([]), st.just([]), damages)


@pytest.mark.slow
@hostile("results", of_truth=changes, of_results=changes, damages=_rarely, which=st.integers(0, 2))
def test_hostile_results_and_annotations_are_evaluated_or_refused(of_truth, of_results, damages, which):
    truth = _write("truth.json", _TRUTH, of_truth if which else [], damages if which else [])
    images, categories = {image["id"]: image for image in _TRUTH["images"]}, {1}
    results = _RESULTS
    if which < 2:
        results = read_results(_write("results.json", _RESULTS, of_results, damages), images, categories)
    evaluate(truth, results)


@hostile("files of a run", of_config=changes, of_categories=changes, damages=_rarely)
def test_hostile_files_of_a_run_are_read_or_refused(of_config, of_categories, damages):
    _write("config.json", json.loads(_CONFIG), of_config, damages)
    try:
        save_options(load_options(_FOLDER), _FOLDER)
    finally:
        categories = Categories.load(_write("categories.json", _CATEGORIES, of_categories, damages))
        assert categories.num_classes > max(categories.labels)
