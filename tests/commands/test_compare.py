"""Runs to compare with: ``eval --compare``."""

import json

import pytest

from maskrcnn_jax.commands.eval import read_run
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import load_annotations


@pytest.fixture
def truth(tmp_path):
    write_dataset(tmp_path / "data", num_train=1, num_val=2, image_size=64, seed=0)
    return load_annotations(tmp_path / "data" / "annotations" / "instances_val2017.json")


@pytest.fixture
def run(tmp_path, truth):
    """A folder with the detections of another run."""
    (tmp_path / "other").mkdir()
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        | {"segmentation": {"size": [64, 64], "counts": truth.annToRLE(a)["counts"].decode()}}
        for a in truth.anns.values()
    ]
    (tmp_path / "other" / "detections.json").write_text(json.dumps(results))
    return tmp_path / "other"


def test_a_run_on_the_same_images_and_classes_is_read(truth, run):
    categories = Categories.create(list(truth.cats), [category["name"] for category in truth.cats.values()])
    categories.save(run / "categories.json")
    assert read_run(str(run), truth, 100).metrics["bbox_AP"] == pytest.approx(1)
    assert read_run(str(run / "detections.json"), truth, 100).name == str(run)


def test_a_run_with_other_classes_under_the_same_ids_is_refused(truth, run):
    Categories.create(list(truth.cats), [f"other{i}" for i in truth.cats]).save(run / "categories.json")
    with pytest.raises(UserError, match="trained on other classes: category 1 is 'other1' there and 'circle' here"):
        read_run(str(run), truth, 100)


def test_a_run_on_other_images_is_refused(truth, run):
    del truth.imgs[next(iter(truth.imgs))]
    with pytest.raises(UserError, match="of an image which the annotations do not have.*same images"):
        read_run(str(run), truth, 100)
