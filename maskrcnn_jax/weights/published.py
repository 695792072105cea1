"""Published weights by name: one table of them, and their files, each downloaded once, checked and kept.

A name is ``family:model``, such as ``torchvision:maskrcnn_resnet50_fpn``.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

import pooch

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path, cache_dir, expand

_TORCHVISION = "https://download.pytorch.org/models/"
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation/"


@dataclass(frozen=True)
class Published:
    """A file of weights that its authors publish."""

    url: str
    digest: str  # "algorithm:the first digits"; the authors publish no more, as part of the name of the file
    config: str | None = None  # of maskrcnn_jax.configs, for these weights; None for the backbone of a classifier


PUBLISHED = {
    "torchvision:maskrcnn_resnet50_fpn": Published(
        _TORCHVISION + "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", "sha256:bf2d0c1e", "torchvision_r50_fpn"
    ),
    "torchvision:maskrcnn_resnet50_fpn_v2": Published(
        _TORCHVISION + "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth", "sha256:73cbd019", "torchvision_r50_fpn_v2"
    ),
    "detectron2:mask_rcnn_R_50_FPN_1x": Published(
        _DETECTRON2 + "mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504.pkl", "md5:a54504", "detectron2_r50_fpn"
    ),
    "detectron2:mask_rcnn_R_50_FPN_3x": Published(
        _DETECTRON2 + "mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl", "md5:f10217", "detectron2_r50_fpn"
    ),
    "detectron2:mask_rcnn_R_101_FPN_3x": Published(
        _DETECTRON2 + "mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72.pkl", "md5:a3ec72", "detectron2_r101_fpn"
    ),
    "torchvision:resnet18": Published(_TORCHVISION + "resnet18-f37072fd.pth", "sha256:f37072fd"),
    "torchvision:resnet34": Published(_TORCHVISION + "resnet34-b627a593.pth", "sha256:b627a593"),
    "torchvision:resnet50": Published(_TORCHVISION + "resnet50-0676ba61.pth", "sha256:0676ba61"),
    "torchvision:resnet50_v2": Published(_TORCHVISION + "resnet50-11ad3fa6.pth", "sha256:11ad3fa6"),
    "torchvision:resnet101": Published(_TORCHVISION + "resnet101-63fe2227.pth", "sha256:63fe2227"),
    "torchvision:resnet101_v2": Published(_TORCHVISION + "resnet101-cd907fc2.pth", "sha256:cd907fc2"),
    "torchvision:mobilenet_v3_large": Published(_TORCHVISION + "mobilenet_v3_large-8738ca79.pth", "sha256:8738ca79"),
    "torchvision:mobilenet_v3_large_v2": Published(
        _TORCHVISION + "mobilenet_v3_large-5c1a4163.pth", "sha256:5c1a4163"
    ),
    "torchvision:convnext_tiny": Published(_TORCHVISION + "convnext_tiny-983f1562.pth", "sha256:983f1562"),
    "torchvision:convnext_small": Published(_TORCHVISION + "convnext_small-0c510722.pth", "sha256:0c510722"),
    "torchvision:convnext_base": Published(_TORCHVISION + "convnext_base-6075fbad.pth", "sha256:6075fbad"),
}
_FAMILIES = frozenset(name.partition(":")[0] for name in PUBLISHED)

_TIMEOUT = 30  # seconds without a byte
_RETRIES = 2  # after 1 and 2 seconds


def is_name(source: str | os.PathLike) -> bool:
    """Return whether a source of weights has the form of a name of published ones, rather than of a path."""
    family, colon, _ = os.fspath(source).partition(":")
    return bool(colon) and family in _FAMILIES


def closest_names(name: str) -> list[str]:
    """Return all names of published weights, those most similar to ``name`` first."""
    return difflib.get_close_matches(name, PUBLISHED, n=len(PUBLISHED), cutoff=0)


def find_published(name: str) -> Published:
    """Return the published weights of a name.

    Raises:
        UserError: No weights have this name; the message lists those that exist.
    """
    if name not in PUBLISHED:
        raise UserError(f"there are no weights named {name}; give a path or one of {', '.join(closest_names(name))}")
    return PUBLISHED[name]


def resolve(name_or_path: str | os.PathLike) -> Path:
    """Return the file of named weights, which is downloaded if it is not yet there, or a path as it is.

    Files are kept in ``weights`` in the folder that the environment variable MASKRCNN_JAX_CACHE names, by default in
    ``~/.cache/maskrcnn_jax``.

    Args:
        name_or_path: A key of ``PUBLISHED``. Anything that does not begin with a family and a colon is taken as a
            path, which need not exist.

    Raises:
        UserError: No weights have this name, they cannot be downloaded or kept, or the file is not the published one.
    """
    name = os.fspath(name_or_path)
    if not is_name(name):
        return as_path(name)
    published = find_published(name)
    chosen = os.environ.get("MASKRCNN_JAX_CACHE")
    folder = Path(expand(chosen)) if chosen else cache_dir()
    if folder is None:
        raise UserError(
            f"there is no home folder to keep {name} in; set the environment variable MASKRCNN_JAX_CACHE to a folder, "
            "or give the path of a file instead of a name"
        )
    path = folder / "weights" / published.url.rpartition("/")[2]
    if not path.is_file():
        _download(published, path)
    elif problem := _problem(path, published.digest):
        raise UserError(f"{path} is not the published file: {problem}; delete it to download it again")
    return path


def _problem(path: str | os.PathLike, digest: str) -> str | None:
    """Return how the digest of a file differs from the published one, or None where it does not."""
    algorithm, _, wanted = digest.partition(":")
    found = pooch.file_hash(path, alg=algorithm)[: len(wanted)]
    return None if found == wanted else f"its {algorithm} begins with {found} instead of {wanted}"


def _download(published: Published, path: Path) -> None:
    """Download a file, so that ``path`` exists only when the file is complete and has the published digest."""

    def fetch(url: str, output_file: str, cache: pooch.Pooch) -> None:
        os.unlink(output_file)  # a new file gets the usual permissions, which others who use the cache need
        responses = []
        try:
            pooch.HTTPDownloader(
                progressbar=True,
                chunk_size=1 << 20,
                timeout=_TIMEOUT,
                hooks={"response": lambda response, **_: responses.append(response)},
            )(url, output_file, cache)
        finally:  # HTTPDownloader does not close them where a download fails
            for response in responses:
                response.close()
        if problem := _problem(output_file, published.digest):
            raise UserError(f"it is not the published file ({problem})")

    # pooch compares whole digests only, so it is given none.
    cache = pooch.create(
        path.parent, "", registry={path.name: None}, urls={path.name: published.url}, retry_if_failed=_RETRIES
    )
    try:
        cache.fetch(path.name, downloader=fetch)
    except (OSError, UserError) as error:
        raise UserError(
            f"cannot download {published.url} to {path}: {_reason(error)}; try again, download it elsewhere and put "
            "it at this path, or give the path of a file instead of a name"
        ) from None


def _reason(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code} {response.reason}"
    while error.__context__:  # requests and urllib3 wrap what the network or the disk answered
        error = error.__context__
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()
