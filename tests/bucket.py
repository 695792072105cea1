"""A bucket of Google Cloud Storage, emulated in this process for it and its children."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

from maskrcnn_jax.paths import as_path, write_bytes

NAME = "bucket"


class Bucket:
    """An empty bucket, and what children need in their environment to find it."""

    url = f"gs://{NAME}"

    def __init__(self, port: int):
        address = f"http://localhost:{port}"
        self.environment = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        self.server = server.create_server("localhost", port, in_memory=True, default_bucket=NAME)

    def names(self) -> set[str]:
        """Return the names of all objects, without asking the server."""
        return set(self.server._storage.objects.get(NAME, {}))

    def upload(self, folder: Path, name: str) -> str:
        """Upload a folder, and return its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                write_bytes(as_path(f"{self.url}/{name}/{path.relative_to(folder)}"), path.read_bytes())
        return f"{self.url}/{name}"

    @contextlib.contextmanager
    def refusing(self, *methods: str) -> Iterator[None]:
        """Refuse requests by these methods, such as POST, as to an account without the permission."""
        answer, handle = (
            {"code": 403, "message": "nobody@x does not have storage.objects access."},
            server.Router.handle,
        )

        def refuse(router: server.Router, method: str) -> None:
            if method in methods:
                response = server.Response(router._request_handler)
                response.status = HTTPStatus.FORBIDDEN
                response.json({"error": answer})
                response.close()
            else:
                handle(router, method)

        server.Router.handle = refuse
        try:
            yield
        finally:
            server.Router.handle = handle


@contextlib.contextmanager
def emulated() -> Iterator[Bucket]:
    """Run the emulator; this process finds it too."""
    for name in ("gcp_storage_emulator", "api.object"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what is not there is an error to it
    _complete()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        bucket = Bucket(free.getsockname()[1])
    with bucket.server:
        os.environ |= bucket.environment
        yield bucket


def _complete() -> None:
    """Add what the emulator lacks: the header by which TensorStore tells versions of an object, and moving one."""
    download = objects.download

    def download_with_generation(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        found = storage.objects.get(request.params["bucket_name"], {}).get(request.params["object_id"])
        if found:
            response["X-Goog-Generation"] = found["generation"]

    def move(request, response, storage, *args, **kwargs):
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        if response.status == HTTPStatus.OK:
            storage.delete_file(request.params["bucket_name"], request.params["object_id"])

    objects.download = download_with_generation
    path = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"
    server.HANDLERS = ((path, {"POST": move}), *server.HANDLERS)
