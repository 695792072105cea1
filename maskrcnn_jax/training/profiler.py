"""A trace of a few steps of a training, by jax.profiler."""

import logging
import os
from pathlib import Path

import jax

_log = logging.getLogger(__name__)
_FIRST = 3  # step of a start: the first compiles, and the second still waits for what was compiled


class Profiler:
    """Traces the steps of one start of a training; each process writes what its own devices do."""

    def __init__(self, workdir: str | os.PathLike, num_steps: int):
        """Prepare.

        Args:
            workdir: Folder of the run; the trace goes into its folder ``profile``.
            num_steps: Steps to trace, from the third on; 0 traces nothing.
        """
        self._folder, self._num_steps, self._is_tracing = Path(workdir) / "profile", num_steps, False

    def before_step(self, number: int) -> None:
        """Start the trace where it is due.

        Args:
            number: of the step, 1 for the first of this start.
        """
        if self._num_steps and number == _FIRST:
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True

    def after_step(self, number: int, results) -> None:
        """End the trace after its last step.

        Args:
            number: as of ``before_step``.
            results: arrays that the step computes, for which the end waits.
        """
        if self._is_tracing and number == _FIRST + self._num_steps - 1:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """End a trace that is still going on: the training ended before."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
            _log.info("wrote the trace of %d steps into %s", self._num_steps, self._folder)
