"""Run train.py, go on where it was interrupted, and keep of each finished run what the report needs."""

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.writing import write_json
from tools.benchmarks.timing import environment
from tools.paper.experiments import Run

ROOT = Path(__file__).resolve().parents[2]
RESULT = "result.json"
_KEPT = ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50", "segm_AP75")  # of an evaluation
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def train(run: Run, output: Path, *, coco_dir: str, weights: str) -> dict:
    """Do a training, or the rest of one, unless it is finished.

    Args:
        run: which.
        output: folder of all runs; this one has a folder of its own below it.
        coco_dir: dataset.
        weights: of the backbone to start from; empty for none.

    Returns:
        The result, also written to result.json in the folder of the run.

    Raises:
        UserError: when train.py fails, which has said why.
    """
    workdir = output / run.name
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".tool_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the same training may be wanted by a command that runs beside this one
        if (workdir / RESULT).is_file():
            return json.loads((workdir / RESULT).read_text())
        return _train(run, workdir, coco_dir, weights)


def _train(run: Run, workdir: Path, coco_dir: str, weights: str) -> dict:
    command = [sys.executable, "train.py", *run.arguments, f"--config.data.coco_dir={coco_dir}"]
    command += [f"--workdir={workdir}"] + ([f"--weights={weights}"] if weights else [])
    started = time.time()
    status = _run(command)
    if status:
        raise UserError(f"training {run.name} ended with status {status}; the same command goes on from there")
    result = {
        "run": run.name,
        "command": shlex.join(["python", *map(_without_folder, command[1:])]),
        "seconds": time.time() - started,  # of the last part, where it was interrupted
        **environment(),
        **_summarise(workdir),
    }
    write_json(workdir / RESULT, result, indent=1)
    return result


def _without_folder(argument: str) -> str:
    """Return an argument of a command, an absolute path as its name: its folder means nothing on other machines."""
    option, equals, value = argument.partition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def _run(command: list[str]) -> int:
    """Run a training and return its status; a signal to stop is left to it, so that it saves what it has."""
    # The environment of a result is asked of JAX, which must not take the memory of a GPU from the trainings for it.
    environment_of_child = {name: value for name, value in os.environ.items() if name != PREALLOCATE}
    os.environ[PREALLOCATE] = "false"
    process = subprocess.Popen(command, cwd=ROOT, env=environment_of_child)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to both
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)


def _summarise(workdir: Path) -> dict:
    """Return what training logged: the losses of the epochs, a curve with a point per evaluation, the last values."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    curve, since = [], 0
    for line in lines:
        if "segm_AP" not in line:
            continue
        epoch_steps = [s for s in steps if since < s["step"] <= line["step"]]
        values = {name: value for name, value in line.items() if _is_kept(name)}
        curve.append(
            {
                "epoch": epoch_steps[-1]["epoch"],
                "loss": sum(s["loss"] for s in epoch_steps) / len(epoch_steps),
                **values,
            }
        )
        since = line["step"]
    by_epoch: dict[int, list[float]] = {}
    for step in steps:
        by_epoch.setdefault(math.ceil(step["epoch"]), []).append(step["loss"])
    return {
        "steps": steps[-1]["step"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "lr": [steps[0]["lr"], max(s["lr"] for s in steps), steps[-1]["lr"]],
        "losses": [sum(losses) / len(losses) for losses in by_epoch.values()],
        "curve": curve,
    }


def _is_kept(name: str) -> bool:
    losses = ("accuracy", "accuracy_foreground", "train_loss", "eval_loss")
    return name.removeprefix("train_") in _KEPT or name.endswith(losses)
