"""Measurements in docs/benchmarks.md: a table for every subject, below the device that it was measured on."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.benchmarks.timing import Row, cell


def write_docs(path: str | Path, subject: str, rows: Sequence[Row], environment: Mapping) -> None:
    """Put the rows of a subject in place of those that the document has, in the section of the device.

    Args:
        path: a document with the sections "### CPU" and "### GPU", in them "#### subject" for each that was measured.
        subject: as tools/benchmark.py calls it.
        rows: what was measured.
        environment: as timing.environment returns it.
    """
    document = Path(path).read_text()
    device = "GPU" if environment["hardware"]["gpu"] else "CPU"
    start = document.index(f"### {device}\n")
    end = _next_heading(document, start + 1, "### ")
    section = document[start:end]
    block = _block(subject, rows, environment)
    found = section.find(f"#### {subject}\n")
    if found < 0:
        section = f"{section.rstrip()}\n\n{block}\n"
    else:
        section = section[:found] + block + "\n" + section[_next_heading(section, found + 1, "#### ") :]
    Path(path).write_text(document[:start] + section + document[end:])


def _next_heading(text: str, start: int, level: str) -> int:
    """Return where the next heading of a level, or of one above, begins."""
    found = re.compile(rf"^#{{1,{len(level) - 1}}} ", re.MULTILINE).search(text, start)
    return found.start() if found else len(text)


def _block(subject: str, rows: Sequence[Row], environment: Mapping) -> str:
    hardware, versions = environment["hardware"], environment["versions"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    names = ("python", "jax", "flax", "torch", "torchvision", "pycocotools", "faster-coco-eval")
    software = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    lines = [
        f"#### {subject}",
        "",
        f"Commit {environment['commit']}, {environment['date']}, {where}; {software}.",
    ]
    references = {row.reference_name for row in rows if row.reference_name}
    lines += [f"References: {'; '.join(sorted(references))}."] if references else []
    lines += ["", "| | ours | reference | ratio |", "|---|---|---|---|"]
    for row in rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.name} | {cell(row.ours, row.unit)} | {cell(row.reference, row.unit) or '–'} | {ratio} |")
    notes = dict.fromkeys(row.settings["at"] for row in rows if "at" in row.settings)
    if notes:
        lines += ["", "Measured at sizes as follows.", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"
