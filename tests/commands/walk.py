"""Uses every command, and the Python functions, of an installed package in an empty folder.

    cd EMPTY_FOLDER && VENV/bin/python CHECKOUT/tests/commands/walk.py

A test runs it with the package of this checkout; run it by hand in a fresh virtual environment. Its argument is the
folder that the package must be in, the virtual environment if not given.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

# Changes of the config "shapes": two steps of a network that compiles fast, on images of 64 pixels.
TINY = {
    "batch_size": 4,
    "eval_batch_size": 2,
    "max_steps": 2,
    "log_every": 1,
    "eval_losses": True,
    "eval_train_limit": 3,
    "data.coco_dir": "data",
    "data.short_side": 64,
    "data.long_side": 64,
    "model.stem_channels": 8,
    "model.stage_channels": 8,
    "model.fpn_channels": 16,
    "model.box_fc_channels": (32, 32),
    "model.mask_channels": 8,
    "model.rpn_batch_size_per_image": 32,
    "model.rpn_pre_nms_top_n_train": 32,
    "model.rpn_post_nms_top_n_train": 32,
    "model.rpn_pre_nms_top_n_test": 32,
    "model.rpn_post_nms_top_n_test": 32,
    "model.box_batch_size_per_image": 16,
    "model.box_detections_per_img": 10,
    "model.box_score_thresh": 0.01,
}
CONFIG = ["--config=shapes", *(f"--config.{name}={value}" for name, value in TINY.items())]

PYTHON = f"""
import json
import sys
import maskrcnn_jax as mr

if __name__ == "__main__":  # the loader's processes import this file
    image = "data/val2017/000000000001.jpg"
    model = mr.load("run")
    found = model.predict(image, min_score=0)
    in_folder = [result for result in json.load(open("pictures/detections.json")) if result["image_id"] == 1]
    assert [result["category_id"] for result in in_folder] == found.category_ids.tolist()
    assert mr.load("model.safetensors", config="run").predict(image, min_score=0).to_coco(1) == found.to_coco(1)
    print("predicted", file=sys.stderr)

    config = mr.load_config("shapes")
    config.update_from_flattened_dict({TINY!r})
    config.eval_every = 0
    config.data.workers = 1
    mr.train(config, "run_of_python")
    evaluated = mr.evaluate(mr.load("run"), "data", limit=2, output="evaluated_by_python")
    assert json.load(open("evaluated_by_python/metrics.json"))["segm_AP"] == evaluated.metrics["segm_AP"]
