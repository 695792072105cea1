"""The package as pip installs it, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import pytest

from tests.children import QUICK_XLA

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "maskrcnn_jax", "configs")


@pytest.mark.slow
def test_every_command_and_function_works_in_an_empty_folder(tmp_path):
    source, installed, empty = (tmp_path / name for name in ("source", "installed", "empty"))
    source.mkdir()  # a copy, as building writes beside what it builds
    empty.mkdir()
    for name in FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        else:
            shutil.copy(ROOT / name, source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--ignore-installed", f"--prefix={installed}", source], check=True)
    paths = {
        name: sysconfig.get_path(name, "posix_prefix", {"base": str(installed)}) for name in ("purelib", "scripts")
    }
    environment = os.environ | {
        "PYTHONPATH": paths["purelib"],
        "PATH": f"{paths['scripts']}{os.pathsep}{os.environ['PATH']}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK_XLA,
    }
    walk = [sys.executable, Path(__file__).with_name("walk.py"), paths["purelib"]]
    done = subprocess.run(walk, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
