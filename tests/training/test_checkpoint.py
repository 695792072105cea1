"""Checkpoints: read to the bit or not at all, whichever file is cut off and whoever else writes there."""

import contextlib
import errno
import gc
import os
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.run_folder import CheckpointReader, locked
from maskrcnn_jax.training.checkpoint import Checkpoints
from tests.training.layer import Training, assert_same, points


def test_a_state_read_from_a_checkpoint_goes_on_with_the_same_bits(tmp_path):
    options = {"loss_scale": 2.0**20, "loss_scale_interval": 2}
    training = Training(**options)
    skipped = sum(training.step(points(seed=i))["skipped"] for i in range(5))
    assert 0 < skipped < 5
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(training.state)
    rows = [training.step(points(seed=i)) for i in range(5, 8)]

    again = Training(**options)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        again.state = checkpoints.restore(5, again.state)
    assert [again.step(points(seed=i)) for i in range(5, 8)] == rows
    assert_same(again.arrays(), training.arrays())


def test_a_folder_that_cannot_be_written_is_a_sentence_and_leaves_nothing_that_waits(tmp_path, monkeypatch):
    training, threads = Training("float32"), threading.enumerate()

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    checkpoints = Checkpoints(tmp_path)
    for function in ("mkdir", "makedirs"):  # where folders may be written, the superuser of a test may too
        monkeypatch.setattr(os, function, refuse)
    with (
        pytest.raises(UserError, match=r"checkpoints cannot be written \(Read-only file system\); make room"),
        contextlib.closing(checkpoints),
    ):
        checkpoints.save(training.state)
    new = [thread.name for thread in set(threading.enumerate()) - set(threads)]
    assert all(name.startswith("asyncio_") for name in new), "the process would wait for them"  # asyncio's are idle


def test_without_any_mask_the_best_checkpoint_is_that_of_the_best_boxes(tmp_path):
    training = Training("float32")
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step, box_ap in ((1, 0.5), (2, 0.3)):
            training.step(points())
            checkpoints.save(training.state)
            checkpoints.add_metrics(step, {"segm_AP": -1.0, "bbox_AP": box_ap})
        assert (checkpoints.best_step, checkpoints.latest_step) == (1, 2)


def test_the_metric_of_the_best_checkpoint_is_an_option(tmp_path):
    training = Training("float32")
    for best_metric, best in (("bbox_AP", 1), ("segm_AP", 2)):
        with contextlib.closing(Checkpoints(tmp_path, best_metric=best_metric)) as checkpoints:
            for step, (box_ap, mask_ap) in enumerate([(0.5, 0.3), (0.4, 0.4)], start=1):
                if best_metric == "bbox_AP":
                    training.step(points())
                    checkpoints.save(training.state)
                    checkpoints.add_metrics(step, {"segm_AP": mask_ap, "bbox_AP": box_ap, "segm_AR1": 0.1})
            assert checkpoints.best_step == best
    # Earlier versions wrote one value.
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text('{"segm_AP": 0.9}')
    for best_metric in ("bbox_AP", "segm_AP"):
        with contextlib.closing(CheckpointReader(tmp_path, best_metric=best_metric)) as checkpoints:
            assert checkpoints.best_step == 1


def test_a_folder_into_which_another_process_writes_is_refused(tmp_path):
    holding = "import fcntl; f = open('.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", holding], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another training is writing into"), locked(tmp_path):
        pass
    CheckpointReader(tmp_path).close()
    other.communicate("\n")
    with locked(tmp_path):
        pass


@pytest.mark.slow
def test_a_checkpoint_of_which_any_file_was_cut_off_is_never_read(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)  # arrays that nobody waits for after the first failed
    training = Training(ema_decay=0.9)
    with contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints:
        for seed in range(2):
            training.step(points(seed=seed))
            checkpoints.save(training.state)
            checkpoints.add_metrics(int(training.state.step), {"segm_AP": 0.5})
    expected, put_aside = training.arrays(), 0
    files = [path for path in (tmp_path / "run" / "checkpoints" / "2").rglob("*") if path.is_file()]
    for i, path in enumerate(files):
        damaged = tmp_path / str(i)
        shutil.copytree(tmp_path / "run", damaged)
        path = damaged / path.relative_to(tmp_path / "run")
        os.truncate(path, path.stat().st_size // 2)
        if path.parts[-2:] == ("metrics", "metrics"):
            with pytest.raises(UserError, match="does not hold the metrics of an evaluation; delete the folder"):
                Checkpoints(damaged)
            continue
        with contextlib.closing(Checkpoints(damaged)) as checkpoints:
            state = checkpoints.restore_newest(training.state)
            if int(state.step) == 2:  # a file that nothing is read from
                assert_same([np.array(leaf) for leaf in jax.tree.leaves(state)], expected)
            else:
                put_aside += 1
                assert checkpoints.steps == [1]
    assert put_aside >= 8
    for path in (tmp_path / "run" / "checkpoints").glob("*/model/manifest.ocdbt"):
        path.unlink()
    with (
        contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints,
        pytest.raises(UserError, match="checkpoints/2 cannot be read .* nor can any other in .*; restore a copy"),
    ):
        checkpoints.restore_newest(training.state)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir(), "nothing is put aside where nothing else is left"
    gc.collect()  # while their errors are ignored


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        ValueError("UNAVAILABLE: Error reading gs://bucket/manifest.ocdbt: HTTP 503"),
        type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("Service Unavailable, 503"),
    ],
    ids=lambda error: str(error)[:20],
)
@pytest.mark.parametrize("call", ["restore", "item_metadata"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_put_aside(tmp_path, monkeypatch, error, call):
    training = Training("float32")
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for seed in range(2):
            training.step(points(seed=seed))
            checkpoints.save(training.state)
        checkpoints.wait()

        def refuse(*_, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, call, refuse)
            with pytest.raises(UserError, match=r"checkpoints/2 cannot be read .* try again"):
                checkpoints.restore_newest(training.state)
        with monkeypatch.context() as patch:  # Orbax finds nothing in a folder that this user may not enter
            patch.setattr(checkpoints._manager, call, lambda *_, **__: exec("raise FileNotFoundError"))
            patch.setattr("os.access", lambda path, mode: False)
            with pytest.raises(UserError, match=r"checkpoints/2 cannot be read .* try again"):
                checkpoints.restore_newest(training.state)
        assert int(checkpoints.restore_newest(training.state).step) == 2


@pytest.mark.parametrize("shard", [False, True])
def test_a_checkpoint_of_eight_devices_goes_on_with_two(tmp_path, shard):
    eight, two = (Training("float32", ema_decay=0.9, shard=shard, devices=devices) for devices in (8, 2))
    for seed in range(3):
        eight.step(points(seed=seed))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(eight.state)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        two.state = checkpoints.restore_newest(two.state)
    assert_same(two.arrays(), eight.arrays())
    for seed in range(3, 8):
        ours, expected = two.step(points(seed=seed)), eight.step(points(seed=seed))
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
