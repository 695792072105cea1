"""Detections as JSON or as a picture."""

import json
from typing import Any

import cv2
import numpy as np

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.detections import ImageDetections

MASKS = ("rle", "polygons", "none")
FORMATS = {"json": "application/json", "jpg": "image/jpeg", "png": "image/png"}
_JPEG_SIDE = 65_500  # pixels of the longest side that libjpeg writes


def encode(found: ImageDetections, form: str, masks: str) -> bytes:
    """Return the body of an answer.

    Args:
        found: The objects to answer with.
        form: One of ``FORMATS``.
        masks: One of ``MASKS``; how JSON holds the masks.

    Raises:
        UserError: A JPEG cannot have a side of this length.
    """
    if form == "json":
        # Half of a surrogate pair in a name becomes an escape of JSON.
        return json.dumps(to_json(found, masks), ensure_ascii=False).encode(errors="backslashreplace")
    if form == "jpg" and max(found.image.shape[:2]) > _JPEG_SIDE:
        raise UserError(f"a side of the image has more than {_JPEG_SIDE:,} pixels, which no JPEG has; ask for png")
    return cv2.imencode(f".{form}", found.draw()[..., ::-1])[1].tobytes()


def to_json(found: ImageDetections, masks: str) -> dict[str, Any]:
    """Return detections as values of JSON.

    Args:
        found: K objects.
        masks: "rle" adds COCO's compressed run lengths; "polygons" adds for each region of the mask its rings of
            ``[x, y]``, the outline first and then the holes; "none" adds nothing.

    Returns:
        ``width`` and ``height`` of the image, and K ``detections``, best first.
    """
    height, width = found.image.shape[:2]
    detections: list[dict[str, Any]] = []
    for index, box in enumerate(found.boxes):
        detections.append(
            {
                "name": found.names[index],
                "category_id": int(found.category_ids[index]),
                "score": _number(found.scores[index]),
                "box": [_number(value) for value in box],
            }
        )
    if masks == "rle":
        for row, result in zip(detections, found.to_coco(0), strict=True):
            row["rle"] = result["segmentation"]
    elif masks == "polygons":
        for row, regions in zip(detections, found.polygons, strict=True):
            row["polygons"] = [[ring.astype(int).tolist() for ring in rings] for rings in regions]
    return {"width": width, "height": height, "detections": detections}


def _number(value: np.float32) -> float:
    """Return the shortest decimal that reads back as the same float32."""
    return float(str(value))
