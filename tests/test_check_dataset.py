"""The checker on damaged datasets: what it finds, what training does with them, and what the mended file is worth."""

import json
import shutil

import numpy as np
import pytest

from configs import shapes
from maskrcnn_jax.data.check import check_index, stop_or_warn
from maskrcnn_jax.data.check_dataset import Options, check_split, compare_splits
from maskrcnn_jax.data.coco import load_index, locate
from maskrcnn_jax.data.loader import make_loader
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.training.data_check import anchors_of
from tests.dataset_faults import FAULTS, boxes_as_corners, damage
from tools.checking.mend import mend

ANCHORS = anchors_of(shapes.get_config())
OPTIONS = Options(anchors=ANCHORS, threads=1)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "shapes"
    write_dataset(root, num_train=40, num_val=6, image_size=96, seed=2)
    return root


@pytest.fixture
def root(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "shapes")


def check(root):
    splits = [
        check_split(name, *locate(root, name), OPTIONS, evaluated=evaluated)
        for name, evaluated in (("train2017", False), ("val2017", True))
    ]
    return compare_splits(*splits)


def train_on_data(root):
    """Does with the data what a training of an epoch does with it."""
    index = load_index(root, "train2017")
    stop_or_warn(check_index(index, ANCHORS), "train2017")
    load_index(root, "val2017").categories.check_known(index.categories, "val2017")
    loader = make_loader(
        index, batch_size=4, short_side=96, long_side=96, mask_side=96, shuffle=True, annotations=True, threads=1
    )
    for batch in loader:
        assert batch.valid.all()
        boxes = batch.gt.boxes[batch.gt.valid]
        assert np.isfinite(boxes).all()
        assert ((boxes >= 0) & (boxes <= 96)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (batch.gt.labels[batch.gt.valid] >= 1).all()
        assert np.unpackbits(batch.gt.masks).max(initial=0) <= 1


def test_a_clean_dataset_gives_no_finding(clean):
    assert [f.sentence for split in check(clean) for f in split.findings] == []
    train_on_data(clean)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_and_named_and_training_works_or_says_the_same(root, fault, tmp_path):
    name = damage(root, fault)
    splits = check(root)
    findings = [finding for split in splits for finding in split.findings]
    (found,) = [finding for finding in findings if finding.kind == FAULTS[fault]]
    assert name in " ".join([found.sentence, *found.examples])
    try:
        train_on_data(root)
    except UserError as e:
        sentences = [
            text for finding in findings for text in (finding.sentence, *finding.examples) if finding.is_error
        ]
        assert str(e) in sentences
    if splits[0].num_errors:
        mended = tmp_path / "mended.json"
        assert mend(splits[0], mended)
        mended.replace(splits[0].json_path)
        again = check(root)[0]
        assert [finding.sentence for finding in again.findings if finding.is_error] == []
        if again.num_errors == 0 and splits[1].num_errors == 0:
            train_on_data(root)


def test_mending_changes_what_was_found_and_nothing_else(root, tmp_path):
    damage(root, boxes_as_corners)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][3] |= {"note": {"by": "somebody"}, "bbox": content["annotations"][3]["bbox"]}
    content["images"][0]["flickr_url"] = "http://example.org/ü"
    content["something"] = [1, {"deep": None}]
    path.write_text(json.dumps(content))
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    done = mend(check(root)[0], tmp_path / "mended.json")
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    assert list(done) == ["boxes turned from corners into x, y, width, height"]
    mended = json.loads((tmp_path / "mended.json").read_text())
    for annotation in content["annotations"]:
        x1, y1, x2, y2 = annotation["bbox"]
        annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    assert mended == content
    assert list(mended) == list(content)
