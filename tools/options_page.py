"""Write docs/options.md, the page of all options and published weights: python tools/options_page.py.

The template beside this file holds what is written by hand.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

import jinja2

from maskrcnn_jax.options import Options
from maskrcnn_jax.weights.published import PUBLISHED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"


class Row(NamedTuple):
    """An option as the page shows it."""

    name: str
    default: str
    meaning: str
    values: str
    source: str


def rows(part: object) -> list[Row]:
    """Return the options of a part, without those of its own parts.

    Args:
        part: Options such as ``ModelOptions()``.
    """
    return [
        Row(
            part.prefix + field.name,
            repr(getattr(part, field.name)),
            field.metadata["meaning"],
            _values(field.metadata),
            field.metadata["source"],
        )
        for field in dataclasses.fields(part)
        if field.metadata
    ]


def render() -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    options = Options()
    parts = {"Run": options, "Data": options.data, "Model": options.model, "Optimizer": options.optim}
    return environment.get_template("options_page.md.j2").render(
        parts={title: (type(part).__doc__, rows(part)) for title, part in parts.items()}, published=PUBLISHED
    )


def _values(metadata: Mapping[str, Any]) -> str:
    """Return the choices, or the unit and the range."""
    if metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    low, high = metadata["low"], metadata["high"]
    allowed = f"at least {low:g}" if low else ""
    if high is not None:
        allowed = f"{low:.3g} to {high:.3g}"
    return ", ".join(part for part in (metadata["unit"], allowed) if part)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
