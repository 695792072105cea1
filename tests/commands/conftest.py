"""Commands as a user types them, in this process or in one of their own."""

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from maskrcnn_jax.data.shapes import write_dataset
from tests.children import PATIENCE, QUICK_XLA

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A dataset of 5 images to train and 3 to evaluate on."""
    folder = tmp_path_factory.mktemp("shapes")
    write_dataset(folder, num_train=5, num_val=3, image_size=64, seed=1)
    return folder


@pytest.fixture
def terminal(monkeypatch):
    """What a command changes in its process, as it is at the start and afterwards again."""
    logger = logging.getLogger("maskrcnn_jax")
    level = logger.level
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    for name in ("absl", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "that of the tests")
    yield
    logger.setLevel(level)


@pytest.fixture
def refusal(terminal, monkeypatch, tmp_path, capsys):
    """Run a script of this checkout, which must refuse; returns the one line with which it does."""
    monkeypatch.chdir(tmp_path)

    def refusal(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert left.value.code == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return refusal


@pytest.fixture
def run(tmp_path):
    """Run a script of this checkout in an empty folder and a process of its own."""

    def run(script, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_XLA}
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=PATIENCE)

    return run
