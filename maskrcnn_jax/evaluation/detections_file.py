"""Reads COCO results, such as detections.json, and looks at them before pycocotools does, which believes anything.

Numbers and masks are read as those of annotations are: text and fractions of zero are converted.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from maskrcnn_jax.data.entries import RunLengths
from maskrcnn_jax.data.numbers import plain
from maskrcnn_jax.data.run_lengths import num_pixels
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import read_bytes


def read_results(path: Path, images: Mapping[int, dict], category_ids: Collection[int]) -> list[dict]:
    """Read a file of results with boxes and run-length masks.

    Args:
        path: the JSON.
        images: entry of the annotation file by image_id.
        category_ids: those of the annotation file.

    Raises:
        UserError: the file holds something else, or results of images or categories that the annotations do not have.
    """
    try:
        results = json.loads(read_bytes(path).decode("utf-8-sig"))  # with the mark that some editors put first
    except OSError as error:
        raise _no_results(path, str(error.strerror)) from None
    except (ValueError, RecursionError):
        raise _no_results(path, "it is no JSON") from None
    if not isinstance(results, list):
        raise _no_results(path, "it is not a list")
    read = []
    for place, result in enumerate(results):
        try:
            read.append(_read(result, images, category_ids))
        except KeyError as error:
            raise _no_results(path, f"entry {place} has no {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise _no_results(path, f"entry {place}: {error}") from None
    return read


def _read(result: Any, images: Mapping[int, dict], category_ids: Collection[int]) -> dict:
    """Return a result with its mask as compressed run lengths."""
    if not isinstance(result, dict):
        raise ValueError("it is not an object")
    result = plain(result)
    image_id, category_id = result["image_id"], result["category_id"]
    if type(image_id) is not int or image_id not in images:
        raise ValueError("it is of an image which the annotations do not have")
    if type(category_id) is not int or category_id not in category_ids:
        raise ValueError("it is of a category which the annotations do not have")
    box = result["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, (*box, result["score"]))):
        raise ValueError("its bbox is not x, y, width, height, or its score no number")
    size = [images[image_id]["height"], images[image_id]["width"]]
    mask = msgspec.convert(result["segmentation"], RunLengths)
    if list(mask.size) != size:
        raise ValueError("its segmentation is not a run-length mask of the size of its image")
    runs = np.frombuffer(mask.counts, np.uint8)  # type: ignore[call-overload]  # bytes, see RunLengths
    if num_pixels(runs, np.array([0, len(runs)]))[0] != size[0] * size[1]:
        raise ValueError("its run-length mask does not fit its image")
    return result | {"segmentation": {"size": size, "counts": mask.counts}}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _no_results(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} holds no COCO results ({reason}); give the detections.json that eval wrote for the same images and "
        "classes"
    )
