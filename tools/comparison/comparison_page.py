"""A list of compared numbers: how far ours are from the reference's, as a table, JSON and one HTML page."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from maskrcnn_jax import page
from maskrcnn_jax.writing import write_json


class Row(NamedTuple):
    """One compared quantity; where an array was compared, its worst place."""

    section: str
    name: str
    ours: float  # at the worst place
    reference: float
    where: tuple[int, ...]
    max_abs: float
    max_rel: float  # max_abs over the largest absolute value of the reference, or a ratio of norms
    tolerance: float
    absolute: bool  # whether the tolerance limits max_abs instead of max_rel

    @property
    def ok(self) -> bool:
        """Whether the difference is within its tolerance; a NaN never is."""
        return (self.max_abs if self.absolute else self.max_rel) <= self.tolerance


class Comparison:
    """Collects rows; of those of one name (several batches) the worst stays."""

    def __init__(self):
        self._rows: dict[tuple[str, str], Row] = {}

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they first came."""
        return list(self._rows.values())

    @property
    def ok(self) -> bool:
        """Whether all rows are within their tolerances, and there are some."""
        return bool(self._rows) and all(row.ok for row in self._rows.values())

    @property
    def num_failed(self) -> int:
        """How many rows exceed their tolerance."""
        return sum(not row.ok for row in self.rows)

    def add(
        self,
        section: str,
        name: str,
        ours,
        reference,
        tolerance: float,
        *,
        absolute: bool = False,
        by_norm: bool = False,
        floor: float = 0.0,
    ) -> None:
        """Compare two arrays; of different shapes, they differ by infinity.

        Args:
            section: of the table.
            name: of the row.
            ours: array or number.
            reference: likewise.
            tolerance: largest relative difference that passes.
            absolute: the tolerance limits the absolute difference instead.
            by_norm: relative is the norm of the difference over that of the reference, instead of the largest
                difference over the largest value.
            floor: what a relative difference is relative to at least.
        """
        ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        if ours.shape != reference.shape:
            sizes = float(ours.size), float(reference.size)
            row = Row(section, f"{name} (shape)", *sizes, (), math.inf, math.inf, tolerance, absolute)
        elif ours.size == 0:
            row = Row(section, name, 0.0, 0.0, (), 0.0, 0.0, tolerance, absolute)
        else:
            difference = np.abs(ours - reference)
            where = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), ours.shape)
            max_abs, scale = float(difference[where]), float(np.abs(reference).max())
            if by_norm:
                max_rel, scale = float(np.linalg.norm(difference)), float(np.linalg.norm(reference))
            else:
                max_rel = max_abs
            max_rel /= max(scale, floor) or 1.0
            place = tuple(map(int, where))
            row = Row(
                section,
                name,
                float(ours[where]),
                float(reference[where]),
                place,
                max_abs,
                max_rel,
                tolerance,
                absolute,
            )
        before = self._rows.get((section, row.name))
        if before is None or not _margin(row) <= _margin(before):
            self._rows[section, row.name] = row

    def table(self, limit: int = 12) -> str:
        """Return a text table; of a section with more than ``limit`` rows, those nearest to failing."""
        lines = []
        for section in dict.fromkeys(row.section for row in self.rows):
            rows = [row for row in self.rows if row.section == section]
            shown = rows
            if len(rows) > limit:
                worst = sorted(rows, key=_margin, reverse=True)[:limit]
                shown = [row for row in rows if row in worst]
            lines.append(
                f"\n{section}" + (f" ({len(rows)} compared, the worst {limit} shown)" if shown != rows else "")
            )
            lines.append(f"  {'':52} {'max abs':>9} {'relative':>9} {'tolerance':>11}   where")
            for row in shown:
                limit_text = f"{row.tolerance:.0e} {'abs' if row.absolute else 'rel'}"
                mark = "" if row.ok else "  TOO FAR"
                place = ",".join(map(str, row.where))
                lines.append(
                    f"  {row.name[:52]:52} {row.max_abs:9.1e} {row.max_rel:9.1e} {limit_text:>11}   {place}{mark}"
                )
        lines.append(f"\n{len(self.rows)} compared, {self.num_failed} beyond their tolerance")
        return "\n".join(lines)

    def write_json(self, path: str | Path) -> None:
        """Write a list of all rows; what is not finite is null."""
        rows = [row._asdict() | {"ok": row.ok} for row in self.rows]
        write_json(Path(path), [{name: _json_value(value) for name, value in row.items()} for row in rows], indent=1)

    def write_html(self, path: str | Path, title: str) -> None:
        """Write one self-contained page: the error of every row as a plot, then as a table."""
        sections = {}
        for row in self.rows:
            sections.setdefault(row.section, []).append(row)
        page.write_page(
            path,
            Path(__file__).with_suffix(".html.j2"),
            title=title,
            num_rows=len(self.rows),
            num_failed=self.num_failed,
            sections=[{"name": name, "rows": rows, "plot": _plot(rows)} for name, rows in sections.items()],
        )


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _margin(row: Row) -> float:
    """Return how much of its tolerance a row uses."""
    error = row.max_abs if row.absolute else row.max_rel
    if math.isnan(error):
        return math.inf
    return error / row.tolerance if row.tolerance else (math.inf if error else 0.0)


_LOWEST = 1e-17  # of the plots; smaller errors, 0 among them, are drawn there


def _plot(rows: list[Row]) -> Markup | None:
    """Plot the relative error of each row, left to right in the order of the network, and the tolerance."""
    rows = [row for row in rows if not row.absolute]
    if not rows:
        return None
    figure = Figure(figsize=(10, 2.6))
    axes = figure.subplots()
    errors = np.clip(np.nan_to_num([row.max_rel for row in rows], nan=10.0), _LOWEST, 10.0)
    axes.bar(range(len(rows)), errors, color=["tab:blue" if row.ok else "tab:red" for row in rows])
    tolerances = [max(row.tolerance, _LOWEST) for row in rows]
    axes.step(range(len(rows)), tolerances, where="mid", color="tab:orange", label="tolerance")
    axes.set(yscale="log", ylim=(_LOWEST, 10.0), xlabel="row", ylabel="relative error")
    axes.legend(fontsize="small")
    return page.svg(figure)
