"""Runs that are ended at any moment, by a signal or by a disk, go on to the bits of the run that never was."""

import json
import os
import random
import re
import resource
import signal
import time

import numpy as np
import pytest

from tests.children import PATIENCE
from tests.training.forked_run import start
from tests.training.saved import saved_arrays

STEPS = 18


def logged(workdir):
    """Return the lines of metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


def printed(workdir):
    return workdir.with_suffix(".log").read_text()


def unfinished(workdir, since=0.0):
    """Return whether a checkpoint that was begun after this time is there in part."""
    paths = (workdir / "checkpoints").glob("*tmp*") if (workdir / "checkpoints").is_dir() else []
    try:
        return any(path.stat().st_mtime > since for path in paths)
    except FileNotFoundError:
        return False  # finished in between


class Runs:
    """A config with everything that is kept between steps, one whole run of it, and others beside it."""

    def __init__(self, config, folder):
        config.batch_size, config.epochs, config.max_steps = 4, 100, STEPS
        config.log_every, config.checkpoint_every, config.eval_every, config.keep_checkpoints = 1, 3, 2, 2
        config.model.dtype = "float16"
        config.optim.update(ema_decay=0.9, loss_scale=2.0**19, loss_scale_interval=5)
        self.config, self.folder = config, folder
        self.finish("whole")
        self.arrays, self.log = saved_arrays(folder / "whole", STEPS), logged(folder / "whole")

    def start(self, name):
        return start(self.config, self.folder / name, self.folder / "cache")

    def start_up_to(self, name, step):
        """Start a run and wait for its checkpoint of this step."""
        process = self.start(name)
        while process.is_alive() and not (self.folder / name / "checkpoints" / str(step)).exists():
            time.sleep(0.01)
        return process

    def finish(self, name):
        """Start the command of this run and let it come to its end."""
        process = self.start(name)
        process.join(PATIENCE)
        assert process.exitcode == 0, printed(self.folder / name)[-3000:]

    def assert_as_if_never_ended(self, name):
        self.finish(name)
        result = saved_arrays(self.folder / name, STEPS)
        assert result.keys() == self.arrays.keys()
        for array in self.arrays:
            np.testing.assert_array_equal(result[array], self.arrays[array], err_msg=array)
        assert logged(self.folder / name) == self.log
        assert not unfinished(self.folder / name)


@pytest.fixture(scope="module")
def runs(make_config, tmp_path_factory):
    runs = Runs(make_config(), tmp_path_factory.mktemp("runs"))
    skipped = [line["skipped"] for line in runs.log if "skipped" in line]
    assert 0 < sum(skipped) < STEPS, "the loss scale tells nothing"
    return runs


class Stopper:
    """Ends trainings at random moments, every other time while a checkpoint is being written."""

    def __init__(self, number, seed):
        self.number, self.rng = number, random.Random(seed)
        self.count, self.while_saving = 0, 0

    def stop(self, process, workdir):
        """Wait for a moment, send the signal and return whether that ended the run."""
        began = time.time()
        saving = self.count % 2
        if saving:
            self._wait(process, lambda: unfinished(workdir, began), self.rng.randrange(1, 4))
            time.sleep(self.rng.uniform(0, 0.1))
        else:  # after so many lines of the log; after none, anywhere in the start
            log = workdir / "metrics.jsonl"
            lines = self.rng.randrange(8)
            self._wait(process, lambda: log.exists() and log.stat().st_mtime > began and log.stat().st_size, lines)
            process.join(self.rng.uniform(0, 0.5 if lines else 8))
        if process.is_alive():
            os.kill(process.pid, self.number)
        process.join(PATIENCE)
        if process.exitcode == 0:
            return False
        if process.exitcode == 128 + signal.SIGTERM:  # what it was told at has been saved
            step = re.findall(r"stopped at step (\d+);", printed(workdir))[-1]
            assert (workdir / "checkpoints" / step).is_dir()
        self.count += 1
        self.while_saving += unfinished(workdir, began)
        return True

    def _wait(self, process, read, times):
        """Wait until what is read has changed to something true so often, or the process has ended."""
        before = None
        while times and process.is_alive():
            time.sleep(0.002)
            now = read()
            times -= bool(now) and now != before
            before = now


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 4), (signal.SIGTERM, 2)])
def test_a_run_that_is_ended_again_and_again_has_the_bits_of_one_that_never_was(runs, number, times):
    times = int(os.environ.get("STOPS") or times)  # each costs a start; 20 are for trying by hand
    stopper, codes, name = Stopper(number, seed=0), [], None
    while stopper.count < times:
        name = f"stopped_{int(number)}_{stopper.count}"
        while stopper.count < times:
            process = runs.start(name)
            if not stopper.stop(process, runs.folder / name):
                break
            codes.append(process.exitcode)
        runs.assert_as_if_never_ended(name)
    print(f"signal {int(number)} sent {times} times, {stopper.while_saving} while saving; exit codes {sorted(codes)}")
    if number == signal.SIGKILL:
        assert stopper.while_saving
        assert set(codes) == {-signal.SIGKILL}
    else:  # where training has not begun there is nothing to save, and SIGTERM ends it as it ends any process
        assert {128 + signal.SIGTERM} <= set(codes) <= {128 + signal.SIGTERM, -signal.SIGTERM}


@pytest.mark.slow
def test_a_disk_that_refuses_ends_a_run_in_a_sentence_that_goes_on_when_it_no_longer_does(runs):
    workdir = runs.folder / "refused"
    process = runs.start_up_to("refused", 6)
    # Like a full disk: no file can grow beyond this, which what is printed does not reach.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    process.join(PATIENCE)
    assert process.exitcode == 1, printed(workdir)[-3000:]
    (error,) = [line for line in printed(workdir).splitlines() if "error: " in line]
    assert "cannot be written (File too large); make room" in error
    assert "Traceback" not in printed(workdir)
    runs.assert_as_if_never_ended("refused")
    assert "resuming at step 6 of" in printed(workdir)
    assert "options that changed" not in printed(workdir)


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_put_aside_and_the_one_before_is_read(runs):
    workdir = runs.folder / "cut_off"
    process = runs.start_up_to("cut_off", 9)
    process.kill()
    process.join()
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    for path in (workdir / "checkpoints" / str(newest) / "training").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            os.truncate(path, path.stat().st_size // 2)
    (workdir / "checkpoints" / "50.orbax-checkpoint-tmp").mkdir()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    runs.assert_as_if_never_ended("cut_off")
    assert f"checkpoints/{newest} cannot be read" in printed(workdir)
    assert f"renaming it to unreadable_{newest}" in printed(workdir)
    assert (workdir / "checkpoints" / f"unreadable_{newest}").is_dir()
