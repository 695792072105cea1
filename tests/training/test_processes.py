"""Trainings on several devices and in several processes, by train.py itself, beside that of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from maskrcnn_jax.config import load_config
from tests.children import PATIENCE, QUICK_XLA
from tests.training.saved import saved_arrays

ROOT = Path(__file__).parents[2]
STEPS = 5


def arguments(config):
    """Return what differs from configs/shapes.py, as options."""
    changed, options = config.to_dict(), []
    usual = load_config("shapes").to_dict()
    for part in (None, "model", "data", "optim"):
        ours, theirs = (changed[part], usual[part]) if part else (changed, usual)
        prefix = f"{part}." if part else ""
        for name, value in ours.items():
            if not isinstance(value, dict) and value != theirs[name]:
                options.append(f"--config.{prefix}{name}={value}")
    return ["--config=configs/shapes.py", *options]


def start(command, workdir, *, processes=1, devices=1, float64=False):
    """Start a command as so many processes, each with so many simulated devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_XLA}",
        "JAX_ENABLE_X64": str(int(float64)),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    started = []
    for process in range(processes):
        several = [
            f"--coordinator_address=localhost:{port}",
            f"--num_processes={processes}",
            f"--process_id={process}",
        ]
        started.append(
            subprocess.Popen(
                [sys.executable, *command, f"--workdir={workdir}", *(several if processes > 1 else [])],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started, status=0):
    """Wait for processes and return what the first one printed."""
    outputs = [process.communicate(timeout=PATIENCE) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == status, errors[-3000:]
    assert not any("starting" in out for out, _ in outputs[1:]), "only the first process prints"
    return outputs[0][0]


def result(workdir):
    """Return the logged losses and every saved array by name."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return losses, saved_arrays(workdir, STEPS)


@pytest.fixture
def run(config, tmp_path):
    def run(name, float64=False, processes=1, devices=1, **changes):
        config.max_steps, config.log_every, config.eval_every, config.epochs = STEPS, 1, 0, 10
        config.optim.warmup_steps, config.optim.backbone_lr_factor = 0, 0.5
        config.model.dtype = "float64" if float64 else "float32"
        config.update(changes)
        workdir = tmp_path / name
        finish(start(["train.py", *arguments(config)], workdir, processes=processes, devices=devices, float64=float64))
        return result(workdir)

    return run


def assert_same(ours, reference, tolerance):
    (losses, arrays), (expected_losses, expected) = ours, reference
    assert len(expected_losses) == STEPS and len(set(expected_losses)) == STEPS
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        scale = max(np.abs(array).max(initial=0), 1e-3)
        assert np.abs(arrays[name] - array).max(initial=0) <= tolerance * scale, name


@pytest.mark.slow
def test_two_and_four_processes_train_as_one_device(run):
    reference = run("one", float64=True)
    assert_same(run("two", float64=True, processes=2, shard_params=True), reference, 1e-10)
    assert_same(run("four", float64=True, processes=4), reference, 1e-10)
