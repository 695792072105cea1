"""Pictures of an evaluation."""

import json
import tracemalloc

import cv2
import numpy as np

from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.options import DataOptions, Options


def test_drawing_objects_that_span_a_large_image_decodes_one_mask_at_a_time(tmp_path):
    """The boxes of 80 threads that cross a megapixel hold 80 MB."""
    side, annotations = 1000, []
    for i in range(1, 81):
        thread = [i, 0, i + 6, 0, 900 + i, 990, 894 + i, 990]
        box = {"bbox": [i, 0, 900, 990], "segmentation": [thread], "area": 5940}
        annotations.append({"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0} | box)
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": side, "width": side}],
        "categories": [{"id": 1, "name": "thread"}],
        "annotations": annotations,
    }
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    cv2.imwrite(str(tmp_path / "val/1.jpg"), np.full((side, side, 3), 128, np.uint8))
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content))
    options = Options(data=DataOptions(coco_dir=str(tmp_path), eval_split="val"))
    evaluator = Evaluator(options, load_coco(tmp_path, "val").categories)
    tracemalloc.start()
    picture = evaluator.draw_image(1, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert picture is not None
    assert peak < 50e6, f"{peak / 1e6:.0f} MB"
