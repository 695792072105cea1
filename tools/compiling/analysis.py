"""What a compiled program costs a chip: memory, HBM traffic, FLOPs, collectives, and what looks wrong in it."""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.compiling.flops import products
from tools.compiling.hlo import Computation, Instruction, Module
from tools.compiling.loops import ASSUMED_ROUNDS, Execution, executions, trip_count
from tools.compiling.targets import Target
from tools.compiling.traffic import traffic

LARGE_COPY = 16 * 2**20  # bytes; smaller copies inside loops are not worth a warning
LARGE_PRODUCT = 1e9  # FLOPs in a step; smaller matrix products in float32 are those of boxes
_FLOPS_PER_BYTE = 240  # what a v5e can compute while it moves a byte; others are near, and branches differ by more
_COPIES = ("copy", "copy-start", "reshape", "transpose")  # a reshape that moves nothing is a bitcast
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
    "ragged-all-to-all",
    "send",
)


class Collective(NamedTuple):
    """Collectives of one kind."""

    op: str
    dtype: str
    in_loop: bool
    bytes: int  # of what a chip puts in, in a step
    times: int  # in a step
    places: tuple[str, ...]  # "file:line"


class Loop(NamedTuple):
    """A loop of the program."""

    place: str
    trips: int | None  # of one run of the loop; None if that depends on the data
    traffic: int  # bytes of HBM, of all its rounds in a step, those of the loops inside it too


class Costs(NamedTuple):
    """What a step costs a chip."""

    traffic: int  # bytes read from HBM and written to it
    flops: int
    traffic_by_place: list[tuple[str, int]]  # most first
    collectives: list[Collective]
    loops: list[Loop]
    warnings: list[str]


def analyse(module: Module, root: Path, compute_dtype: str) -> Costs:
    """Return what a program costs.

    Args:
        module: The optimized program.
        root: Folder of the project, to which places are relative.
        compute_dtype: Dtype of convolutions and matrix products that is wanted, such as bfloat16.
    """

    def weigh(instruction: Instruction, computation: Computation) -> float:
        flops = sum(flops for _, flops, _ in products(module, instruction, computation))
        return traffic(module, instruction, computation) + flops / _FLOPS_PER_BYTE

    run = list(executions(module, weigh))
    moved = [traffic(module, execution.instruction, execution.computation) * execution.times for execution in run]
    by_place: collections.Counter[str] = collections.Counter()
    for execution, num_bytes in zip(run, moved, strict=True):
        place = module.place_near(execution.instruction, execution.computation, root)
        by_place[place or "(unknown)"] += num_bytes
    flops, wide = _flops(module, run, root, compute_dtype)
    found = _collectives(module, run, root)
    warnings = [
        f"{item.op} of {item.dtype} inside a loop, {item.times} a step, at {', '.join(item.places)}"
        for item in found
        if item.in_loop
    ]
    warnings += [
        f"{item.op} adds {item.dtype}, {item.bytes / 1e6:.2f} MB a step: every addition is rounded"
        for item in found
        if item.op in ("all-reduce", "reduce-scatter") and item.dtype in ("bf16", "f16")
    ]
    return Costs(
        sum(moved),
        flops,
        by_place.most_common(),
        found,
        _loops(module, run, moved, root),
        warnings + _copies(module, run, root) + wide,
    )


def _flops(module: Module, run: Sequence[Execution], root: Path, compute_dtype: str) -> tuple[int, list[str]]:
    """Return the FLOPs of a step, and warnings of large products whose inputs have another dtype than is wanted."""
    wanted = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}[compute_dtype]
    total = 0
    others: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for execution in run:
        for product, flops, dtypes in products(module, execution.instruction, execution.computation):
            total += flops * execution.times
            if dtypes != {wanted}:
                kind = "convolution" if "conv_general" in product.attributes else "matrix product"
                place = module.place(product, root) or product.name
                others[kind, " and ".join(sorted(dtypes)), place] += flops * execution.times
    return total, [
        f"{kind} of {dtypes}, not {wanted}, {flops / 1e9:.1f} GFLOP a step and chip, at {place}"
        for (kind, dtypes, place), flops in others.most_common()
        if kind == "convolution" or flops >= LARGE_PRODUCT
    ]


