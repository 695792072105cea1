"""What a training compiles and keeps in memory, and when."""

import json

import cv2
import jax
import numpy as np
import pytest

from maskrcnn_jax.config import to_options
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.training.checkpoint import Checkpoints
from maskrcnn_jax.training.loop import train


def write_mixed_dataset(root, sizes, split):
    """Write images of noise of these (height, width), each with a brighter box that is its object."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    images, annotations = [], []
    for i, (height, width) in enumerate(sizes, start=1):
        image = rng.integers(0, 100, (height, width, 3), np.uint8)
        x, y = rng.integers(0, 16, 2).tolist()
        image[y : y + 24, x : x + 24] += 100
        cv2.imwrite(str(root / split / f"{i}.png"), image)
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        corners = [x, y, x + 24, y, x + 24, y + 24, x, y + 24]
        fields = {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 576, "bbox": [x, y, 24, 24]}
        annotations.append(fields | {"segmentation": [corners]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_nothing_is_compiled_or_kept_after_the_first_epoch_with_its_evaluation(config, tmp_path, monkeypatch):
    landscape, portrait = (64, 96), (96, 64)
    write_mixed_dataset(tmp_path / "data", [landscape] * 11 + [portrait] * 6, "train2017")
    write_mixed_dataset(tmp_path / "data", [landscape] * 3 + [portrait] * 2, "val2017")  # batches of 2, 1 and 2
    config.data.coco_dir, config.data.long_side = str(tmp_path / "data"), 96
    config.epochs, config.log_every, config.checkpoint_every = 3, 1, 2
    config.optim.ema_decay = 0.9
    compiled, saved = [], []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def add_metrics(self, step, metrics):
        real(self, step, metrics)
        saved.append((step, len(compiled), sum(array.nbytes for array in jax.live_arrays())))

    real = Checkpoints.add_metrics
    monkeypatch.setattr(Checkpoints, "add_metrics", add_metrics)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        options = to_options(config)
        train(options, tmp_path / "run", make_evaluate=lambda categories: Evaluator(options, categories))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    steps, counts, kept = zip(*saved, strict=True)
    assert steps == (3, 6, 9)
    assert counts[0] > 4, "two sizes are trained on and detected on"
    assert counts == (counts[0],) * 3
    assert max(kept) < 1.05 * kept[0], "arrays of an epoch or an evaluation are still there"
