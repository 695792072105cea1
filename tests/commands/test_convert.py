"""The commands that take datasets in the layouts of other tools."""

import pytest

from maskrcnn_jax.commands import app
from maskrcnn_jax.commands import check as check_command
from maskrcnn_jax.commands import convert as convert_command
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from tests.converting.layout_writers import SPLITS, Part, choose, cvat, roboflow, yolo

IDS = {"circle": 7, "heart": 12, "ring": 900}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals") / "shapes"
    write_dataset(root, num_train=12, num_val=5, image_size=96, categories=IDS, splits=SPLITS, seed=3)
    return {split: Part(choose(root, split, IDS, 12), root / split) for split in SPLITS}


def run(command, *arguments):
    command.main(app.parse(command, [*map(str, arguments)]))


def test_convert_says_what_it_wrote(parts, tmp_path, capsys):
    yolo(tmp_path / "in", parts)
    run(convert_command, tmp_path / "in", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    num = {split: len(part.content["images"]) for split, part in parts.items()}
    assert lines[0].startswith(f"train: {num['train']} images, ") and lines[1].startswith(
        f"val: {num['val']} images, "
    )
    assert lines[2] == f"{tmp_path}/out written; check it with maskrcnn-jax check {tmp_path}/out"


@pytest.mark.parametrize("writer", [roboflow, yolo], ids=["roboflow", "yolo"])
def test_check_takes_every_layout(parts, tmp_path, capsys, writer):
    writer(tmp_path / "in", parts)
    run(check_command, tmp_path / "in", "--config=own_dataset:small", f"--report={tmp_path}/page.html")
    out = capsys.readouterr().out
    assert "error:" not in out and "0 errors" in out and "in 2 splits" in out
    assert "train" in (tmp_path / "page.html").read_text()


def test_check_names_what_is_wrong_in_another_format(parts, tmp_path):
    yolo(tmp_path / "in", parts)
    path = next((tmp_path / "in" / "labels" / "train").iterdir())
    path.write_text("0 5 5 9 5 9 9")
    with pytest.raises(UserError, match=f"{path}, line 1"):
        run(check_command, tmp_path / "in")
    path.write_text("")
    with pytest.raises(UserError, match="run maskrcnn-jax convert .*/in OUT and check OUT"):
        run(check_command, tmp_path / "in", f"--fix={tmp_path}/fixed.json")


def test_check_says_how_to_evaluate_a_dataset_of_one_split(parts, tmp_path, capsys):
    cvat(tmp_path / "in", parts)
    run(check_command, tmp_path / "in", "--config=own_dataset:small")
    out = capsys.readouterr().out
    assert "default" in out or "train" in out
    assert Kind.NO_EVALUATION.sentence.partition("}")[0] not in out
    assert "has no split val; add it, hold out a share of the training images with data.val_share=0.2" in out
    run(check_command, tmp_path / "in", "--config=own_dataset:small", "--config.data.val_share=0.2")
    assert "has no split val" not in capsys.readouterr().out
