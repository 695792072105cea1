"""Weights by name: fetches the published files of torchvision and detectron2 once, checks them, and keeps them.

A name is ``family:model``, such as ``torchvision:maskrcnn_resnet50_fpn``. Both families put the start of a digest in
the name of each file, which is checked before anything is kept.
"""

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from maskrcnn_jax.errors import UserError

BASE_URLS = {
    "torchvision": "https://download.pytorch.org/models/",
    "detectron2": "https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation/",
}
FILES = {
    "torchvision:maskrcnn_resnet50_fpn": "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "torchvision:maskrcnn_resnet50_fpn_v2": "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
    "torchvision:resnet18": "resnet18-f37072fd.pth",
    "torchvision:resnet34": "resnet34-b627a593.pth",
    "torchvision:resnet50": "resnet50-0676ba61.pth",
    "torchvision:resnet50_v2": "resnet50-11ad3fa6.pth",
    "torchvision:resnet101": "resnet101-63fe2227.pth",
    "torchvision:resnet101_v2": "resnet101-cd907fc2.pth",
    "torchvision:mobilenet_v3_large": "mobilenet_v3_large-8738ca79.pth",
    "torchvision:mobilenet_v3_large_v2": "mobilenet_v3_large-5c1a4163.pth",
    "detectron2:mask_rcnn_R_50_FPN_1x": "mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504.pkl",
    "detectron2:mask_rcnn_R_50_FPN_3x": "mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl",
    "detectron2:mask_rcnn_R_101_FPN_3x": "mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72.pkl",
}
# torch.hub checks the former; detectron2's MODEL_ZOO.md says that each file's name contains its md5 prefix.
DIGESTS = {"torchvision": "sha256", "detectron2": "md5"}

_DIGEST_IN_NAME = re.compile(r"[-_]([0-9a-f]{6,})\.\w+$")
_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without a byte


def resolve(
    name_or_path: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    base_urls: Mapping[str, str] | None = None,
) -> Path:
    """Return the file of named weights, downloading it where it is not yet there, or a path as it is.

    Args:
        name_or_path: a key of ``FILES``; anything that does not begin with a family of ``BASE_URLS`` and a colon is
            taken as a path, which need not exist.
        cache_dir: folder of the downloaded files; by default ``weights`` in the folder that the environment variable
            MASKRCNN_JAX_CACHE names, else in ``~/.cache/maskrcnn_jax``.
        base_urls: family -> address that its files lie below, for those that come from a mirror.

    Raises:
        UserError: there are no weights of this name, they cannot be downloaded, or the file is not the published one.
    """
    name = os.fspath(name_or_path)
    family, colon, _ = name.partition(":")
    if not colon or family not in BASE_URLS:
        return Path(name)
    if name not in FILES:
        raise UserError(f"there are no weights named {name}; give a path or one of {', '.join(FILES)}")
    file = FILES[name]
    path = (_default_cache_dir() if cache_dir is None else Path(cache_dir)) / PurePosixPath(file).name
    algorithm, wanted = DIGESTS[family], _DIGEST_IN_NAME.search(file)[1]
    if path.is_file():
        with path.open("rb") as kept:
            digest = hashlib.file_digest(kept, lambda: _new_hash(algorithm)).hexdigest()
        if not digest.startswith(wanted):
            raise UserError(
                f"{path} is not the published file, as its {algorithm} begins with {digest[: len(wanted)]} and not "
                f"{wanted}; delete it to download it again"
            )
        return path
    _download({**BASE_URLS, **(base_urls or {})}[family] + file, path, algorithm, wanted)
    return path


def _default_cache_dir() -> Path:
    parent = os.environ.get("MASKRCNN_JAX_CACHE")
    return (Path(parent) if parent else Path.home() / ".cache" / "maskrcnn_jax") / "weights"


def _new_hash(algorithm: str):
    return hashlib.new(algorithm, usedforsecurity=False)  # hardened systems refuse md5 otherwise


def _download(url: str, path: Path, algorithm: str, wanted: str) -> None:
    """Fetch a file, so that ``path`` comes to be only when all of it is there and its digest begins as wanted."""
    remedy = f"download it elsewhere and put it at {path}, or give its own path with --weights=FILE"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _fetch(url, partial, _new_hash(algorithm))
        if not digest.startswith(wanted):
            raise UserError(
                f"{url} came with a {algorithm} that begins with {digest[: len(wanted)]}, not {wanted}, and was "
                f"deleted; try again, or {remedy}"
            )
        partial.replace(path)
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {url} to {path}: {_reason(e)}; try again, or {remedy}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _fetch(url: str, partial: Path, digest) -> str:
    """Write what an address gives to a file and return its digest in hexadecimal."""
    request = urllib.request.Request(url, headers={"User-Agent": "maskrcnn_jax"})  # some servers refuse urllib's own
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, partial.open("wb") as file:
        length = response.headers.get("Content-Length")
        total, received = int(length) if length and length.isdigit() else None, 0
        with tqdm(total=total, desc=url.rsplit("/", 1)[1], unit="B", unit_scale=True, unit_divisor=1024) as progress:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                progress.update(len(chunk))
    if total is not None and received != total:  # http.client takes an early end for the end
        raise ConnectionError(f"the connection was closed after {received} of {total} bytes")
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        with error:  # it holds the connection
            return f"the server answered {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
