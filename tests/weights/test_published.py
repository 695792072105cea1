"""Named weights are downloaded once, checked and kept; a download that fails leaves nothing and says what to do."""

import contextlib
import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pytest

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.weights import published
from maskrcnn_jax.weights.published import PUBLISHED, Published, resolve

CONTENT = bytes(range(256)) * 9000  # more than two chunks
NAMES = ("torchvision:tiny", "detectron2:tiny")


class Server:
    """A server of files on this machine that counts what it is asked for, by path."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sent: float = 1.0  # the part of a file after which the connection is closed
        self.length_known = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                if self.path not in server.files:
                    self.send_error(404)
                    return
                content = server.files[self.path]
                self.send_response(200)
                if server.length_known:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(content[: int(server.sent * len(content))])

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def stop(self):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Folder of the downloaded files."""
    monkeypatch.setenv("MASKRCNN_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(published, "_RETRIES", 0)
    return tmp_path / "weights"


@pytest.fixture
def server(monkeypatch):
    """Serve CONTENT under both of NAMES, each with the digest of its family."""
    server = Server()
    sha256, md5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()
    for name, path, digest in [
        ("torchvision:tiny", f"/tiny-{sha256[:8]}.pth", f"sha256:{sha256[:8]}"),
        ("detectron2:tiny", f"/tiny_1x/123/model_final_{md5[:6]}.pkl", f"md5:{md5[:6]}"),
    ]:
        monkeypatch.setitem(PUBLISHED, name, Published(server.url + path, digest))
        server.files[path] = CONTENT
    yield server
    server.stop()


def file_name(name):
    return PUBLISHED[name].url.rpartition("/")[2]


@pytest.mark.parametrize("length_known", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_named_weights_are_downloaded_once(server, cache, name, length_known):
    server.length_known = length_known
    for _ in range(2):
        path = resolve(name)
        assert path == cache / file_name(name)
        assert path.read_bytes() == CONTENT
        assert len(server.requests) == 1
    assert list(cache.iterdir()) == [path]


def test_others_can_read_a_downloaded_file(server):
    path = resolve("torchvision:tiny")
    usual = path.with_name("usual")
    usual.touch()
    assert path.stat().st_mode == usual.stat().st_mode


def test_a_path_is_returned_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.create", None)
    for path in ("a.pth", "resnet18", "some:where/a.pth", "torchvision", tmp_path / "absent.pkl"):
        assert resolve(path) == Path(path)
    assert resolve("~/a.pth") == Path.home() / "a.pth"


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("torchvision:resnet50_v3", "torchvision:resnet50_v2"),
        ("detectron2:mask_rcnn_R_101_FPN", "detectron2:mask_rcnn_R_101_FPN_3x"),
        ("detectron2:", "detectron2:mask_rcnn_R_"),
        ("torchvision:/etc/passwd", "torchvision:"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_with_the_closest_first(name, closest):
    with pytest.raises(UserError, match=f"no weights named {name}; give a path or one of {closest}") as caught:
        resolve(name)
    assert all(known in str(caught.value) for known in PUBLISHED)


def test_files_are_kept_in_the_home_folder_by_default(server, tmp_path, monkeypatch):
    monkeypatch.delenv("MASKRCNN_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / ".cache" / "maskrcnn_jax" / "weights" / file_name("torchvision:tiny")
    assert resolve("torchvision:tiny") == path
    assert path.is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_another_digest_is_deleted(server, cache, name):
    algorithm, _, wanted = PUBLISHED[name].digest.partition(":")
    server.files = dict.fromkeys(server.files, CONTENT[:-1] + b"x")
    with pytest.raises(UserError, match=rf"its {algorithm} begins with \w+ instead of {wanted}.*put it at this path"):
        resolve(name)
    assert not list(cache.iterdir())
    server.files = dict.fromkeys(server.files, CONTENT)
    assert resolve(name).read_bytes() == CONTENT


def test_a_kept_file_with_another_digest_is_not_used(server, cache):
    cache.mkdir()
    kept = cache / file_name("torchvision:tiny")
    kept.write_bytes(CONTENT[:1000])  # such as a download by hand that was cut short
    with pytest.raises(UserError, match="is not the published file.*delete it to download it again"):
        resolve("torchvision:tiny")
    assert kept.is_file() and not server.requests
    kept.write_bytes(CONTENT)
    assert resolve("torchvision:tiny") == kept
    assert not server.requests


@pytest.mark.parametrize("length_known", [True, False])
@pytest.mark.parametrize("sent", [0.0, 0.6])
def test_a_connection_that_closes_early_leaves_nothing(server, cache, sent, length_known):
    server.sent, server.length_known = sent, length_known
    count = int(sent * len(CONTENT))
    message = f"{count} bytes read, {len(CONTENT) - count} more expected" if length_known else "not the published file"
    with pytest.raises(UserError, match=message):
        resolve("torchvision:tiny")
    assert not list(cache.iterdir())


def test_a_download_that_fails_is_tried_again(server, cache, monkeypatch):
    monkeypatch.setattr(published, "_RETRIES", 2)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        server.sent = 1.0 if len(waits) == 2 else 0.5

    monkeypatch.setattr("time.sleep", wait)
    server.sent = 0.5
    assert resolve("torchvision:tiny").read_bytes() == CONTENT
    assert len(server.requests) == 3 and len(waits) == 2


def test_an_interrupt_leaves_nothing(server, cache, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("http.client.HTTPResponse.read", interrupt)
    monkeypatch.setattr("http.client.HTTPResponse.readinto", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("torchvision:tiny")
    assert not list(cache.iterdir())


def assert_tells_how_to_go_on(caught, name, cache):
    message = str(caught.value)
    assert f"download {PUBLISHED[name].url} to {cache / file_name(name)}: " in message
    assert "put it at this path" in message and len(message.splitlines()) == 1
    assert not list(cache.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_reported_with_its_address(server, cache, name):
    server.files = {}
    with pytest.raises(UserError, match="404 Not Found") as caught:
        resolve(name)
    assert_tells_how_to_go_on(caught, name, cache)


def publish_at(monkeypatch, listener):
    """Let the weights torchvision:elsewhere lie on what listens at a socket."""
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/elsewhere-00000000.pth"
    monkeypatch.setitem(PUBLISHED, "torchvision:elsewhere", Published(url, "sha256:00000000"))


def test_without_a_network_the_address_and_the_place_are_named(cache, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        publish_at(monkeypatch, unused)
        with pytest.raises(UserError, match="Connection refused") as caught:
            resolve("torchvision:elsewhere")
    assert_tells_how_to_go_on(caught, "torchvision:elsewhere", cache)


def test_an_address_that_cannot_be_resolved_is_named(cache, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", refuse_names)
    with pytest.raises(UserError, match="Name or service not known") as caught:
        resolve("torchvision:resnet18")
    assert_tells_how_to_go_on(caught, "torchvision:resnet18", cache)


def refuse_names(*args, **kwargs):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_server_that_falls_silent_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(published, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        publish_at(monkeypatch, silent)
        with pytest.raises(UserError, match="timed out") as caught:
            resolve("torchvision:elsewhere")
    assert_tells_how_to_go_on(caught, "torchvision:elsewhere", cache)


def test_a_server_of_something_else_is_reported(cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        publish_at(monkeypatch, other)
        with pytest.raises(UserError, match="220 mail") as caught:
            resolve("torchvision:elsewhere")
        thread.join()
    assert_tells_how_to_go_on(caught, "torchvision:elsewhere", cache)


def test_a_cache_folder_that_cannot_be_made_is_reported(server, tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(b"")
    with pytest.raises(UserError, match="cannot download .*Not a directory"):
        resolve("torchvision:tiny")
    monkeypatch.setenv("MASKRCNN_JAX_CACHE", str(tmp_path / "weights" / "a"))
    with pytest.raises(UserError, match="cannot download .*Not a directory"):
        resolve("torchvision:tiny")
    assert not server.requests


def test_every_address_holds_its_digest():
    digits = {"sha256": 8, "md5": 6}
    for name, entry in PUBLISHED.items():
        algorithm, _, digest = entry.digest.partition(":")
        assert entry.url.startswith("https://") and len(digest) == digits[algorithm]
        assert Path(entry.url).stem.endswith(("-" + digest, "_" + digest)), name
    assert len({file_name(name) for name in PUBLISHED}) == len(PUBLISHED)
