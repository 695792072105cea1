"""The command, in a process of its own: what it refuses, and how it stops."""

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from maskrcnn_jax.commands import serve
from maskrcnn_jax.commands.app import parse
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.serving import app, server
from maskrcnn_jax.serving.server import bind, listen
from tests.children import PATIENCE, wait_until
from tests.serving.service import ColourPredictor, Running, draw_regions, encoded

ROOT = Path(__file__).parents[2]
# The command with a model that finds colours, but waits while there is a file.
SCRIPT = """
import sys
import time
from pathlib import Path
from maskrcnn_jax.commands import serve
from maskrcnn_jax.commands.app import run_command
from tests.serving.service import ColourPredictor

class Held(ColourPredictor):
    def _detect(self, images, sizes):
        while Path(sys.argv[1]).exists():
            time.sleep(0.01)
        return super()._detect(images, sizes)

serve.load = lambda options: Held()
run_command(serve, sys.argv[2:])
"""


@contextlib.contextmanager
def started(hold: Path):
    """Run the command until it listens; yields its process and the service. The model waits while ``hold`` exists."""
    command = [sys.executable, "-c", SCRIPT, hold, "--workdir=.", "--port=0", "--max_batch=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            while "listening on" not in (line := process.stdout.readline()):
                assert line, "it ended"
            assert "http://127.0.0.1:" in line, "reachable from elsewhere"
            yield process, Running(int(line.rpartition(":")[2]), None)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_service_answers_what_is_in_its_queue(number, tmp_path):
    hold = tmp_path / "hold"
    with concurrent.futures.ThreadPoolExecutor(4) as pool, started(hold) as (process, service):
        hold.touch()
        waiting = [pool.submit(service.predict, encoded(draw_regions())) for _ in range(4)]
        wait_until(lambda: b"maskrcnn_requests_in_work 4" in service.ask("GET", "/metrics")[1])
        process.send_signal(number)
        hold.unlink()
        answers = [future.result() for future in waiting]
        assert [code for code, _ in answers] == [200] * 4
        assert all(len(answer["detections"]) == 2 for _, answer in answers)
        assert process.wait(timeout=PATIENCE) == 0
        assert "Traceback" not in process.stdout.read()
        with pytest.raises(ConnectionError):
            service.ask("GET", "/health")


def test_a_port_that_is_taken_is_an_error_before_the_model_is_compiled(monkeypatch):
    monkeypatch.setattr(serve, "load", lambda options: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = parse(serve, ["--workdir=.", f"--port={taken.getsockname()[1]}"])
        with pytest.raises(UserError, match="--port"):
            serve.main(options)
    with pytest.raises(UserError, match="--host"):
        serve.main(parse(serve, ["--workdir=.", "--host=no.such.host.invalid"]))


def test_two_services_cannot_reserve_one_port():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} .*in use.*--port"):
            bind("127.0.0.1", port)
        listen(first)
        with socket.create_connection(("127.0.0.1", port)):
            first.accept()[0].close()  # for a minute the system keeps what is left of the connection
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("a" * 64, 0), ("", 0)])
def test_addresses_that_do_not_exist_are_refused(host, port):
    with pytest.raises(UserError, match="--port"):
        bind(host, port)


def test_only_a_local_service_minds_how_it_is_called(monkeypatch):
    def names_of(*arguments):
        monkeypatch.setattr(serve, "load", lambda options: ColourPredictor())
        given = []
        monkeypatch.setattr(app, "create_app", lambda service, *, names: given.append(names) or service.close())
        monkeypatch.setattr(server, "listen", lambda listener: None)
        monkeypatch.setattr(server.uvicorn.Server, "run", lambda *arguments, **options: None)
        monkeypatch.setattr(signal, "signal", lambda *arguments: None)
        serve.main(parse(serve, ["--workdir=.", "--port=0", *arguments]))
        return given[0]

    assert names_of() == []
    assert names_of("--host=::1", "--public_names=A.example,b") == ["a.example", "b"]
    assert names_of("--host=0.0.0.0") is None


@pytest.mark.parametrize("argument", ["--max_batch=3", "--max_batch=0", "--max_queue=0", "--timeout=0", "--port=-1"])
def test_limits_without_sense_are_refused(argument):
    with pytest.raises(UserError, match=argument.partition("=")[2]):
        parse(serve, ["--workdir=.", argument])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "maskrcnn_jax.serving.server", raising=False)
    with pytest.raises(UserError, match=r'uvicorn is not installed.*pip install "\.\[serve\]"'):
        serve.main(parse(serve, ["--workdir=."]))
