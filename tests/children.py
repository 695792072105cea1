"""Child processes of tests, and what is waited for: with patience, and without a process that is left behind."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

# Seconds. On a busy machine everything takes many times as long; what hangs is ended by the limit of the whole run.
PATIENCE = 3000

# An option of XLA that nearly halves the time of compiling, for programs that run up to twice as long.
QUICK_XLA = "--xla_cpu_use_fusion_emitters=false"

# Processes of the standard library that serve every test of this process.
_SERVERS = (b"multiprocessing.forkserver", b"multiprocessing.resource_tracker")


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something holds that another thread or process brings about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def children() -> set[int]:
    """Return the ids of the child processes of this process."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(pid) for pid in path.read_text().split()}
    return found


def kill_children(spared: set[int]) -> None:
    """Kill the child processes of this process, except those that are spared."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    for pid in children() - spared:
        if not any(server in Path(f"/proc/{pid}/cmdline").read_bytes() for server in _SERVERS):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
