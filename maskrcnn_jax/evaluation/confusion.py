"""What was found beside what is there: which classes are taken for which, and in which images a model is wrong.

Detections with a score of MIN_SCORE and more are matched by their boxes, the surest first, each with the object left
that it overlaps most, by MIN_OVERLAP and more, whatever their classes. Crowds count for nothing, nor do detections
that match nothing but lie in one.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

MIN_SCORE = 0.5
MIN_OVERLAP = 0.5


class ImageErrors(NamedTuple):
    """What is right and wrong in an image."""

    right: int  # objects found with their class
    confused: int  # objects found with another class
    missed: int  # objects not found
    invented: int  # detections where nothing is

    @property
    def errors(self) -> int:
        return self.confused + self.missed + self.invented

    @property
    def share_right(self) -> float:
        """Right ones among all objects and inventions; 1 for an image where nothing is and nothing was found."""
        return self.right / max(self.right + self.errors, 1) if self.right + self.errors else 1.0


def confusion(truth: COCO, results: list[dict]) -> tuple[Counter, dict[int, ImageErrors]]:
    """Compare detections with objects.

    Args:
      truth: as ``ground_truth`` returns it.
      results: COCO results.

    Returns:
      How often each pair (category id of the object, category id of the detection) comes, None standing for missed or
      invented; and the errors of every image by its id.
    """
    found: defaultdict[int, list[dict]] = defaultdict(list)
    for result in results:
        if result["score"] >= MIN_SCORE:
            found[result["image_id"]].append(result)
    pairs: Counter[tuple] = Counter()
    images = {}
    for image_id in truth.imgs:
        of_image = Counter(_pairs(truth.imgToAnns.get(image_id, []), found[image_id]))
        pairs.update(of_image)
        counts: Counter[str] = Counter()
        for (there, said), number in of_image.items():
            kind = "missed" if said is None else "invented" if there is None else "confused"
            counts["right" if there == said else kind] += number
        images[image_id] = ImageErrors(*(counts[name] for name in ImageErrors._fields))
    return pairs, images


def _pairs(objects: list[dict], detections: list[dict]) -> list[tuple[int | None, int | None]]:
    crowd = np.array([bool(o.get("iscrowd", 0)) for o in objects], bool)
    detections = sorted(detections, key=lambda d: -d["score"])
    if objects and detections:
        boxes = [np.array([o["bbox"] for o in group], np.float64) for group in (detections, objects)]
        overlaps = np.asarray(coco_mask.iou(*boxes, crowd.astype(np.uint8)))  # [detections, objects]
    else:
        overlaps = np.zeros((len(detections), len(objects)))
    free, pairs = ~crowd, []
    for detection, row in zip(detections, overlaps, strict=True):
        best = int(np.argmax(np.where(free, row, -1))) if free.any() else -1
        if best >= 0 and row[best] >= MIN_OVERLAP:
            free[best] = False
            pairs.append((objects[best]["category_id"], detection["category_id"]))
        elif not (row[crowd] >= MIN_OVERLAP).any():
            pairs.append((None, detection["category_id"]))
    return pairs + [(objects[i]["category_id"], None) for i in np.flatnonzero(free)]
