"""train.py, eval.py and predict.py at the top of the checkout: what they refuse, and broken images.

What the commands do is tested in test_installed.py.
"""

import shutil

import pytest

from tests.commands.walk import CONFIG


@pytest.fixture
def config():
    """Options of a training on all devices of these tests."""
    return [*CONFIG, "--config.batch_size=8"]


def test_a_missing_dataset_stops_before_anything_is_written(refusal, config, tmp_path):
    line = refusal("train.py", *config, "--config.data.coco_dir=nowhere", "--workdir=run")
    assert "nowhere" in line
    assert not (tmp_path / "run").exists()


def test_missing_weights_stop_before_anything_is_written(refusal, config, tmp_path, shapes):
    dataset = f"--config.data.coco_dir={shapes}"
    assert "nowhere.pth" in refusal("train.py", *config, dataset, "--workdir=run", "--weights=nowhere.pth")
    assert not (tmp_path / "run").exists()


def test_a_model_is_a_run_or_weights_with_their_config(refusal):
    assert "--workdir" in refusal("eval.py", "--split=val2017")
    assert "--workdir" in refusal("eval.py", "--workdir=run", "--weights=x.pth", "--output=out")
    assert "need the config" in refusal("eval.py", "--weights=x.pth", "--output=out")
    assert "--output" in refusal("eval.py", "--weights=x.pth", "--config=r50_fpn")
    assert "--report" in refusal("eval.py", "--workdir=run", "--compare=other")


def test_a_folder_without_a_run_is_named(refusal, tmp_path, shapes):
    assert str(tmp_path) in refusal("eval.py", f"--workdir={tmp_path}")
    assert "nowhere" in refusal("eval.py", "--workdir=nowhere")
    images = f"--input={shapes}/val2017"
    assert str(tmp_path) in refusal("predict.py", f"--workdir={tmp_path}", images, "--output=never")
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_a_truncated_image_is_named_or_skipped_if_wanted(run, tmp_path, shapes):
    shutil.copytree(shapes, tmp_path / "data")
    victim = sorted((tmp_path / "data" / "train2017").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-200])
    command = ["train.py", *CONFIG, "--config.eval_every=0", "--workdir=run"]
    refused = run(*command)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert victim.name in line
    assert "skip_broken" in line
    trained = run(*command, "--config.data.skip_broken=true")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert victim.name in trained.stderr

    # The first image of the evaluation, which is also one of those that are drawn.
    unseen = sorted((tmp_path / "data" / "val2017").iterdir())[0]
    unseen.write_bytes(unseen.read_bytes()[:-200])
    evaluated = run("eval.py", "--workdir=run", "--output=evaluated")
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert "warning: only 2 of 3 images were evaluated" in evaluated.stderr
    assert (tmp_path / "evaluated" / "predictions.jpg").exists()
