"""Commands as a user types them, in this process or in one of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskrcnn_jax.data.shapes import write_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A dataset of 5 images to train and 3 to evaluate on."""
    folder = tmp_path_factory.mktemp("shapes")
    write_dataset(folder, num_train=5, num_val=3, image_size=64, seed=1)
    return folder


@pytest.fixture
def run(tmp_path, quick_compilation):
    """Run a script of this checkout in an empty folder."""

    def run(script, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)

    return run


@pytest.fixture
def refusal(run):
    """Run a script that must refuse; returns the one line with which it did."""

    def refusal(script, *arguments):
        result = run(script, *arguments)
        assert result.returncode == 1, result.stderr[-2000:]
        assert "Traceback" not in result.stderr
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        return line

    return refusal
