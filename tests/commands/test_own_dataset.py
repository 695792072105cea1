"""The walk of docs/own_dataset.md, its commands as they stand there, in a copy of the checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

import maskrcnn_jax as mr
from maskrcnn_jax.config import to_options
from maskrcnn_jax.models.unfilled import make_unfilled
from maskrcnn_jax.weights.convert import load_weights
from tests.documents import ROOT, blocks, commands

PARTS = ("maskrcnn_jax", "configs", "tools", "train.py", "eval.py", "predict.py")


@pytest.mark.slow
def test_every_command_of_the_walk_works(optimized, tmp_path):
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, tmp_path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = tmp_path / "bin" / "maskrcnn-jax"  # as pip would install it
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m maskrcnn_jax.commands.main "$@"\n')
    command.chmod(0o755)
    environment["PATH"] = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), environment["PATH"]])
    programs = {"bash": ["bash", "-e", "-c"], "python": ["python", "-c"]}
    outputs = []
    for language, text in blocks("own_dataset.md"):
        if language not in programs:
            continue
        done = subprocess.run(
            [*programs[language], text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{text}\n{done.stderr[-3000:]}"
        outputs.append(done.stdout)
    assert len(outputs) > 4, "the blocks were not found"

    run = tmp_path / "runs" / "own"
    assert json.loads((run / "config.json").read_text())["epochs"] > 12
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bbox_AP50"] > 0.3 and metrics["segm_AP50"] > 0.25, "a new user would see nothing"
    assert f"box AP {metrics['bbox_AP']:.3f}" in "".join(outputs)
    assert (run / "predictions.jpg").stat().st_size > 10_000
    report = (run / "report.html").read_text()
    assert "Precision and recall at a score" in report and "data:image/" in report
    pictures = run / "pictures"
    found = json.loads((pictures / "detections.json").read_text())
    assert found and {result["category_id"] for result in found} <= {7, 12, 900}
    assert cv2.imread(str(pictures / "000000000001.jpg")).shape == (512, 512, 3)
    python, exported = outputs[-2:]
    assert f"({len(found)}, 128, 128)" in python and "'image_id': 1" in python
    objects = json.loads(exported.splitlines()[-1])["objects"]
    assert [one["category_id"] for one in objects] == [result["category_id"] for result in found]


@pytest.mark.parametrize(
    ("which", "name"), [("full", "maskrcnn_resnet50_fpn_v2"), ("laptop", "maskrcnn_resnet50_fpn")]
)
def test_the_published_weights_that_a_start_is_meant_for_fit(which, name):
    """Without the weights themselves: torchvision's network of this name has the arrays that they have."""
    pytest.importorskip("torch")
    from tools.torchvision_reference import import_torchvision

    start = {f"--config=own_dataset{'' if which == 'full' else ':laptop'}", f"--weights=torchvision:{name}"}
    assert any(start <= set(words) for words in commands(ROOT / "docs" / "own_dataset.md"))
    network = getattr(import_torchvision().models.detection, name)(weights=None, weights_backbone=None)
    arrays = {key: array.numpy() for key, array in network.state_dict().items()}
    options = to_options(mr.load_config(f"own_dataset:{which}")).model
    model = make_unfilled(len(arrays["roi_heads.box_predictor.cls_score.bias"]), options)
    load_weights(model, arrays, source=name)
