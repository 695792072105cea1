"""A bucket of Google Cloud Storage, emulated in this process for it and its children."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

from maskrcnn_jax.paths import as_path, write_bytes

NAME = "bucket"
_download = objects.download


def _download_with_generation(request, response, storage, *args, **kwargs) -> None:
    """Add the header by which TensorStore tells the versions of an object, which the emulator leaves out."""
    _download(request, response, storage, *args, **kwargs)
    found = storage.objects.get(request.params["bucket_name"], {}).get(request.params["object_id"])
    if found:
        response["X-Goog-Generation"] = found["generation"]


class Bucket:
    """An empty bucket, and what children need in their environment to find it."""

    url = f"gs://{NAME}"

    def __init__(self, port: int):
        address = f"http://localhost:{port}"
        self.environment = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        self._server = create_server("localhost", port, in_memory=True, default_bucket=NAME)

    def names(self) -> set[str]:
        """Return the names of all objects, without asking the server."""
        return set(self._server._storage.objects.get(NAME, {}))

    def upload(self, folder: Path, name: str) -> str:
        """Upload a folder, and return its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                write_bytes(as_path(f"{self.url}/{name}/{path.relative_to(folder)}"), path.read_bytes())
        return f"{self.url}/{name}"


@contextlib.contextmanager
def emulated() -> Iterator[Bucket]:
    """Run the emulator; this process finds it too."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    logging.getLogger("api.object").setLevel(logging.CRITICAL)  # what is not there is an error to it
    with socket.socket() as free:
        free.bind(("localhost", 0))
        bucket = Bucket(free.getsockname()[1])
    objects.download = _download_with_generation
    with bucket._server:
        os.environ |= bucket.environment
        yield bucket
