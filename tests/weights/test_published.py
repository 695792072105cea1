"""Named weights are downloaded once, checked and kept; a download that fails leaves nothing and says what to do."""

import contextlib
import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pytest

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.weights import published as download
from maskrcnn_jax.weights.published import BASE_URLS, DIGESTS, FILES, resolve

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
        self.base_urls = {family: f"http://127.0.0.1:{self._http.server_port}/{family}/" for family in BASE_URLS}

    def stop(self):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT under both of NAMES, each with the digest in its file name that its family uses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    sha256, md5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()
    monkeypatch.setitem(FILES, "torchvision:tiny", f"tiny-{sha256[:8]}.pth")
    monkeypatch.setitem(FILES, "detectron2:tiny", f"tiny_1x/123/model_final_{md5[:6]}.pkl")
    server = Server()
    for name in NAMES:
        server.files[f"/{name.partition(':')[0]}/{FILES[name]}"] = CONTENT
    yield server
    server.stop()


@pytest.mark.parametrize("length_known", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_named_weights_are_downloaded_once(server, tmp_path, name, length_known):
    server.length_known = length_known
    for _ in range(2):
        path = resolve(name, cache_dir=tmp_path / "a" / "b", base_urls=server.base_urls)
        assert path == tmp_path / "a" / "b" / FILES[name].rpartition("/")[2]
        assert path.read_bytes() == CONTENT
        assert len(server.requests) == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_path_is_returned_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)
    for path in ("a.pth", "resnet18", "some:where/a.pth", "torchvision", tmp_path / "absent.pkl", "~/a.pth"):
        assert resolve(path) == Path(path)


@pytest.mark.parametrize("name", ["torchvision:resnet9000", "detectron2:", "torchvision:/etc/passwd"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UserError, match=f"no weights named {name}; ") as caught:
        resolve(name)
    assert all(known in str(caught.value) for known in FILES)


def test_the_cache_lies_where_the_environment_says(server, tmp_path, monkeypatch):
    name = "torchvision:tiny"
    monkeypatch.setenv("MASKRCNN_JAX_CACHE", str(tmp_path / "mine"))
    assert resolve(name, base_urls=server.base_urls) == tmp_path / "mine" / "weights" / FILES[name]
    monkeypatch.delenv("MASKRCNN_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / ".cache" / "maskrcnn_jax" / "weights" / FILES[name]
    assert resolve(name, base_urls=server.base_urls) == path
    assert path.is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_another_digest_is_deleted(server, tmp_path, name):
    server.files = dict.fromkeys(server.files, CONTENT[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{DIGESTS[name.partition(':')[0]]} that begins with .* and was deleted"):
        resolve(name, cache_dir=tmp_path, base_urls=server.base_urls)
    assert not list(tmp_path.iterdir())
    server.files = dict.fromkeys(server.files, CONTENT)
    assert resolve(name, cache_dir=tmp_path, base_urls=server.base_urls).read_bytes() == CONTENT


def test_a_kept_file_with_another_digest_is_not_used(server, tmp_path):
    kept = tmp_path / FILES["torchvision:tiny"]
    kept.write_bytes(CONTENT[:1000])  # such as a download by hand that was cut short
    with pytest.raises(UserError, match="is not the published file.*delete it to download it again"):
        resolve("torchvision:tiny", cache_dir=tmp_path, base_urls=server.base_urls)
    assert kept.is_file() and not server.requests
    kept.write_bytes(CONTENT)
    assert resolve("torchvision:tiny", cache_dir=tmp_path, base_urls=server.base_urls) == kept
    assert not server.requests


@pytest.mark.parametrize("length_known", [True, False])
@pytest.mark.parametrize("sent", [0.0, 0.6])
def test_a_connection_that_closes_early_leaves_nothing(server, tmp_path, sent, length_known):
    server.sent, server.length_known = sent, length_known
    count = int(sent * len(CONTENT))
    message = f"closed after {count} of {len(CONTENT)} bytes" if length_known else "was deleted"
    with pytest.raises(UserError, match=f"{message}.*--weights=FILE"):
        resolve("torchvision:tiny", cache_dir=tmp_path, base_urls=server.base_urls)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupt(response, size):
        raise KeyboardInterrupt

    monkeypatch.setattr("http.client.HTTPResponse.read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("torchvision:tiny", cache_dir=tmp_path, base_urls=server.base_urls)
    assert not list(tmp_path.iterdir())


def assert_tells_how_to_go_on(caught, name, url, cache_dir):
    kept = cache_dir / FILES[name].rpartition("/")[2]
    message = str(caught.value)
    assert f"{url}{FILES[name]}" in message and f"put it at {kept}" in message and "--weights=FILE" in message
    assert not list(cache_dir.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_reported_with_its_address(server, tmp_path, name):
    server.files = {}
    with pytest.raises(UserError, match="404 Not Found") as caught:
        resolve(name, cache_dir=tmp_path, base_urls=server.base_urls)
    assert_tells_how_to_go_on(caught, name, server.base_urls[name.partition(":")[0]], tmp_path)


def test_without_a_network_the_address_and_the_place_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(UserError, match="Connection refused") as caught:
            resolve("torchvision:resnet18", cache_dir=tmp_path, base_urls={"torchvision": url})
    assert_tells_how_to_go_on(caught, "torchvision:resnet18", url, tmp_path)


def test_a_server_that_falls_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(UserError, match="timed out") as caught:
            resolve("torchvision:resnet18", cache_dir=tmp_path, base_urls={"torchvision": url})
    assert_tells_how_to_go_on(caught, "torchvision:resnet18", url, tmp_path)


def test_a_server_of_something_else_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}/"
        with pytest.raises(UserError, match="220 mail") as caught:
            resolve("torchvision:resnet18", cache_dir=tmp_path, base_urls={"torchvision": url})
        thread.join()
    assert_tells_how_to_go_on(caught, "torchvision:resnet18", url, tmp_path)


def test_a_cache_folder_that_cannot_be_made_is_the_users_to_mend(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot download .*File exists"):
        resolve("torchvision:tiny", cache_dir=tmp_path / "file", base_urls=server.base_urls)
    with pytest.raises(UserError, match="cannot download .*Not a directory"):
        resolve("torchvision:tiny", cache_dir=tmp_path / "file" / "a", base_urls=server.base_urls)
    assert not server.requests


def test_every_name_has_an_address_with_a_digest():
    assert BASE_URLS.keys() == DIGESTS.keys()
    digits = {"torchvision": 8, "detectron2": 6}
    for name, file in FILES.items():
        family = name.partition(":")[0]
        assert BASE_URLS[family].startswith("https://") and BASE_URLS[family].endswith("/")
        assert len(download._DIGEST_IN_NAME.search(file)[1]) == digits[family]
    kept = [file.rpartition("/")[2] for file in FILES.values()]
    assert len(set(kept)) == len(kept)
