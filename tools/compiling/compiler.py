"""Runs XLA for a target in a child process and takes what it writes: the optimized program and its memory."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from maskrcnn_jax.errors import UserError
from tools.compiling.targets import Target

ROOT = Path(__file__).resolve().parent.parent.parent
_SILENCE = {  # libtpu would ask the metadata server of a Cloud TPU about these
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


class Compiled(NamedTuple):
    """What XLA has written about a program."""

    text: str  # the optimized program
    buffers: str  # where each value lies in memory
    live_ranges: str  # which values there are when memory is fullest; "" if not written
    code_bytes: int | None  # of the machine code; None if it was not generated
    refused: bool  # for want of memory


def check_installed(target: Target) -> None:
    """Check that the compiler for a target is there.

    Raises:
        UserError: if it is not; says what to install.
    """
    package, extra = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda12_plugin", "cuda12")}[target.chip.platform]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{target} needs {package}, which is not installed; no such device is needed, only its compiler: "
            f'pip install "jax[{extra}]=={jax.__version__}"'
        )


def compile_program(settings: dict, target: Target, folder: Path, *, full: bool) -> Compiled:
    """Compile in a child process.

    Args:
        settings: What to compile, for tools.compiling.child.
        target: What to compile for.
        folder: An empty one, for the files that XLA writes.
        full: Compile to the end, instead of stopping before machine code is generated, which takes most of the time.

    Raises:
        UserError: if the program cannot be compiled.
    """
    command = [sys.executable, "-m", "tools.compiling.child", json.dumps(settings), str(folder)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | _SILENCE | {"PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None and (full or not _is_assigned(folder)):
                time.sleep(0.2)
        finally:
            stopped = process.poll() is None
            if stopped:
                process.kill()
            process.wait()
    return _read(folder, failed=not stopped and process.returncode != 0)


def _is_assigned(folder: Path) -> bool:
    """Return whether XLA has written where values lie in memory and gone on, so that these files are complete.

    On TPUs it writes the program again, on GPUs it begins with LLVM's code.
    """
    return any(folder.glob("*after_buffer_assignment.txt")) or any(folder.glob("*.ll"))


def _read(folder: Path, *, failed: bool) -> Compiled:
    log = (folder / "log").read_text()
    refused = failed and "RESOURCE_EXHAUSTED" in log
    if failed and not refused:
        raise UserError(f"this cannot be compiled: {log.strip().splitlines()[-1]}")

    def text(pattern: str) -> str:
        return "".join(path.read_text() for path in folder.glob(pattern))

    code = folder / "code_bytes"
    return Compiled(
        text("*after_optimizations.txt"),
        text("*after_optimizations-buffer-assignment.txt"),
        text("*live-range.txt"),
        int(code.read_text()) if code.exists() else None,
        refused,
    )
