"""The stand-alone tool takes what the model takes, and says in a sentence what it does not."""

import json

import cv2
import numpy as np
import pytest

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.exporting.onnx_file import export_onnx
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.options import DataOptions, Options
from tests.models.tiny import tiny_model
from tools import run_exported

CATEGORIES = Categories.create([1, 2, 3, 4], ["cup", "dog", "person", "tree"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of four channels and Pillow's resizing for one size, and with images."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny_model(in_channels=4)
    data = DataOptions(short_side=64, long_side=96, resize="pillow")
    predictor = Predictor(model, CATEGORIES, Options(model=model.options, data=data))
    export_onnx(predictor, folder / "model.onnx", sizes=[(64, 96)])
    rng = np.random.default_rng(0)
    (folder / "more").mkdir()
    for name, size in (("photo.png", (80, 120, 4)), ("more/photo.png", (64, 64, 4)), ("tall.png", (120, 80, 4))):
        cv2.imwrite(str(folder / name), rng.integers(0, 256, size, dtype=np.uint8))
    cv2.imwrite(str(folder / "deep.png"), rng.integers(0, 1 << 16, (80, 120, 4), dtype=np.uint16))
    cv2.imwrite(str(folder / "colour.png"), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (folder / "text.mrcnn").write_text("no model")
    (folder / "broken.mrcnn").write_bytes(b"PK\x03\x04")
    (folder / "broken.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-100])
    return predictor, folder


@pytest.fixture
def run(folder, monkeypatch):
    """Run the tool in the folder."""

    def run(*arguments):
        monkeypatch.chdir(folder[1])
        monkeypatch.setattr("sys.argv", ["run_exported.py", *arguments])
        run_exported.main()

    return run


@pytest.mark.parametrize("runtime", run_exported.RUNTIMES)
@pytest.mark.parametrize("name", ["photo.png", "deep.png"])
def test_images_of_four_channels_give_what_the_model_finds(name, runtime, folder, run, capsys):
    predictor, path = folder
    run("model.onnx", name, "--min_score=0", f"--runtime={runtime}", "--pictures=drawn")
    rows = json.loads(capsys.readouterr().out)["objects"]
    expected = predictor.predict(path / name, min_score=0)
    assert len(rows) > 1 and [row["name"] for row in rows] == expected.names
    np.testing.assert_allclose([row["box"] for row in rows], expected.boxes, atol=0.05)
    assert cv2.imread(str(path / "drawn" / name)).shape == (80, 120, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.onnx", "photo.png"], "there is no file absent.onnx"),
        (["text.mrcnn", "photo.png"], "text.mrcnn cannot be read as an exported model: it is no zip archive"),
        (["broken.mrcnn", "photo.png"], "broken.mrcnn cannot be read as an exported model"),
        (["broken.onnx", "photo.png", "--runtime=openvino"], "exported model: Model can't be parsed"),
        (["broken.onnx", "photo.png", "--runtime=onnxruntime"], "exported model: .*Protobuf parsing failed"),
        (["model.onnx", "text.mrcnn"], "text.mrcnn cannot be read as an image"),
        (["model.onnx", "colour.png"], r"colour.png cannot be detected in: .*\(64, 64, 3\) is none of 4 channels"),
        (["model.onnx", "tall.png"], r"tall.png cannot be detected in: .* fits none of \[\[64, 96\]\]"),
        (["model.onnx", "photo.png", "--pictures=."], "photo.png would be overwritten"),
        (["model.onnx", "photo.png", "more/photo.png", "--pictures=x"], "x/photo.png would be overwritten"),
    ],
)
def test_what_cannot_work_ends_with_a_sentence(arguments, said, run):
    with pytest.raises(SystemExit, match=said):
        run(*arguments)
