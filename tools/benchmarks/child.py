"""Measurements in a fresh process: what it takes to start, to compile, and how much memory is needed."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from maskrcnn_jax.errors import UserError
from tools.benchmarks.inputs import Settings
from tools.benchmarks.timing import ROOT


def run_child(target: str, settings: Settings, *arguments, environment: Mapping[str, str] | None = None) -> dict:
    """Call a function in a new process.

    Args:
        target: "module:function" of this package; the function takes the settings and the arguments as strings.
        settings: passed on.
        arguments: passed on.
        environment: variables to set.

    Returns:
        The dictionary that the function returns.

    Raises:
        UserError: if it fails.
    """
    command = [sys.executable, "-m", "tools.benchmarks.child", target, json.dumps(dataclasses.asdict(settings))]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the process that measures {target} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory() -> float:
    """Return the largest resident memory that this process has had, in MB of 10^6 bytes."""
    # Not getrusage's ru_maxrss: Linux lets a process inherit that of the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise UserError("this system does not tell the peak memory of a process")


def main() -> None:
    target, settings, *arguments = sys.argv[1:]
    module, _, function = target.partition(":")
    call = getattr(importlib.import_module(f"tools.benchmarks.{module}"), function)
    print(json.dumps(call(Settings(**json.loads(settings)), *arguments)))


if __name__ == "__main__":
    main()
