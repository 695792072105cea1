"""The command export: which file it writes, and what it refuses before any work."""

import pytest

from maskrcnn_jax.commands import export
from maskrcnn_jax.commands.app import parse
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.options import Options
from tests.models.tiny import tiny_model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--output=x.onnx", "--format=stablehlo"],
            "contradicts --output=x.onnx; .* end in .mrcnn",
        ),
        (["--output=x.mrcnn", "--format=onnx"], "contradicts --output=x.mrcnn; .* end in .onnx"),
        (["--output=x.pb"], "--output=x.pb ends in .pb; use .onnx for ONNX or .mrcnn for StableHLO"),
        (["--output=x.pth"], "--output=x.pth is for torchvision; maskrcnn-jax export-torchvision writes .pth"),
        (["--output=x"], "--output=x ends in nothing; use .onnx"),
        (["--output=x.onnx", "--int8"], "measures the ranges of activations on images; give a dataset, --coco_dir"),
        (["--output=x.onnx", "--coco_dir=data"], "give one of them, or use eval"),
        (["--output=x.onnx", "--split=val"], "choose images of a dataset; give it as --coco_dir"),
        (["--output=x.onnx", "--limit=3"], "choose images of a dataset; give it as --coco_dir"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        export.main(parse(export, ["--workdir=absent", *arguments]))
    assert not list(tmp_path.iterdir())


def test_eight_bits_that_cannot_be_measured_leave_no_file(tmp_path):
    model = tiny_model()
    categories = Categories.create([1, 2, 3, 4], ["cup", "dog", "person", "tree"])
    predictor = Predictor(model, categories, Options(model=model.options))
    arguments = ["--workdir=run", f"--output={tmp_path / 'x.onnx'}", "--int8", f"--coco_dir={tmp_path / 'absent'}"]
    with pytest.raises(UserError, match="absent is not a folder"):
        export._export_onnx(predictor, parse(export, arguments))
    assert not list(tmp_path.iterdir())
