"""Memory of a program by kind, from XLA's buffer assignment, and the largest values in it."""

import collections
import re
from pathlib import Path
from typing import NamedTuple

from tools.compiling.compiler import Compiled
from tools.compiling.hlo import Array, Instruction, Module

_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(?:, color (\d+))?, (.*)")
_PEAK = re.compile(r"^ +Live ranges at \d+ \(peak\):$", re.MULTILINE)
_VALUE = re.compile(r"^ +(\S+?)\{([\d,]*)\}: (\d+) bytes", re.MULTILINE)


def memory_by_kind(compiled: Compiled) -> dict:
    """Return the bytes of HBM that a program takes on each chip.

    Returns:
        "arguments"; "aliased", the part of these that results are written to; "outputs", the other results;
        "constants"; "temporaries"; "code", None where it was not generated; and "total".
    """
    kinds = dict.fromkeys(("arguments", "aliased", "outputs", "constants", "temporaries"), 0)
    for size, color, what in _ALLOCATION.findall(compiled.buffers):
        if (color and color != "0") or "thread-local" in what:
            continue
        if what.startswith("parameter"):
            kinds["arguments"] += int(size)
            kinds["aliased"] += int(size) if "maybe-live-out" in what else 0
        elif what.startswith("constant"):
            kinds["constants"] += int(size)
        elif "live-out" in what or what.startswith("output"):
            kinds["outputs"] += int(size)
        else:
            kinds["temporaries"] += int(size)
    total = sum(kinds.values()) - kinds["aliased"] + (compiled.code_bytes or 0)
    return {**kinds, "code": compiled.code_bytes, "total": total}


class Buffer(NamedTuple):
    """Values of one shape that one place of the code asks for, in memory together."""

    num_bytes: int  # of all of them
    times: int
    shape: str
    place: str  # "file:line", the name of an argument, or that of the instruction


def largest_buffers(module: Module, compiled: Compiled, root: Path, limit: int) -> list[Buffer]:
    """Return what takes most of HBM when it is fullest, largest first."""
    found = _PEAK.search(compiled.live_ranges)
    if found is None:
        return []
    instructions = {
        instruction.name: (instruction, computation)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
    }
    groups: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for name, index, size in _VALUE.findall(compiled.live_ranges, found.end()):
        if name not in instructions:
            continue
        instruction, computation = instructions[name]
        array = _element(instruction, index)
        if array is not None and array.space == 0:
            argument = re.search(r'op_name="([^"]*)"', instruction.attributes)
            if instruction.opcode == "parameter" and argument and computation is module.entry:
                place = argument[1].replace("\\'", "'")
            else:
                place = module.place_near(instruction, computation, root) or name
            groups[str(array), place].append(int(size))
    buffers = [Buffer(sum(sizes), len(sizes), *key) for key, sizes in groups.items()]
    return sorted(buffers, reverse=True)[:limit]


def _element(instruction: Instruction, index: str) -> Array | None:
    """Return the array at an index such as "1" or "0,2" of a result; None of a tuple, which holds only addresses."""
    shape = instruction.shape
    for number in index.split(","):
        if number and isinstance(shape, tuple):
            shape = shape[int(number)]
    return shape if isinstance(shape, Array) else None
