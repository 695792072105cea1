"""A list of compared numbers: how far ours are from the reference's, as a table, JSON and one HTML page."""

import html
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np


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
          by_norm: relative is the norm of the difference over that of the reference, instead of the largest difference
            over the largest value.
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
        failed = sum(not row.ok for row in self.rows)
        lines.append(f"\n{len(self.rows)} compared, {failed} beyond their tolerance")
        return "\n".join(lines)

    def write_json(self, path: str | Path) -> None:
        """Write a list of all rows."""
        rows = [row._asdict() | {"ok": row.ok} for row in self.rows]
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")

    def write_html(self, path: str | Path, title: str) -> None:
        """Write one self-contained page: the error of every row as a plot, then as a table."""
        parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>{_STYLE}"]
        parts.append(
            f"<h1>{html.escape(title)}</h1><p>{html.escape(self.table().splitlines()[-1])}. Relative means the "
        )
        parts.append("largest difference over the largest absolute value of the reference in the same array.</p>")
        for section in dict.fromkeys(row.section for row in self.rows):
            rows = [row for row in self.rows if row.section == section]
            parts.append(f"<h2>{html.escape(section)}</h2>{_plot(rows)}{_html_table(rows)}")
        Path(path).write_text("".join(parts) + "</html>\n", encoding="utf-8")


def _margin(row: Row) -> float:
    """Return how much of its tolerance a row uses."""
    error = row.max_abs if row.absolute else row.max_rel
    if math.isnan(error):
        return math.inf
    return error / row.tolerance if row.tolerance else (math.inf if error else 0.0)


_STYLE = """<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { padding: 2px 8px; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left; white-space: normal; word-break: break-all }
tr:nth-child(even) { background: #f4f4f4 } .bad { background: #f6c1c1 !important } svg { width: 100%; height: auto }
details { margin: 0.5em 0 }
</style>"""

_PLOT_WIDTH, _PLOT_HEIGHT, _LEFT, _LOWEST, _HIGHEST = 1000, 220, 50, -17, 1


def _plot(rows: list[Row]) -> str:
    """Draw the decimal logarithm of the relative error by row, left to right in network order, and the tolerance."""

    def y(value):
        exponent = math.log10(value) if value > 0 else _LOWEST
        exponent = min(max(exponent if not math.isnan(exponent) else _HIGHEST, _LOWEST), _HIGHEST)
        return 10 + (_HIGHEST - exponent) / (_HIGHEST - _LOWEST) * (_PLOT_HEIGHT - 30)

    rows = [row for row in rows if not row.absolute]
    if not rows:
        return ""
    step = (_PLOT_WIDTH - _LEFT - 10) / len(rows)
    parts = [f'<svg viewBox="0 0 {_PLOT_WIDTH} {_PLOT_HEIGHT}" role="img" aria-label="relative error by row">']
    for exponent in range(_LOWEST + 1, _HIGHEST, 4):
        parts.append(
            f'<line x1="{_LEFT}" x2="{_PLOT_WIDTH}" y1="{y(10.0**exponent):.1f}" y2="{y(10.0**exponent):.1f}" '
            f'stroke="#ddd"/><text x="{_LEFT - 6}" y="{y(10.0**exponent) + 4:.1f}" font-size="11" '
            f'text-anchor="end">1e{exponent}</text>'
        )
    for i, row in enumerate(rows):
        x, top = _LEFT + i * step, y(row.max_rel)
        color = "#3b6fb6" if row.ok else "#c23b3b"
        parts.append(
            f'<rect x="{x + step * 0.1:.1f}" y="{top:.1f}" width="{step * 0.8:.2f}" '
            f'height="{_PLOT_HEIGHT - 20 - top:.1f}" fill="{color}"><title>{html.escape(row.name)}: {row.max_rel:.1e}'
            f"</title></rect>"
            f'<line x1="{x:.1f}" x2="{x + step:.1f}" y1="{y(row.tolerance):.1f}" y2="{y(row.tolerance):.1f}" '
            f'stroke="#d08a00" stroke-width="2"/>'
        )
    caption = f"{rows[0].name} … {rows[-1].name}; orange: the tolerance" if len(rows) > 1 else rows[0].name
    parts.append(f'<text x="{_LEFT}" y="{_PLOT_HEIGHT - 5}" font-size="11">{html.escape(caption)}</text></svg>')
    return "".join(parts)


def _html_table(rows: list[Row]) -> str:
    lines = ["<details open>" if len(rows) <= 40 else "<details>", f"<summary>{len(rows)} rows</summary><table>"]
    lines.append("<tr><th>name<th>ours<th>reference<th>max abs<th>relative<th>tolerance<th>where</tr>")
    for row in rows:
        cells = (
            html.escape(row.name),
            f"{row.ours:.9g}",
            f"{row.reference:.9g}",
            f"{row.max_abs:.1e}",
            f"{row.max_rel:.1e}",
            f"{row.tolerance:.0e} {'abs' if row.absolute else 'rel'}",
            ",".join(map(str, row.where)),
        )
        lines.append(f"<tr{'' if row.ok else ' class=bad'}><td>" + "<td>".join(cells) + "</tr>")
    return "".join(lines) + "</table></details>"