"""


def run(*command: str) -> subprocess.CompletedProcess:
    """Run a command and return what it printed."""
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    seconds = time.monotonic() - start
    print(f"{seconds:5.0f} s  {' '.join(word for word in command[:6] if chr(10) not in word)}", flush=True)
    return done


def maskrcnn(*arguments: str) -> subprocess.CompletedProcess:
    """Run a command of the package that must succeed."""
    done = run("maskrcnn-jax", *arguments)
    assert done.returncode == 0, f"{arguments}\n{done.stderr[-3000:]}"
    return done


def train_and_evaluate() -> dict:
    """Train by the name of a config, evaluate the run, and return the metrics of both, which are the same."""
    trained = maskrcnn("train", *CONFIG, "--workdir=run")
    metrics = json.loads(Path("run/metrics.json").read_text())
    last = trained.stdout.splitlines()[-1]
    assert last == f"box AP {metrics['bbox_AP']:.3f}  mask AP {metrics['segm_AP']:.3f}", trained.stdout
    assert f"loss {metrics['eval_loss']:.3f}" in trained.stdout
    assert "\nwarning: " in f"\n{trained.stderr}", "this dataset has too few objects"
    assert Path("run/predictions.jpg").stat().st_size > 1000
    assert 0 < metrics["eval_accuracy"] <= 1
    assert 0 <= metrics["train_segm_AP"] <= 1
    assert "train_accuracy" in Path("run/metrics.jsonl").read_text().splitlines()[-1]

    config = json.loads(Path("run/config.json").read_text())
    del config["eval_workers"]  # as in runs from before this option
    Path("run/config.json").write_text(json.dumps(config))
    maskrcnn("eval", "--workdir=run", "--output=evaluated", "--report=report.html", "--compare=run")
    assert "most errors first" in Path("report.html").read_text()
    metrics = {name: value for name, value in metrics.items() if not name.startswith("train_")}
    assert json.loads(Path("evaluated/metrics.json").read_text()) == metrics
    return metrics


def compare_with_pycocotools(metrics: dict) -> None:
    """Compute the metrics of the written detections again."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    assert json.loads(Path("evaluated/detections.json").read_text())
    for kind in ("bbox", "segm"):
        with contextlib.redirect_stdout(None):
            truth = COCO("data/annotations/instances_val2017.json")
            evaluation = COCOeval(truth, truth.loadRes("evaluated/detections.json"), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
        assert [metrics[f"{kind}_{name}"] for name in names] == evaluation.stats.tolist()


def evaluate_exported_weights_on_tfds(metrics: dict) -> None:
    """Give the model and the dataset another form, with which nothing changes."""
    exported = maskrcnn("export-torchvision", "--workdir=run", "--output=model.safetensors")
    assert "roi_aligned=True" in exported.stdout, "torchvision has no such option"
    assert "8/8" in maskrcnn("build-tfds", "--coco_dir=data", "--tfds_dir=tfds").stderr
    weights = ["--weights=model.safetensors", *CONFIG, "--tfds_dir=tfds", "--output=evaluated_weights"]
    maskrcnn("eval", *weights, "--categories=run/categories.json")
    assert json.loads(Path("evaluated_weights/metrics.json").read_text()) == metrics
    # Without --categories the labels would be COCO's, which these weights do not have.
    refused = run("maskrcnn-jax", "eval", *weights)
    assert refused.returncode == 1 and "error: " in refused.stderr and "Traceback" not in refused.stderr

    tfds = [
        "--config.data.source=tfds",
        "--config.data.tfds_dir=tfds",
        "--config.data.coco_dir=",
        "--config.eval_every=0",
    ]
    maskrcnn("train", *CONFIG, *tfds, "--weights=model.safetensors", "--workdir=fine_tuned")


def serve() -> None:
    """Start the service, ask it for a prediction, and stop it."""
    start = time.monotonic()
    command = ["maskrcnn-jax", "serve", "--workdir=run", "--port=0", "--max_batch=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            lines = []
            while "listening on" not in (line := process.stdout.readline()):
                lines.append(line)
                assert line, f"it ended: {lines}"
            assert "images of 64x64 are ready" in "".join(lines)
            address, image = line.split()[-1], Path("data/val2017/000000000001.jpg").read_bytes()
            with urllib.request.urlopen(f"{address}/predict?min_score=0", image) as response:
                found = json.load(response)["detections"]
            results = json.loads(Path("pictures/detections.json").read_text())
            expected = [result for result in results if result["image_id"] == 1]
            assert [row["category_id"] for row in found] == [result["category_id"] for result in expected]
            assert [row["rle"] for row in found] == [result["segmentation"] for result in expected]
            try:
                urllib.request.urlopen(f"{address}/predict", b"no image")
                raise AssertionError("it takes anything for an image")
            except urllib.error.HTTPError as error:
                assert error.code == 422
        finally:
            process.terminate()
        assert process.wait(timeout=3000) == 0
    print(f"{time.monotonic() - start:5.0f} s  {' '.join(command)}", flush=True)


def resume() -> None:
    """Train one more step, and with another network, which is refused and changes nothing."""
    resumed = maskrcnn("train", *CONFIG, "--config.max_steps=3", "--config.eval_every=0", "--workdir=run")
    assert "resuming at step 2 of 3" in resumed.stdout
    assert "max_steps 3 (2 before), eval_every 0 (3 before)" in resumed.stderr
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3]
    other = ["--config.max_steps=4", "--config.model.backbone=resnet34"]
    refused = run("maskrcnn-jax", "train", *CONFIG, *other, "--workdir=run")
    assert refused.returncode == 1 and "of another architecture" in refused.stderr
    assert json.loads(Path("run/config.json").read_text())["model"]["backbone"] == "resnet18"


def main() -> None:
    """Do everything that a user can do."""
    assert not os.listdir(), "start in an empty folder"
    os.environ["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"
    # As the commands do; Python scripts keep no compiled programs unless they are told to.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "maskrcnn_jax" / "xla"))
    package = importlib.util.find_spec("maskrcnn_jax").origin
    assert package.startswith(sys.argv[1] if len(sys.argv) > 1 else sys.prefix), f"{package} is not what was installed"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("maskrcnn-jax", "jax", "flax", "numpy")]
    print(f"Python {sys.version.split()[0]}, {', '.join(versions)}")
    done = run(
        sys.executable, "-m", "maskrcnn_jax.data.shapes", "data", "--train=5", "--val=3", "--size=64", "--seed=1"
    )
    assert done.returncode == 0, done.stderr
    Path("mine.py").write_text(
        "from maskrcnn_jax import load_config\n\n\ndef get_config():\n    return load_config('shapes')\n"
    )
    checked = maskrcnn("check", "data", "--config=mine.py", "--report=check.html")
    assert checked.stdout.splitlines()[-1].startswith("0 errors") and Path("check.html").is_file()

    metrics = train_and_evaluate()
    compare_with_pycocotools(metrics)
    evaluate_exported_weights_on_tfds(metrics)
    maskrcnn("predict", "--workdir=run", "--input=data/val2017", "--output=pictures", "--min_score=0")
    assert len(list(Path("pictures").glob("*.jpg"))) == 3
    serve()
    choices = ("--min_score=0", "--tile=48", "--whole_image", "--nms=linear", "--tta=flip")
    files = ("--masks=png", "--polygons=labelme")
    maskrcnn("predict", "--workdir=run", "--input=data/val2017", "--output=predicted", *choices, *files)
    assert len(list(Path("predicted/instances").glob("*.png"))) == 3
    maskrcnn("convert", "predicted/labelme", "corrected")
    maskrcnn("export", "--workdir=run", "--output=model.mrcnn", "--int8", "--coco_dir=data", "--limit=2")
    assert Path("model.mrcnn").stat().st_size > 1000

    Path("script.py").write_text(PYTHON)
    done = run(sys.executable, "script.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.startswith("predicted\n"), f"a user who loads a model is told of nothing: {done.stderr}"
    resume()


if __name__ == "__main__":
    main()
