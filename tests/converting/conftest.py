"""Datasets of three classes that the tests write in other layouts: shapes, and photographs where there are some."""

import pytest

from maskrcnn_jax.data.shapes import write_dataset
from tests.converting.layout_writers import SPLITS, Part, choose

CLASSES = {"shapes": ("circle", "heart", "ring"), "photographs": ("person", "dog", "car")}


@pytest.fixture(scope="session")
def shapes_parts(tmp_path_factory):
    """Two splits of shapes, ids 7, 12 and 900."""
    root = tmp_path_factory.mktemp("originals") / "shapes"
    ids = dict(zip(CLASSES["shapes"], (7, 12, 900), strict=True))
    write_dataset(root, num_train=12, num_val=5, image_size=96, categories=ids, splits=SPLITS, seed=3)
    parts = {split: Part(choose(root, split, CLASSES["shapes"], 12), root / split) for split in SPLITS}
    for split, part in parts.items():  # VOC has the images of all splits in one folder
        for image in part.content["images"]:
            name = f"{split}_{image['file_name']}"
            (part.folder / image["file_name"]).rename(part.folder / name)
            image["file_name"] = name
    return parts


@pytest.fixture(scope="session", params=CLASSES)
def parts(request):
    """Each of the datasets in turn, by split."""
    if request.param == "shapes":
        return request.getfixturevalue("shapes_parts")
    coco_dir = request.getfixturevalue("coco_dir")
    names = CLASSES["photographs"]
    return {split: Part(choose(coco_dir, f"{split}2017", names, 6), coco_dir / f"{split}2017") for split in SPLITS}
