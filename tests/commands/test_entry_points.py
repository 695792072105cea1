"""The commands as a user types them, in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_jax.data.shapes import write_dataset

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[2]

TINY = """
from configs import shapes

def get_config():
    config = shapes.get_config()
    config.batch_size = 4
    config.eval_batch_size = 2
    config.max_steps = 2
    config.log_every = 1
    config.eval_losses = True
    config.eval_train_limit = 3
    config.data.short_side = config.data.long_side = config.data.mask_side = 64
    config.model.update(stem_channels=8, stage_channels=8, fpn_channels=16, box_fc_channels=(32, 32),
        mask_channels=8, rpn_batch_size_per_image=32,
        rpn_pre_nms_top_n_train=32, rpn_post_nms_top_n_train=32, rpn_pre_nms_top_n_test=32,
        rpn_post_nms_top_n_test=32, box_batch_size_per_image=16, box_detections_per_img=10, box_score_thresh=0.01)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config file and a dataset of 5 images to train and 3 to evaluate on."""
    place = tmp_path_factory.mktemp("place")
    (place / "tiny.py").write_text(TINY)
    write_dataset(place / "shapes", num_train=5, num_val=3, image_size=64, seed=1)
    return place


def run(script, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def train(place, *args, coco_dir=None, workdir=None):
    coco_dir = place / "shapes" if coco_dir is None else coco_dir
    return run(
        "train.py",
        f"--config={place}/tiny.py",
        f"--workdir={workdir or place / 'unused'}",
        f"--config.data.coco_dir={coco_dir}",
        *args,
    )


def refusal(result):
    """Return the one line with which a command refused."""
    assert result.returncode == 1, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.slow
def test_train_eval_and_predict_work_one_after_the_other(place):
    workdir = place / "run"
    trained = train(place, workdir=workdir)
    assert trained.returncode == 0, trained.stderr[-2000:]
    written = json.loads((workdir / "metrics.json").read_text())
    assert trained.stdout.splitlines()[-1] == f"box AP {written['bbox_AP']:.3f}  mask AP {written['segm_AP']:.3f}"
    assert (workdir / "predictions.jpg").stat().st_size > 1000
    assert 0 < written["eval_accuracy"] <= 1
    assert 0 <= written["train_segm_AP"] <= 1
    assert f"loss {written['eval_loss']:.3f}" in trained.stdout
    assert "train_accuracy" in (workdir / "metrics.jsonl").read_text().splitlines()[-1]
    written = {name: value for name, value in written.items() if not name.startswith("train_")}

    config = json.loads((workdir / "config.json").read_text())
    del config["eval_workers"]  # as in runs from before this option
    (workdir / "config.json").write_text(json.dumps(config))
    evaluated = run("eval.py", f"--workdir={workdir}", f"--output={place / 'evaluated'}")
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert json.loads((place / "evaluated" / "metrics.json").read_text()) == written

    detections = place / "evaluated" / "detections.json"
    assert len(json.loads(detections.read_text())) > 0
    truth = COCO(str(place / "shapes" / "annotations" / "instances_val2017.json"))
    for kind in ("bbox", "segm"):
        coco_eval = COCOeval(truth, truth.loadRes(str(detections)), kind)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
        assert [written[f"{kind}_{name}"] for name in names] == coco_eval.stats.tolist()

    weights = place / "model.safetensors"
    exported = run("tools/export_torchvision.py", f"--workdir={workdir}", f"--output={weights}")
    assert exported.returncode == 0, exported.stderr[-2000:]
    assert "roi_aligned=True" in exported.stdout, "torchvision has no such option"
    built = run("tools/build_tfds.py", f"--coco_dir={place / 'shapes'}", f"--tfds_dir={place / 'tfds'}")
    assert built.returncode == 0, built.stderr[-2000:]
    assert built.stdout.strip().endswith(f"--config.data.source=tfds --config.data.tfds_dir={place / 'tfds'}")
    assert "8/8" in built.stderr
    config = f"--config={place}/tiny.py"
    here = f"--tfds_dir={place / 'tfds'}"
    categories = f"--categories={workdir / 'categories.json'}"
    output = f"--output={place / 'again'}"
    again = run("eval.py", config, here, f"--weights={weights}", categories, output)
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((place / "again" / "metrics.json").read_text()) == written
    # Without --categories the labels would be COCO's, which these weights do not have.
    assert "another number of classes" in refusal(run("eval.py", config, here, f"--weights={weights}", output))
    tfds = ("--config.data.source=tfds", f"--config.data.tfds_dir={place / 'tfds'}", "--config.eval_every=0")
    started = train(place, f"--weights={weights}", *tfds, coco_dir="", workdir=place / "fine_tuned")
    assert started.returncode == 0, started.stderr[-2000:]
    assert "weights of torchvision's Mask R-CNN" in started.stdout

    images = place / "shapes" / "val2017"
    predicted = run(
        "predict.py", f"--workdir={workdir}", f"--input={images}", f"--output={place}/out", "--min_score=0"
    )
    assert predicted.returncode == 0, predicted.stderr[-2000:]
    pictures = [path for path in (place / "out").iterdir() if path.suffix in (".jpg", ".png")]
    assert len(pictures) == 3
    assert (place / "out" / "detections.json").exists()

    continued = train(place, "--config.max_steps=3", "--config.eval_every=0", workdir=workdir)
    assert continued.returncode == 0, continued.stderr[-2000:]
    assert "resuming at step 2 of 3" in continued.stdout
    assert "did not have before: max_steps 3 (2 before), eval_every 0 (3 before)" in continued.stdout
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3]

    other = train(place, "--config.max_steps=4", "--config.model.backbone=resnet34", workdir=workdir)
    assert "of another architecture" in refusal(other)
    assert json.loads((workdir / "config.json").read_text())["model"]["backbone"] == "resnet18"


def test_weights_and_runs_are_not_mixed_up(place):
    line = refusal(run("eval.py", "--split=val2017"))
    assert "either --workdir" in line
    assert "--weights needs the --config" in refusal(run("eval.py", "--weights=x.pth", "--output=y"))
    line = refusal(train(place, "--weights=nowhere.safetensors"))
    assert "nowhere.safetensors" in line
    assert not (place / "unused").exists()


def test_a_missing_dataset_is_one_sentence(place):
    line = refusal(train(place, coco_dir=place / "nowhere"))
    assert "nowhere" in line
    assert not (place / "unused").exists()


def test_a_misspelt_option_is_one_sentence(place):
    assert "does not exist: batch_sise Did you mean" in refusal(train(place, "--config.batch_sise=4"))
    unknown = run("eval.py", "--workdirr=x")
    assert "Unknown command line flag 'workdirr'. Did you mean: workdir ?" in refusal(unknown)
    line = refusal(run("train.py", f"--config={ROOT}/configs/paper.py:table=1,row=9", "--workdir=x"))
    assert "no 'table=1,row=9'" in line
    assert "nowhere.py" in refusal(run("train.py", "--config=nowhere.py", "--workdir=x"))


def test_a_workdir_without_a_run_is_one_sentence(place):
    assert "no trained model" in refusal(run("eval.py", f"--workdir={place}"))
    assert "no trained model" in refusal(
        run("predict.py", f"--workdir={place}", f"--input={place}/shapes/val2017", f"--output={place}/never")
    )
    assert not (place / "never").exists()


@pytest.mark.slow
def test_a_truncated_image_is_named_or_skipped_when_asked(place):
    broken = place / "broken"
    shutil.copytree(place / "shapes", broken)
    victim = sorted((broken / "train2017").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-200])
    line = refusal(train(place, "--config.eval_every=0", coco_dir=broken, workdir=place / "strict"))
    assert victim.name in line
    assert "skip_broken" in line
    lenient = train(
        place, "--config.eval_every=0", "--config.data.skip_broken=true", coco_dir=broken, workdir=place / "lenient"
    )
    assert lenient.returncode == 0, lenient.stderr[-2000:]
    assert victim.name in lenient.stderr

    # The first image of the evaluation, which is also one of those that are drawn.
    unseen = sorted((broken / "val2017").iterdir())[0]
    unseen.write_bytes(unseen.read_bytes()[:-200])
    evaluated = run("eval.py", f"--workdir={place / 'lenient'}", f"--output={place / 'evaluated_lenient'}")
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert "2 of 3 images were evaluated" in evaluated.stderr
    assert (place / "evaluated_lenient" / "predictions.jpg").exists()
