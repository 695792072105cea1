"""What a program runs and how often: loops with their trip counts, and the costly branch of each conditional."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tools.compiling.hlo import Computation, Instruction, Module

# Of loops that end when nothing changes any more, which are those of NMS: boxes settle within a few rounds.
ASSUMED_ROUNDS = 10
_SAME_VALUE = ("copy", "bitcast", "reshape", "convert", "broadcast", "optimization-barrier", "copy-done", "copy-start")


class Execution(NamedTuple):
    """An instruction that a program runs."""

    instruction: Instruction
    computation: Computation
    times: int  # in one run of the program
    loops: tuple[Instruction, ...]  # around it, the outermost first


def executions(module: Module, weigh: Callable[[Instruction, Computation], float]) -> Iterator[Execution]:
    """Yield the instructions that a program runs, other than loops, conditionals and calls.

    Args:
        module: The program.
        weigh: Cost of an instruction, by which the branch of a conditional is chosen that costs most.
    """

    def run(computation: Computation, times: int, loops: tuple[Instruction, ...]) -> Iterator[Execution]:
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                rounds = (trip_count(module, instruction, computation) or ASSUMED_ROUNDS) * times
                for part in ("condition", "body"):
                    inner = module.computations[instruction.attribute(part)]
                    yield from run(inner, rounds, (*loops, instruction))
            elif instruction.opcode == "conditional":
                yield from run(max(_branches(module, instruction), key=weight), times, loops)
            elif instruction.opcode == "call":
                for name in instruction.called:
                    yield from run(module.computations[name], times, loops)
            else:
                yield Execution(instruction, computation, times, loops)

    @functools.cache
    def weight_of(name: str) -> float:
        inside = run(module.computations[name], 1, ())
        return sum(weigh(execution.instruction, execution.computation) * execution.times for execution in inside)

    def weight(computation: Computation) -> float:
        return weight_of(computation.name)

    yield from run(module.entry, 1, ())


def _branches(module: Module, instruction: Instruction) -> list[Computation]:
    return [module.computations[name] for name in instruction.called]


def uncounted_loops(module: Module) -> list[tuple[Instruction, Computation]]:
    """Return the loops of which no trip count can be told, and the computations that they are in."""
    return [
        (instruction, computation)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while" and trip_count(module, instruction, computation) is None
    ]


def trip_count(module: Module, loop: Instruction, computation: Computation) -> int | None:
    """Return how often a loop's body runs, or None where that depends on the data.

    XLA's own count where it has kept it. Else the loop must compare a counter with a constant, as those of
    ``jax.lax.scan`` and ``jax.lax.fori_loop`` do.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.attribute("condition")]
    comparison, scope = condition.root, condition
    bindings: dict[str, Instruction] = {}  # of the parameters of a fusion
    if comparison is not None and comparison.opcode == "fusion":
        scope = module.computations[comparison.called[0]]
        arguments = condition.operands(comparison)
        bindings = {parameter.name: arguments[i] for i, parameter in scope.parameters.items()}
        comparison = scope.root
    direction = comparison.attribute("direction") if comparison is not None and comparison.opcode == "compare" else ""
    if comparison is None or direction not in ("LT", "LE", "GT", "GE"):
        return None
    sides = [_resolve(operand, scope, bindings, condition) for operand in scope.operands(comparison)]
    if direction in ("GT", "GE"):  # limit > counter
        sides.reverse()
    counter, limit = sides
    index = _tuple_index(counter)
    end = _value(limit, loop, computation)
    if index is None or end is None:
        return None
    start = _initial(loop, computation, index)
    step = _step(module, loop, index)
    if start is None or not step or step < 0:
        return None
    return max(0, -(-(end + (direction in ("LE", "GE")) - start) // step))


def _resolve(instruction, scope, bindings, condition):
    """Follow an operand of the comparison to a constant or to an element of the loop's tuple."""
    while True:
        if instruction.name in bindings:
            instruction, scope, bindings = bindings[instruction.name], condition, {}
        elif instruction.opcode in _SAME_VALUE:
            instruction = scope.operands(instruction)[0]
        else:
            return instruction


def _tuple_index(instruction: Instruction) -> int | None:
    return int(instruction.attribute("index")) if instruction.opcode == "get-tuple-element" else None


def _value(instruction: Instruction, loop: Instruction, computation: Computation) -> int | None:
    """Return a limit: a constant, or an element of the loop's tuple that begins as one."""
    if instruction.opcode == "constant":
        return _constant(instruction)
    index = _tuple_index(instruction)
    return None if index is None else _initial(loop, computation, index)


def _constant(instruction: Instruction) -> int | None:
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _initial(loop: Instruction, computation: Computation, index: int) -> int | None:
    """Return the constant with which an element of a loop's tuple begins; None if it is none."""
    start = computation.operands(loop)[0]
    if start.opcode != "tuple":
        return None
    element = computation.operands(start)[index]
    while element.opcode in _SAME_VALUE:
        element = computation.operands(element)[0]
    return _constant(element) if element.opcode == "constant" else None


def _step(module: Module, loop: Instruction, index: int) -> int | None:
    """Return the constant that the body adds to an element of the loop's tuple."""
    body = module.computations[loop.attribute("body")]
    if body.root is None or body.root.opcode != "tuple":
        return None
    element = body.operands(body.root)[index]
    while element.opcode in _SAME_VALUE:
        element = body.operands(element)[0]
    scope, arguments = body, []
    if element.opcode == "fusion":
        scope, arguments = module.computations[element.called[0]], body.operands(element)
        element = scope.root or element
    if element.opcode != "add":
        return None
    numbers = []
    for operand in scope.operands(element):
        while operand.opcode in _SAME_VALUE:
            operand = scope.operands(operand)[0]
        if operand.opcode == "parameter" and arguments:
            operand = arguments[int(operand.arguments)]
            while operand.opcode in _SAME_VALUE:
                operand = body.operands(operand)[0]
        numbers.append(_constant(operand) if operand.opcode == "constant" else None)
    known = [number for number in numbers if number is not None]
    return known[0] if len(known) == 1 else None
