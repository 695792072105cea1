"""How options are declared as fields of dataclasses, and checked when these are made."""

import dataclasses
import sys
from typing import Any, ClassVar, get_args

from maskrcnn_jax.errors import UserError

# Sources of many options.
TORCHVISION, PAPER = "torchvision", "the paper, Sec. "

_MOST = sys.float_info.max  # numbers beyond overflow where they are computed with


def option(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    source: str = "",
) -> Any:
    """Declare an option.

    Args:
        default: Its value unless set. A tuple of numbers may have any length.
        meaning: What it does, as a phrase for the documentation.
        unit: Of the value.
        choices: The values that are allowed, if it is one of a few.
        low: Smallest value allowed, for numbers and for each of a tuple.
        high: Largest value allowed, for numbers.
        source: Where the option or its default comes from.
    """
    metadata = {"meaning": meaning, "unit": unit, "choices": choices, "low": low, "high": high, "source": source}
    return dataclasses.field(default=default, metadata=metadata)


class Checked:
    """Checks choices and ranges when the options are made, and makes lists tuples so that the options are hashable.

    In tuples of whole numbers, 7.0 counts as 7.
    """

    prefix: ClassVar[str] = ""  # of the names of these options in a config

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, field.name, value := _numbers(value, field))
            if field.metadata and (problem := _problem(value, field)):
                problems.append(f"{self.prefix}{field.name} is {value!r}; use {problem}")
        problems += self._contradictions() if not problems else []
        if problems:
            raise UserError("; ".join(problems))

    def _contradictions(self) -> list[str]:
        """Return what is wrong between options that are valid by themselves."""
        return []


def _numbers(value: list | tuple, field: dataclasses.Field) -> tuple:
    are_whole = isinstance(field.default, tuple) and get_args(field.type)[0] is int
    return tuple(int(v) if are_whole and type(v) is float and v.is_integer() else v for v in value)


def _problem(value: Any, field: dataclasses.Field) -> str:
    """Return what an option should be instead, or an empty string if the value is allowed."""
    if isinstance(field.default, tuple):
        return _problem_of_tuple(value, field)
    if not _is_like(value, field.default):
        return {bool: "True or False", str: "a string"}.get(type(field.default), "a number")
    choices, low, high = (field.metadata[name] for name in ("choices", "low", "high"))
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    if (low is None or value >= low) and (high is None or value <= high):
        return ""
    if low is None or high is None:
        return f"at least {low}" if high is None else f"at most {high}"
    return f"a value from {low} to {high}"


def _problem_of_tuple(value: Any, field: dataclasses.Field) -> str:
    are_whole, low = get_args(field.type)[0] is int, field.metadata["low"]
    types, least = (int,) if are_whole else (int, float), -_MOST if low is None else low
    if isinstance(value, tuple) and all(type(item) in types and least <= item <= _MOST for item in value):
        return ""
    return f"a tuple of {'whole ' if are_whole else ''}numbers{'' if low is None else f' from {low}'}"


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)
