"""Load a service with several clients: python tools/load_service.py --workdir=RUN --images=DIR [--max_batch=1,8].

For each size of batches, starts ``maskrcnn-jax serve``, lets every client send one image after another, and prints the
throughput, the latency that clients see, the mean batch, and the memory of the service in the course of the time.
"""

import argparse
import contextlib
import dataclasses
import http.client
import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

import numpy as np

from maskrcnn_jax.commands.app import add_model_options, at_least, comma_separated, run_command
from maskrcnn_jax.commands.serve import power_of_two
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.media import list_images
from maskrcnn_jax.writing import write_json

_MODEL = ("workdir", "checkpoint", "weights", "config", "categories")


@dataclasses.dataclass
class Load:
    """What the clients saw of one service."""

    max_batch: int
    images_per_second: float
    p50: float  # seconds
    p95: float
    mean_batch: float
    errors: int
    memory: list[float]  # MB at 20 equal steps of the time

    def line(self) -> str:
        """Return a row of the table."""
        start, end = np.mean(self.memory[5:10]), np.mean(self.memory[-5:])
        return (
            f"{self.max_batch:9d} {self.images_per_second:9.2f} {self.p50 * 1000:8.0f} {self.p95 * 1000:8.0f} "
            f"{self.mean_batch:10.2f} {self.errors:6d} {start:12.0f} {end:10.0f}"
        )


HEADER = "max_batch  images/s   p50 ms   p95 ms mean batch errors  MB from 1/4      MB end"


def load_service(port: int, files: Sequence[bytes], *, clients: int, seconds: float, max_batch: int) -> Load:
    """Let clients send images to a service.

    Args:
        port: On this computer.
        files: Contents of images; the clients send them in turns.
        clients: Each sends its next image when it has the answer to the last.
        seconds: How long.
        max_batch: Of the service.
    """
    latencies: list[float] = []
    errors: list[str] = []
    turns, before = itertools.count(), _metrics(port)
    end = time.monotonic() + seconds

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        with contextlib.closing(connection):
            while (start := time.monotonic()) < end:
                connection.request("POST", "/predict", files[next(turns) % len(files)])
                response = connection.getresponse()
                content = response.read()
                latencies.append(time.monotonic() - start)
                if response.status != 200:
                    errors.append(content.decode())

    threads = [threading.Thread(target=send) for _ in range(clients)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    memory = []
    for _ in range(20):
        time.sleep(seconds / 20)
        memory.append(_metrics(port)["resident_memory_bytes"] / 1e6)
    for thread in threads:
        thread.join()
    elapsed, after = time.monotonic() - start, _metrics(port)
    images, batches = (after[f"batch_size_{name}"] - before[f"batch_size_{name}"] for name in ("sum", "count"))
    p50, p95 = np.quantile(latencies, [0.5, 0.95])
    for message in errors[:3]:
        print(message, file=sys.stderr)
    rate = (len(latencies) - len(errors)) / elapsed
    return Load(max_batch, rate, float(p50), float(p95), images / max(batches, 1), len(errors), memory)


def _metrics(port: int) -> dict[str, float]:
    """Return the metrics that have no labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return {name: float(value) for name, value in re.findall(r"^maskrcnn_(\w+) (\S+)$", text, re.MULTILINE)}


@contextlib.contextmanager
def started(arguments: Sequence[str]) -> Iterator[int]:
    """Start a service; yields its port.

    Raises:
        UserError: it ends before it listens.
    """
    command = [sys.executable, "-m", "maskrcnn_jax.commands.main", "serve", "--port=0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"listening on http://.*:(\d+)$", line):
                    yield int(found[1])
                    return
            raise UserError("the service ended before it listened; what it said is above")
        finally:
            process.terminate()
            process.communicate()  # its last words have a reader


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    add_model_options(parser)
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of images to send")
    parser.add_argument("--clients", type=at_least(1), default=8, metavar="N", help="clients; %(default)s")
    parser.add_argument("--seconds", type=at_least(1), default=180, metavar="N", help="for each size; %(default)s")
    parser.add_argument(
        "--max_batch", type=_batches, default=[1, 8], metavar="N,N", help="sizes of batches, such as 1,8"
    )
    parser.add_argument("--json", metavar="FILE", help="file for all rows")


def _batches(text: str) -> list[int]:
    return [power_of_two(part) for part in comma_separated(text)]


def main(options: argparse.Namespace) -> None:
    """Load a service of each size of batches."""
    files = [Path(path).read_bytes() for path in list_images(options.images)]
    given = [f"--{name}={value}" for name in _MODEL if (value := getattr(options, name)) is not None]
    rows = []
    for max_batch in options.max_batch:
        with started([*given, f"--max_batch={max_batch}"]) as port:
            for file in files[:20]:  # the first images find threads and caches cold
                load_service(port, [file], clients=1, seconds=0.05, max_batch=max_batch)
            row = load_service(port, files, clients=options.clients, seconds=options.seconds, max_batch=max_batch)
        rows.append(row)
        print("\n".join([HEADER, *(row.line() for row in rows)]), flush=True)
    if options.json:
        write_json(options.json, [dataclasses.asdict(row) for row in rows], indent=1)


if __name__ == "__main__":
    run_command(sys.modules[__name__])
