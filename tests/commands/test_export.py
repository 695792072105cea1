"""The command export: which file it writes, and what it refuses before any work."""

import pytest

from maskrcnn_jax.commands import export
from maskrcnn_jax.commands.app import parse
from maskrcnn_jax.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--output=x.onnx", "--format=stablehlo"],
            "contradicts --output=x.onnx; .* end in .mrcnn",
        ),
        (["--output=x.mrcnn", "--format=onnx"], "contradicts --output=x.mrcnn; .* end in .onnx"),
        (["--output=x.pb"], "--output=x.pb ends in .pb; use .onnx for ONNX or .mrcnn for StableHLO"),
        (["--output=x.pth"], "--output=x.pth is for torchvision; maskrcnn-jax export-torchvision writes it"),
        (["--output=x"], "--output=x ends in nothing; use .onnx"),
        (["--output=x.onnx", "--int8"], "measures the ranges of activations on images; give a dataset, --coco_dir"),
        (["--output=x.onnx", "--coco_dir=data"], "give one of them, or use eval"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        export.main(parse(export, ["--workdir=absent", *arguments]))
    assert not list(tmp_path.iterdir())
