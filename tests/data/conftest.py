"""Small datasets on disk for the tests of data/."""

import json

import cv2
import numpy as np
import pytest
from absl import flags


@pytest.fixture(autouse=True, scope="session")
def _parsed_flags():
    """Loading processes of grain read its flags, which a program parses in app.run."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class DatasetWriter:
    """Writes a dataset in COCO's layout, with a JPEG of noise for every image unless told otherwise."""

    def __init__(self, root):
        self.root = root
        self.json_path = root / "annotations" / "instances_train2017.json"

    def image_path(self, name):
        return self.root / "train2017" / name

    def write(self, sizes, annotations=(), names=((1, "cat"), (2, "dog")), **sections):
        """Writes images with ids 1.. of the (height, width) given.

        ``names`` are pairs (category id, name); ``sections`` replace parts of the JSON.
        """
        rng = np.random.default_rng(0)
        self.json_path.parent.mkdir(parents=True, exist_ok=True)
        self.image_path("").mkdir(exist_ok=True)
        images = []
        for i, (height, width) in enumerate(sizes, start=1):
            image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 2)
            cv2.imwrite(str(self.image_path(f"{i}.jpg")), image)
            images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
        content = {
            "info": {},
            "images": images,
            "annotations": list(annotations),
            "categories": [{"id": i, "name": name} for i, name in names],
        }
        self.json_path.write_text(json.dumps(content | sections))
        return self.root


@pytest.fixture
def dataset(tmp_path):
    return DatasetWriter(tmp_path / "dataset")