def _collectives(module: Module, run: Sequence[Execution], root: Path) -> list[Collective]:
    totals: dict[tuple[str, str, bool], list] = {}
    for execution in run:
        for instruction, computation in _inside(module, execution.instruction, execution.computation):
            op = instruction.opcode.removesuffix("-start")
            if op not in _COLLECTIVES:
                continue
            sizes: collections.Counter[str] = collections.Counter()
            for operand in computation.operands(instruction):
                for array in operand.arrays:
                    sizes[array.dtype] += array.num_bytes
            for dtype, num_bytes in (+sizes).items():  # without tokens, which have no bytes
                total = totals.setdefault((op, dtype, bool(execution.loops)), [0, 0, {}])
                total[0] += num_bytes * execution.times
                total[1] += execution.times
                total[2][module.place(instruction, root)] = None
    return [Collective(*key, total[0], total[1], tuple(filter(None, total[2]))) for key, total in totals.items()]


def _inside(
    module: Module, instruction: Instruction, computation: Computation
) -> Iterable[tuple[Instruction, Computation]]:
    """Yield an instruction, and those in the fusion or asynchronous operation that it is."""
    yield instruction, computation
    if instruction.opcode in ("fusion", "async-start"):
        for name in instruction.called:
            for inner in module.computations[name].instructions.values():
                yield from _inside(module, inner, module.computations[name])


def _copies(module: Module, run: Sequence[Execution], root: Path) -> list[str]:
    """Return warnings of large arrays that are copied in every round of a loop."""
    found: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for execution in run:
        instruction = execution.instruction
        if not execution.loops or instruction.opcode not in _COPIES:
            continue
        if traffic(module, instruction, execution.computation) >= LARGE_COPY:
            place = module.place_near(instruction, execution.computation, root) or instruction.name
            loop = module.place(execution.loops[-1], root) or execution.loops[-1].name
            found[str(instruction.arrays[0]), loop, place] += execution.times
    return [
        f"{shape} is copied {times} times a step, inside the loop at {loop}, for {place}"
        for (shape, loop, place), times in found.items()
    ]


def _loops(module: Module, run: Sequence[Execution], moved: Sequence[int], root: Path) -> list[Loop]:
    """Return the loops that run, those with most traffic first."""
    by_loop: collections.Counter[str] = collections.Counter()
    for execution, num_bytes in zip(run, moved, strict=True):
        for loop in execution.loops:
            by_loop[loop.name] += num_bytes
    around = {
        instruction.name: computation
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    }
    loops = []
    for name, num_bytes in by_loop.most_common():
        instruction = around[name].instructions[name]
        place = module.place(instruction, root) or name
        loops.append(Loop(place, trip_count(module, instruction, around[name]), num_bytes))
    return loops


def notes(costs: Costs, compute_dtype: str) -> list[str]:
    """Return what the figures assume."""
    found = [
        f"{loop.place}: the number of rounds depends on the data; {ASSUMED_ROUNDS} are assumed"
        for loop in costs.loops
        if loop.trips is None
    ]
    if compute_dtype not in ("bfloat16", "float16"):
        found.append(f"the bound by computing is that of bfloat16; {compute_dtype} is several times slower")
    return found


def roofline(costs: Costs, target: Target, images: float) -> dict[str, float]:
    """Return the images/s a chip that each part of the machine would allow, were it the only one.

    Args:
        costs: Of a chip and step.
        target: The machine.
        images: Of a chip and step.
    """
    chip, num = target.chip, target.chips
    seconds = {"compute": costs.flops / chip.flops, "hbm": costs.traffic / chip.hbm}
    if num > 1:
        seconds["network"] = 0.0
    for item in costs.collectives if num > 1 else ():
        seconds["network"] += _exchange(item, target)
    return {name: images / duration for name, duration in seconds.items() if duration}


def _exchange(item: Collective, target: Target) -> float:
    """Return the seconds that collectives take: rings over the chips of a slice or node, then between these."""
    chip, groups = target.chip, target.groups
    in_group = target.chips // groups
    if item.op == "send":  # into which XLA divides what several TPU slices do together
        return item.bytes / chip.network
    # How often what a chip puts in, or one part of it for each chip, goes over a link.
    passes = {"all-reduce": 2 * (in_group - 1) / in_group, "all-gather": in_group - 1}
    seconds = passes.get(item.op, (in_group - 1) / in_group) * item.bytes / chip.links
    if chip.platform == "cuda" and groups > 1:
        passes = {"all-reduce": 2 * (groups - 1) / groups, "all-gather": in_group * (groups - 1)}
        seconds += passes.get(item.op, (groups - 1) / groups) * item.bytes / in_group / chip.network
    return seconds
