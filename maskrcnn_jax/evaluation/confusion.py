"""What each detection is: correct, a wrong class, a poor box or mask, a duplicate, or nothing that is there.

Detections are matched by their boxes, in descending order of score. Each gets the remaining object that it overlaps
most, by at least MIN_OVERLAP, whatever their classes, so that confused classes can be counted. Crowds are not matched,
and unmatched detections inside one are ignored. An object that no detection matches is missed.
"""

from enum import StrEnum
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

MIN_SCORE = 0.5  # from which on a detection counts, unless another is chosen
MIN_OVERLAP = 0.5
NEAR = 0.1  # overlap with an object of the same class from which on a false positive is a poor box


class Kind(StrEnum):
    """What a detection is."""

    CORRECT = "correct"
    POOR_MASK = "poor mask"  # right but for its mask, which overlaps that of the object by less than MIN_OVERLAP
    WRONG_CLASS = "wrong class"
    POOR_BOX = "poor box"  # overlaps an object of its class by less than MIN_OVERLAP
    DUPLICATE = "duplicate"  # overlaps an object that a detection with a higher score is matched with
    BACKGROUND = "background"
    IGNORED = "ignored"  # lies in a crowd


MATCHED = (Kind.CORRECT, Kind.POOR_MASK, Kind.WRONG_CLASS)


class Match(NamedTuple):
    """What a detection is, and which object decides it."""

    kind: Kind
    place: int | None  # of the object in its image


def match(objects: list[dict], detections: list[dict]) -> list[Match]:
    """Match the detections of one image.

    The match of a detection depends only on those with higher scores. So the matches of the detections above a score
    are the first of the matches of all.

    Args:
        objects: annotations.
        detections: COCO results, in descending order of score.

    Returns:
        The match of each detection.
    """
    crowd = np.array([bool(o.get("iscrowd", 0)) for o in objects], bool)
    if not objects or not detections:
        return [Match(Kind.BACKGROUND, None)] * len(detections)
    boxes = [np.array([o["bbox"] for o in group], np.float64) for group in (detections, objects)]
    overlaps = np.asarray(coco_mask.iou(*boxes, crowd.astype(np.uint8)))  # [detections, objects]
    free, matches = ~crowd, []
    for detection, row in zip(detections, overlaps, strict=True):
        best = int(np.argmax(np.where(free, row, -1))) if free.any() else -1
        if best >= 0 and row[best] >= MIN_OVERLAP:
            free[best] = False
            matches.append(Match(_judge(detection, objects[best]), best))
        elif (row[crowd] >= MIN_OVERLAP).any():
            matches.append(Match(Kind.IGNORED, None))
        else:
            matches.append(_nearest(detection, objects, np.where(crowd, -1, row)))
    return matches


def _judge(detection: dict, found: dict) -> Kind:
    """Say how well a detection matches the object that it is matched with by boxes."""
    if detection["category_id"] != found["category_id"]:
        return Kind.WRONG_CLASS
    masks = [entry.get("segmentation") for entry in (detection, found)]
    if all(isinstance(mask, dict) for mask in masks):
        overlap = coco_mask.iou([masks[0]], [masks[1]], [0])[0, 0]
        return Kind.CORRECT if overlap >= MIN_OVERLAP else Kind.POOR_MASK
    return Kind.CORRECT


def _nearest(detection: dict, objects: list[dict], overlaps: np.ndarray) -> Match:
    """Say what a detection is that is matched with no object, by the object that it overlaps most."""
    nearest = int(np.argmax(overlaps))
    if overlaps[nearest] >= MIN_OVERLAP:
        return Match(Kind.DUPLICATE, nearest)
    same = np.array([o["category_id"] == detection["category_id"] for o in objects])
    nearest = int(np.argmax(np.where(same, overlaps, -1)))
    if same[nearest] and overlaps[nearest] >= NEAR:
        return Match(Kind.POOR_BOX, nearest)
    return Match(Kind.BACKGROUND, None)
