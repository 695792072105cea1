"""The report of a compiled program: as text, as JSON and as a row of a table."""

from collections.abc import Mapping
from pathlib import Path

from tools.compiling.analysis import analyse, notes, roofline
from tools.compiling.compiler import ROOT, Compiled
from tools.compiling.hlo import parse
from tools.compiling.memory import largest_buffers, memory_by_kind
from tools.compiling.targets import Target

_BUFFERS, _PLACES = 15, 15  # lines of the text
_ANY_RATE = 1e5  # images/s, beyond which a part of the machine is as good as unused
HEADER = (
    "| target | remat | global batch | images a chip | memory a chip, GiB | of | HBM traffic a step and chip, GB "
    "| GFLOP an image | collectives, MB a step | in loops | images/s a chip, at most (estimate) |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def make_report(compiled: Compiled, target: Target, settings: Mapping, root: Path = ROOT) -> dict:
    """Return all that is known of a compiled program, as JSON holds it.

    Args:
        compiled: What XLA has written.
        target: What it was compiled for.
        settings: What was compiled, as the child process got it.
        root: Folder of the project.
    """
    config = settings["config"]
    batch_size, dtype = config["batch_size"], config["model"]["dtype"]
    memory = memory_by_kind(compiled)
    report: dict = {
        "topology": settings["topology"],
        "slices": settings["slices"],
        "chips": target.chips,
        "what": settings["what"],
        "batch_size": batch_size,
        "images_per_chip": batch_size / target.chips,
        "image_size": settings["image_size"],
        "dtype": dtype,
        "remat": config["model"]["remat"],
        "memory_bytes": memory,
        "memory_limit_bytes": target.chip.memory,
        "fits": not compiled.refused and memory["total"] <= target.chip.memory,
    }
    module = parse(compiled.text)
    costs = analyse(module, root, dtype)
    limits = roofline(costs, target, batch_size / target.chips)
    return report | {
        "largest_buffers": [buffer._asdict() for buffer in largest_buffers(module, compiled, root, _BUFFERS)],
        "hbm_traffic_bytes": costs.traffic,
        "hbm_traffic_by_place": dict(costs.traffic_by_place[:_PLACES]),
        "flops_per_image": costs.flops * target.chips / batch_size,
        "collectives": [item._asdict() for item in costs.collectives],
        "loops": [loop._asdict() for loop in costs.loops],
        "warnings": costs.warnings,
        "notes": notes(costs, dtype),
        "roofline_images_per_second": limits,
        "images_per_second_estimate": min(limits.values()) if limits else None,
    }


def as_text(report: Mapping, target: Target) -> str:
    """Return a report for people."""
    height, width = report["image_size"]
    lines = [
        f"{report['what']} for {target}, {target.chips} chips, batch {report['batch_size']}: "
        f"{report['images_per_chip']:g} images of {height}x{width} a chip, {report['dtype']}. Compiled, not run.",
        "",
        *_memory_lines(report),
    ]
    if report["largest_buffers"]:
        lines += ["", "Largest buffers, when memory is fullest:"]
        lines += [
            f"  {buffer['num_bytes'] / 2**20:8,.0f} MiB  {buffer['times']:3} x {buffer['shape']:28} {buffer['place']}"
            for buffer in report["largest_buffers"]
        ]
    lines += ["", f"FLOPs an image: {report['flops_per_image'] / 1e9:,.0f} G", ""]
    lines += [f"HBM traffic a step and chip: {report['hbm_traffic_bytes'] / 1e9:,.1f} GB, most of it at"]
    lines += [f"  {size / 1e9:8,.2f} GB  {place}" for place, size in report["hbm_traffic_by_place"].items()]
    lines += ["", "Loops, with the HBM traffic of all rounds:"]
    for loop in report["loops"]:
        trips = "?" if loop["trips"] is None else loop["trips"]
        lines.append(f"  {loop['traffic'] / 1e9:8,.2f} GB  {trips:>4} rounds  {loop['place']}")
    lines += ["", "Collectives a step, with what a chip puts in:"]
    lines += [
        f"  {item['bytes'] / 1e6:8,.2f} MB  {item['times']:4} x {item['op']} of {item['dtype']}"
        + (" inside loops" if item["in_loop"] else "")
        for item in report["collectives"]
    ] or ["  none"]
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += ["", "Images/s a chip that each part would allow by itself, were it always busy (estimate):"]
    lines += [
        f"  {name:8} {rate:8,.1f}" if rate < _ANY_RATE else f"  {name:8} no limit"
        for name, rate in report["roofline_images_per_second"].items()
    ]
    return "\n".join(lines)


def _memory_lines(report: Mapping) -> list[str]:
    memory, limit = report["memory_bytes"], report["memory_limit_bytes"]
    lines = ["Memory a chip:"]
    for name, size in memory.items():
        if size is not None and name != "total":
            within = " (part of the arguments)" if name == "aliased" else ""
            lines.append(f"  {name:12} {size / 2**30:7.2f} GiB{within}")
    if memory["code"] is None:
        lines.append("  code         not known: --full compiles to the end")
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    lines.append(f"  total        {memory['total'] / 2**30:7.2f} GiB of {limit / 2**30:.2f}: {verdict}")
    return lines


def as_row(report: Mapping, target: Target) -> str:
    """Return a row of the table that HEADER begins."""
    collectives = report["collectives"]
    cells = [
        str(target),
        "yes" if report["remat"] else "no",
        str(report["batch_size"]),
        f"{report['images_per_chip']:g}",
        f"{report['memory_bytes']['total'] / 2**30:.1f}" + ("" if report["fits"] else ", does not fit"),
        f"{report['memory_limit_bytes'] / 2**30:.2f}",
        f"{report['hbm_traffic_bytes'] / 1e9:.0f}",
        f"{report['flops_per_image'] / 1e9:,.0f}",
        f"{sum(item['bytes'] for item in collectives) / 1e6:.0f}",
        str(sum(item["times"] for item in collectives if item["in_loop"])),
        f"{report['images_per_second_estimate']:.0f} ({_narrowest(report)})",
    ]
    return f"| {' | '.join(cells)} |"


def _narrowest(report: Mapping) -> str:
    limits = report["roofline_images_per_second"]
    return min(limits, key=limits.get)
