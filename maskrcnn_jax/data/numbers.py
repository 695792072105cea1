"""Numbers as annotation tools write them: ``"7"`` and ``7.0`` for 7, and points as ``{"x": 1, "y": 2}``.

Only what means one number exactly is converted. Everything else stays as it is, for the reader to refuse by name.
"""

import re
from collections.abc import Callable
from typing import Any

_NUMBER = re.compile(r"\s*[+-]?\d{1,19}(\.\d*)?([eE][+-]?\d{1,3})?\s*")
_EXACT = 2**53  # float64 holds every whole number below


def number(value: Any) -> Any:
    """Return a number that is written as text or with a fraction of zero; any other value as it is."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if set(value) & set(".eE") else int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    return value


def plain(entry: Any) -> Any:
    """Return an entry of an annotation or results file with its numbers as COCO writes them."""
    if not isinstance(entry, dict):
        return entry
    return entry | {name: convert(entry[name]) for name, convert in _FIELDS.items() if name in entry}


def _numbers(values: Any) -> Any:
    return [number(value) for value in values] if isinstance(values, list) else values


def _mask(mask: Any) -> Any:
    if isinstance(mask, dict):
        return mask | {name: _numbers(mask[name]) for name in ("size", "counts") if name in mask}
    if not isinstance(mask, list):
        return mask
    return [_polygon(mask)] if _are_points(mask) else [_polygon(part) for part in mask]


def _polygon(polygon: Any) -> Any:
    if not isinstance(polygon, list):
        return number(polygon)  # of a polygon that is no list of its own, which the reader refuses
    if _are_points(polygon):
        polygon = [point[axis] for point in polygon for axis in ("x", "y")]
    if set(map(type, polygon)) <= {int, float}:  # nearly always, and much faster than to look at each number
        return polygon
    return _numbers(polygon)


def _are_points(values: list) -> bool:
    return bool(values) and all(isinstance(value, dict) and value.keys() == {"x", "y"} for value in values)


_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("id", "image_id", "category_id", "height", "width", "iscrowd", "area", "score"), number),
    "bbox": _numbers,
    "segmentation": _mask,
}
