"""Exported models, run by tools/run_exported.py in a process that cannot import this package."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.exporting.description import check_sizes
from maskrcnn_jax.exporting.stablehlo import dequantize, export_model, quantize, quantized_network
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import DataOptions, Options
from tests.models.tiny import tiny_model, tiny_options
from tools.run_exported import ExportedModel

ROOT = Path(__file__).parents[2]
CATEGORIES = Categories.create([900, 7, 12, 13], ["heart", "circle", "star", "ring"])
# Runs an export on images one by one and together and writes down what it finds.
SCRIPT = """
import sys
sys.modules["maskrcnn_jax"] = None  # importing it fails
sys.path.insert(0, ".")
import numpy as np
from run_exported import ExportedModel, open_stablehlo
images = list(np.load("images.npz").values())
for name, together in (("alone", False), ("together", True)):
    model = ExportedModel("model.mrcnn")
    model._run = open_stablehlo("model.mrcnn", together)[1]
    found = model.detect(images, min_score=0)
    for image, result in zip(images, found):
        pasted = [model.paste(mask, box, image.shape[:2]) for mask, box in zip(result["masks"], result["boxes"])]
        result["pasted"] = np.array(pasted).reshape(-1, *image.shape[:2])
    np.savez(f"{name}.npz", **{f"{i}_{key}": value for i, r in enumerate(found) for key, value in r.items()})
"""


@pytest.fixture
def predictor():
    # Nothing is found in an image of fewer rows than box_min_size.
    model = tiny_model(box_min_size=8.0)
    return Predictor(model, CATEGORIES, Options(model=model.options, data=DataOptions(short_side=64, long_side=64)))


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((90, 100), (64, 64), (4, 64), (200, 150))]


@pytest.mark.slow
def test_an_export_finds_what_the_model_finds_without_the_package(predictor, images, tmp_path):
    export_model(predictor, tmp_path / "model.mrcnn")
    np.savez(tmp_path / "images.npz", *images)
    shutil.copy(ROOT / "tools" / "run_exported.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = predictor.predict(images, min_score=0)
    counts = [len(found) for found in expected]
    assert min(counts) == counts[2] == 0 and sorted(counts)[1] > 1
    for name in ("alone", "together"):
        file = np.load(tmp_path / f"{name}.npz")
        for i, theirs in enumerate(expected):
            np.testing.assert_array_equal(file[f"{i}_labels"], theirs.labels)
            np.testing.assert_allclose(file[f"{i}_boxes"], theirs.boxes, atol=0.01)
            np.testing.assert_allclose(file[f"{i}_scores"], theirs.scores, atol=1e-5)
            assert np.count_nonzero(file[f"{i}_pasted"] != theirs.masks) <= 1e-3 * theirs.masks.size
    about = json.loads(np.load(tmp_path / "model.mrcnn")["model.json"])
    assert about["categories"] == [
        {"label": 1, "id": 7, "name": "circle"},
        {"label": 2, "id": 12, "name": "star"},
        {"label": 3, "id": 13, "name": "ring"},
        {"label": 4, "id": 900, "name": "heart"},
    ]
    assert about["platforms"] == ["cpu", "cuda", "rocm", "tpu"]


@pytest.mark.slow
def test_eight_bits_take_less_space_and_find_what_the_rounded_network_finds(predictor, images, tmp_path):
    export_model(predictor, tmp_path / "model.mrcnn", int8=True)
    with np.load(tmp_path / "model.mrcnn") as file:
        arrays = [file[name] for name in file.files if name.startswith("weights/")]
    kept = jax.tree.leaves(predictor.network)
    assert sum(array.nbytes for array in arrays) < 0.4 * sum(np.asarray(leaf).nbytes for leaf in kept if leaf.ndim)
    found = ExportedModel(tmp_path / "model.mrcnn").detect(images[:1], min_score=0)[0]
    rounded = Predictor(quantized_network(predictor.network), CATEGORIES, predictor.options)
    theirs = rounded.predict(images[0], min_score=0)
    np.testing.assert_array_equal(found["labels"], theirs.labels)
    np.testing.assert_allclose(found["boxes"], theirs.boxes, atol=0.01)


def test_eight_bits_keep_each_channel_to_half_a_level():
    weights = np.random.default_rng(0).normal(size=(3, 3, 32, 8)) * 10.0 ** np.arange(-4, 4)
    weights = weights.astype(np.float32)
    weights[..., 3] = 0
    rounded = quantize(weights)
    assert rounded.values.dtype == np.int8
    levels = np.abs(weights).max(axis=(0, 1, 2), keepdims=True) / 127
    assert (np.abs(dequantize(rounded) - weights) <= levels * 0.5001).all()
    bias = np.ones(5000, np.float32)
    assert quantize(bias) is bias


def test_sizes_are_sorted_and_unique():
    sizes = [(1344, 1344), (800, 1088), (1344, 1344), [1088, 800]]
    assert check_sizes(sizes) == [(800, 1088), (1088, 800), (1344, 1344)]


@pytest.mark.parametrize(
    ("sizes", "buckets", "said"),
    [((), "exact", "give the sizes to export"), ([(64, 65)], "auto", "padded to 64x65 do not fit")],
)
def test_sizes_that_cannot_be_are_refused(predictor, tmp_path, sizes, buckets, said):
    data = dataclasses.replace(predictor.options.data, buckets=buckets)
    predictor = Predictor(predictor.network, CATEGORIES, dataclasses.replace(predictor.options, data=data))
    with pytest.raises(UserError, match=said):
        export_model(predictor, tmp_path / "model.mrcnn", sizes=sizes)
    assert not list(tmp_path.iterdir())


def test_images_that_fit_no_exported_size_are_refused(predictor, tmp_path):
    model = ExportedModel.__new__(ExportedModel)
    model.about = {"short_side": 64, "long_side": 128, "sizes": [[64, 64]], "resize": "uint8", "dtype": "uint8"}
    model.about["channels"] = 3
    with pytest.raises(ValueError, match="64x128 after resizing fits none"):
        model._prepare(np.zeros((100, 200, 3), np.uint8))


@pytest.mark.slow
def test_other_networks_can_be_traced_for_any_number_of_images(predictor, tmp_path):
    model = tiny_options(backbone="mobilenet_v3_large", roi_operator="pool", mask_deconv=False)
    options = dataclasses.replace(predictor.options, model=model)
    network = MaskRCNN(5, model, rngs=nnx.Rngs(0))
    export_model(Predictor(network, CATEGORIES, options), tmp_path / "model.mrcnn")
    assert "64x64.stablehlo" in np.load(tmp_path / "model.mrcnn").files
