"""Ctrl-C and SIGTERM as requests to save and stop."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a request to save and stop after the current step; a second one stops at once.

    Several processes must stop after the same step, whichever of them gets the signal. JAX's preemption service, which
    handles SIGTERM itself, makes them agree; Ctrl-C is passed on to it.
    """

    def __enter__(self) -> "StopSignals":
        self.requested = 0
        caught = [signal.SIGINT, signal.SIGTERM] if jax.process_count() == 1 else [signal.SIGINT]
        if threading.current_thread() is not threading.main_thread():
            caught = []  # Python refuses handlers there
        self._previous = {number: signal.signal(number, self._request) for number in caught}
        return self

    def agree(self, call: int) -> None:
        """Learn whether any of several processes was asked to stop.

        Args:
            call: 1, 2, ... for the calls after each step, which all processes make. It is not the step itself:
                processes that get the signal before their first call agree on 1, which a resumed run never reaches.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(call):
            self.requested = int(signal.SIGTERM)

    def _request(self, number, _) -> None:
        signal.signal(number, self._previous[number])
        if jax.process_count() == 1:
            self.requested = int(number)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
