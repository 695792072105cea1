"""Trainings with their data and their workdir in a bucket: the bits of a training on a disk."""

import json
import time

import numpy as np
import pytest

import maskrcnn_jax as mr
from maskrcnn_jax.paths import as_path, read_bytes
from tests.children import PATIENCE
from tests.training.forked_run import start
from tests.training.saved import saved_arrays

STEPS = 8


def logged(workdir):
    """Return the lines of metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in read_bytes(workdir / "metrics.jsonl").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_while_it_saves_has_the_bits_of_one_on_a_disk(
    bucket, make_config, shapes_dir, tmp_path
):
    config = make_config()
    config.batch_size, config.epochs, config.max_steps = 4, 100, STEPS
    config.log_every, config.checkpoint_every, config.eval_every, config.keep_checkpoints = 1, 2, 1, 2
    config.optim.ema_decay = 0.9

    def run(workdir):
        log = tmp_path / "log"
        return start(config, workdir, tmp_path / "cache", log=log, environment=bucket.environment), log

    def finish(workdir):
        process, log = run(workdir)
        process.join(PATIENCE)
        assert process.exitcode == 0, log.read_text()[-3000:]

    finish(tmp_path / "run")
    config.data.coco_dir = bucket.upload(shapes_dir, "shapes")
    workdir = as_path(f"{bucket.url}/killed")
    process, log = run(str(workdir))

    def is_saving(step):
        begun = f"killed/checkpoints/{step}/"
        names = {name for name in bucket.names() if name.startswith(begun)}
        return names and f"{begun}commit_success.txt" not in names

    while process.is_alive() and not is_saving(6):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert is_saving(6), log.read_text()[-3000:]
    finish(str(workdir))
    assert "resuming at step 4 of" in log.read_text()

    expected, found = (saved_arrays(folder, STEPS) for folder in (tmp_path / "run", workdir))
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert logged(workdir) == logged(tmp_path / "run")
    assert any(name.startswith("killed/tensorboard/events") for name in bucket.names())
    kept = [{path.name for path in (folder / "checkpoints").iterdir()} for folder in (tmp_path / "run", workdir)]
    assert kept[0] == kept[1]

    models = [mr.load(folder, checkpoint="best") for folder in (tmp_path / "run", str(workdir))]
    evaluations = [mr.evaluate(model, output=str(workdir / "evaluation")) for model in models]
    assert evaluations[0].results == evaluations[1].results
    assert json.loads(read_bytes(workdir / "evaluation" / "detections.json")) == evaluations[1].results
