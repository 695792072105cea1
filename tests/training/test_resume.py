"""Runs that are killed or told to stop at any moment end with the bits of the run that never was."""

import json
import os
import random
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.training.forked_run import start

STEPS = 24


def arrays(workdir, step=STEPS):
    """Return every saved array of a checkpoint by name: parameters, average, statistics, optimizer, loss scale."""
    found = {}
    for item in ("model", "training"):
        folder, checkpointer = workdir / "checkpoints" / str(step) / item, ocp.PyTreeCheckpointer()
        kinds = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), checkpointer.metadata(folder).item_metadata.tree
        )
        tree = checkpointer.restore(folder, restore_args=kinds)
        found |= {item + jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree.leaves_with_path(tree)}
    return found


def logged(workdir):
    """Return the lines of metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


def being_written(workdir):
    return [path for path in (workdir / "checkpoints").glob("*tmp*")] if (workdir / "checkpoints").is_dir() else []


@pytest.fixture
def long_config(config):
    """A run with everything that is kept between steps: averages, a loss scale that moves, the best checkpoint."""
    config.batch_size, config.epochs, config.max_steps = 4, 100, STEPS
    config.log_every, config.checkpoint_every, config.eval_every, config.keep_checkpoints = 1, 3, 2, 2
    config.model.dtype = "float16"
    config.optim.update(ema_decay=0.9, loss_scale=2.0**17, loss_scale_interval=5)
    return config


class Stopper:
    """Ends trainings at random moments, every other time while a checkpoint is being written."""

    def __init__(self, number, seconds, seed):
        self.number, self.seconds, self.rng = number, seconds, random.Random(seed)
        self.inside_saving, self.count = 0, 0

    def stop(self, process, workdir):
        """Wait for a moment, send the signal and return whether it came before the end of the run."""
        if self.count % 2:
            began = time.time()
            while process.is_alive() and not any(path.stat().st_mtime > began for path in being_written(workdir)):
                time.sleep(0.001)
            time.sleep(self.rng.uniform(0, 0.1))
        else:
            process.join(self.rng.uniform(0, self.seconds))
        if process.is_alive():
            os.kill(process.pid, self.number)
        process.join(60)
        if process.exitcode == 0:
            return False
        self.count += 1
        self.inside_saving += bool(being_written(workdir))
        return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_again_and_again_has_the_bits_of_one_that_never_was(long_config, tmp_path, number):
    times = int(os.environ.get("STOPS", 4))

    def run_to_the_end(workdir):
        process = start(long_config, workdir, tmp_path / "cache")
        process.join(300)
        assert process.exitcode == 0, workdir.with_suffix(".log").read_text()[-3000:]

    run_to_the_end(tmp_path / "whole")  # compiles
    began = time.time()
    run_to_the_end(tmp_path / "again")
    expected, log = arrays(tmp_path / "whole"), logged(tmp_path / "whole")
    assert {line["loss_scale"] for line in log if "loss_scale" in line} > {2.0**17}, "the scale never moved"
    stopper, runs, codes = Stopper(number, time.time() - began, seed=0), 0, set()
    while stopper.count < times or not runs:
        workdir = tmp_path / f"stopped{runs}"
        while stopper.count < times:
            process = start(long_config, workdir, tmp_path / "cache")
            if not stopper.stop(process, workdir):
                break
            codes.add(process.exitcode)
        run_to_the_end(workdir)
        runs += 1
        result = arrays(workdir)
        assert result.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(result[name], array, err_msg=name)
        assert logged(workdir) == log
        assert not being_written(workdir)
    print(f"{times} signals {number} to {runs} runs, {stopper.inside_saving} while saving; exit codes {codes}")
    # What has not begun to train has nothing to save: SIGTERM ends it as it ends any process.
    assert codes <= ({-signal.SIGKILL} if number == signal.SIGKILL else {128 + signal.SIGTERM, -signal.SIGTERM})
    if number == signal.SIGKILL:
        assert stopper.inside_saving
    else:
        assert 128 + signal.SIGTERM in codes
