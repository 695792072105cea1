"""Trainings with their data and their workdir in a bucket: the bits of a training on a disk."""

import contextlib
import gc
import json
import threading
import time

import jax
import numpy as np
import pytest

import maskrcnn_jax as mr
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path, read_bytes, write_bytes
from maskrcnn_jax.run_folder import has_checkpoint
from maskrcnn_jax.training.checkpoint import Checkpoints
from tests.children import PATIENCE
from tests.training.forked_run import start
from tests.training.layer import Training, assert_same, points
from tests.training.saved import saved_arrays

STEPS = 8


def logged(workdir):
    """Return the lines of metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in read_bytes(workdir / "metrics.jsonl").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


@pytest.fixture
def unawaited_ignored(monkeypatch):
    """Ignore errors of arrays that nobody waits for after the first failed."""
    before = set(threading.enumerate())
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    yield
    for thread in set(threading.enumerate()) - before:
        threading.Thread.join(thread, timeout=1)  # those of Orbax would raise their error; those of asyncio stay
    gc.collect()


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


def test_checkpoints_in_a_bucket_are_kept_and_found_as_on_a_disk(bucket):
    workdir = as_path(f"{bucket.url}/checkpoints")
    training, arrays = Training("float32"), []
    with contextlib.closing(Checkpoints(workdir, keep=1)) as checkpoints:
        assert not has_checkpoint(workdir)
        for step, metric in ((1, 0.5), (2, 0.4), (3, 0.3)):
            training.step(points(seed=step))
            arrays.append(training.arrays())
            checkpoints.save(training.state)
            checkpoints.add_metrics(step, {"segm_AP": metric})
    with contextlib.closing(Checkpoints(workdir, keep=1)) as checkpoints:
        assert (checkpoints.steps, checkpoints.best_step, checkpoints.latest_step) == ([1, 3], 1, 3)
        for step in (1, 3):
            found = checkpoints.restore(step, training.state)
            assert_same([np.array(leaf) for leaf in jax.tree.leaves(found)], arrays[step - 1])
    assert has_checkpoint(workdir)


def test_a_checkpoint_that_was_never_finished_is_none(bucket):
    workdir = as_path(f"{bucket.url}/unfinished")
    training = Training("float32")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        training.step(points())
        checkpoints.save(training.state)
    (workdir / "checkpoints" / "1" / "commit_success.txt").unlink()
    assert not has_checkpoint(workdir), "a resumed training would not read the weights that it is to start from"
    write_bytes(workdir / "checkpoints" / "1" / "left", b"")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        assert checkpoints.restore_newest(training.state) is None
        checkpoints.save(training.state)
    assert has_checkpoint(workdir)
    assert "unfinished/checkpoints/1/left" not in bucket.names()


def test_a_checkpoint_in_a_bucket_that_was_cut_off_is_put_aside(bucket, unawaited_ignored):
    workdir = as_path(f"{bucket.url}/cut_off")
    training = Training("float32")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        for seed in range(2):
            training.step(points(seed=seed))
            checkpoints.save(training.state)
    for name in bucket.names():
        if name.startswith("cut_off/checkpoints/2/training/d/"):
            path = as_path(f"{bucket.url}/{name}")
            write_bytes(path, read_bytes(path)[:10])
    for aside in ("unreadable_2", "unreadable_1"):
        write_bytes(workdir / "checkpoints" / aside / "from an earlier time", b"")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        assert int(checkpoints.restore_newest(training.state).step) == 1
        assert checkpoints.steps == [1]
    names = {path.name for path in (workdir / "checkpoints" / "unreadable_2").iterdir()}
    assert "training" in names and "from an earlier time" not in names


def test_a_bucket_that_refuses_a_checkpoint_is_a_sentence(bucket, unawaited_ignored):
    workdir = as_path(f"{bucket.url}/refusing")
    training = Training("float32")
    with (
        pytest.raises(UserError, match=r"refusing/checkpoints cannot be written \(.*nobody@x"),
        contextlib.closing(Checkpoints(workdir)) as checkpoints,
        bucket.refusing("POST"),
    ):
        checkpoints.save(training.state)
        checkpoints.wait()
