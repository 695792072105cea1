"""Numbers about a running service in the text format of Prometheus.

Counters, gauges and histograms of a few names need no client library. All are changed from several threads.
"""

import bisect
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of values up to each of some bounds, with their sum.

    Attributes:
        total: Sum of all values.
    """

    def __init__(self, bounds: Sequence[float]):
        """Start at zero.

        Args:
            bounds: Upper bounds, ascending; values above the last are counted under ``+Inf``.
        """
        self._bounds, self._counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count a value."""
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
            self.total += value

    def lines(self, name: str) -> list[str]:
        """Return the samples: cumulative counts, sum and count."""
        with self._lock:
            counts, total = list(self._counts), self.total
        rows, below = [], 0
        for bound, count in zip((*self._bounds, "+Inf"), counts, strict=True):
            below += count
            rows.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*rows, f"{name}_sum {total:.6f}", f"{name}_count {below}"]


class Metrics:
    """The metrics of one service.

    Attributes:
        request_seconds: Time from the headers of a request for a prediction to its answer.
        batch_sizes: Images that were computed together.
        batch_seconds: Time to compute one batch.
    """

    def __init__(self, max_batch: int):
        """Start at zero.

        Args:
            max_batch: The largest batch, a power of two.
        """
        self.request_seconds, self.batch_seconds = Histogram(_SECONDS), Histogram(_SECONDS)
        self.batch_sizes = Histogram([1 << power for power in range(max_batch.bit_length())])
        self._requests: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def seconds_per_image(self) -> float:
        """Return how long an image has taken on average; 0 before the first."""
        return self.batch_seconds.total / max(self.batch_sizes.total, 1)

    def count_request(self, path: str, code: int) -> None:
        """Count an answered request.

        Args:
            path: One of few, because each is kept.
            code: HTTP status of the answer.
        """
        with self._lock:
            self._requests[path, code] += 1

    def render(self, *, queue_length: int, in_work: int) -> str:
        """Return the text of ``/metrics``.

        Args:
            queue_length: Images that wait to be computed.
            in_work: Requests for predictions that have not been answered.
        """
        with self._lock:
            requests = sorted(self._requests.items())
        counted = [f'{{path="{path}",code="{code}"}} {count}' for (path, code), count in requests]
        parts = [
            ("requests_total", "counter", "Answered requests.", [f"maskrcnn_requests_total{row}" for row in counted]),
            ("queue_length", "gauge", "Images that wait.", [f"maskrcnn_queue_length {queue_length}"]),
            ("requests_in_work", "gauge", "Predictions asked for.", [f"maskrcnn_requests_in_work {in_work}"]),
            (
                "resident_memory_bytes",
                "gauge",
                "Memory of the process.",
                [f"maskrcnn_resident_memory_bytes {_memory()}"],
            ),
        ]
        for name, histogram, meaning in (
            ("request_seconds", self.request_seconds, "Time of requests for predictions."),
            ("batch_size", self.batch_sizes, "Images computed together."),
            ("batch_seconds", self.batch_seconds, "Time to compute a batch."),
        ):
            parts.append((name, "histogram", meaning, histogram.lines(f"maskrcnn_{name}")))
        lines = []
        for name, kind, meaning, samples in parts:
            lines += [f"# HELP maskrcnn_{name} {meaning}", f"# TYPE maskrcnn_{name} {kind}", *samples]
        return "\n".join(lines) + "\n"


def _memory() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
