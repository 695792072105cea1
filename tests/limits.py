"""Limits of CPU time that hold on a busy machine, in a process that other tests have filled with objects."""

import contextlib
import gc
import time
from collections.abc import Iterator


@contextlib.contextmanager
def cpu_time_below(seconds: float) -> Iterator[None]:
    """Fail if the block takes more CPU time than this, not counting other threads and processes.

    Existing objects are hidden from the garbage collector. In a process of several gigabytes, walking through them
    takes longer than what is measured.
    """
    gc.freeze()
    start = time.thread_time()
    try:
        yield
        taken = time.thread_time() - start
    finally:
        gc.unfreeze()
    assert taken < seconds
