"""Limits of CPU time that hold on a busy machine, in a process that other tests have filled with objects."""

import contextlib
import gc
import time
from collections.abc import Iterator


@contextlib.contextmanager
def cpu_time_below(seconds: float) -> Iterator[None]:
    """Fail if the block takes more CPU time than this, that of other threads and processes aside.

    The garbage collector passes over the objects that exist already: in a process of gigabytes, walking through them
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
