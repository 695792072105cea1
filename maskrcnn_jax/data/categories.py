"""The classes of a dataset: its category ids and names, and the labels that the model has for them."""

import json
import os
from typing import NamedTuple

from maskrcnn_jax.data.findings import Kind, Report, stop
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path, read_bytes
from maskrcnn_jax.writing import replace_file

# Category ids of COCO's detection task: 80 of 1..90.
_COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_COCO_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
    laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush
"""
_MOST_CLASSES = 1 << 16  # each takes a megabyte of a model's weights


class Categories(NamedTuple):
    """The classes of a dataset: parallel tuples in order of category id.

    With COCO's own 80 ids the label is the id and ``num_classes`` is 91, as torchvision's weights have it; any other
    dataset gets the labels 1..K, as COCO does for detectron2's weights.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    num_classes: int  # background included

    @classmethod
    def create(cls, ids: list[int], names: list[str], contiguous: bool = False) -> "Categories":
        """Number the categories of a dataset, given in any order; COCO's from 1 to 80 if ``contiguous``."""
        ordered_ids, ordered_names = zip(*sorted(zip(ids, names, strict=True)), strict=True)
        keeps_ids = ordered_ids == _COCO_IDS and not contiguous
        labels = ordered_ids if keeps_ids else tuple(range(1, len(ids) + 1))
        return cls(ordered_ids, ordered_names, labels, max(labels) + 1)

    @classmethod
    def coco(cls, contiguous: bool = False) -> "Categories":
        """Return the categories of COCO's detection task."""
        names = [name.strip() for name in _COCO_NAMES.replace("\n", " ").split(",")]
        return cls.create(list(_COCO_IDS), names, contiguous)

    def check_known(self, known: "Categories", split: str, report: Report = stop) -> None:
        """Check that a model that was trained on ``known`` can be evaluated on a split with these categories.

        Args:
            known: the categories of the model.
            split: name of the split.
            report: called if there are others; by default a UserError is raised.
        """
        pairs = [set(zip(c.ids, c.names, strict=True)) for c in (self, known)]
        unknown = sorted(pairs[0] - pairs[1])
        if unknown:
            names = ", ".join(f"{name} (id {category_id})" for category_id, name in unknown[:3])
            report(Kind.UNKNOWN_CATEGORY.finding(count=len(unknown), split=split, names=names))

    def name(self, label: int) -> str:
        """Return the name of a label."""
        return self.names[self.labels.index(label)]

    def category_id(self, label: int) -> int:
        """Return the category id of a label."""
        return self.ids[self.labels.index(label)]

    def save(self, path: str | os.PathLike) -> None:
        """Write the categories as JSON."""
        rows = [
            {"id": i, "name": n, "label": label} for i, n, label in zip(self.ids, self.names, self.labels, strict=True)
        ]
        content = {"num_classes": self.num_classes, "categories": rows}
        replace_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Categories":
        """Read the categories that ``save`` wrote.

        Raises:
            UserError: the file is missing or holds something else.
        """
        try:
            content = json.loads(read_bytes(as_path(path)).decode())
            ids, names, labels = (tuple(row[key] for row in content["categories"]) for key in ("id", "name", "label"))
            num_classes = content["num_classes"]
            if {*map(type, ids), *map(type, labels), type(num_classes)} != {int} or {*map(type, names)} != {str}:
                raise ValueError("something other than numbers and names")
            if len(set(labels)) < len(labels) or not 0 < min(labels) <= max(labels) < num_classes <= _MOST_CLASSES:
                raise ValueError("labels that no model has")
            return cls(ids, names, labels, num_classes)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds something else"
            raise UserError(
                f"cannot read the categories of the model from {path} ({reason}); it is written when training starts, "
                "so point at the folder of a training run"
            ) from None
