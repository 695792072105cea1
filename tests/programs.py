"""What programs do, read from their text when compiled or from their equations before."""

import math
import re
from collections.abc import Iterator

import jax

_COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


def collectives_in_loops(text: str) -> list[str]:
    """Return the instructions by which devices meet inside the loops of a compiled program, from ``as_text()``."""
    computations, name = {}, None
    for line in text.splitlines():
        if line.endswith("{") and (start := re.match(r"(?:ENTRY )?(%[\w.\-]+) ", line)):
            name = start[1]
            computations[name] = []
        elif name:
            computations[name].append(line.strip())
    found, seen, rest = [], set(), re.findall(r"(?:body|condition)=(%[\w.\-]+)", text)
    while rest:
        if (name := rest.pop()) in seen:
            continue
        seen.add(name)
        for line in computations[name]:
            rest += re.findall(r"%[\w.\-]+", " ".join(_CALLED.findall(line)))
            found += [line] if _COLLECTIVE.search(line) else []
    return found


def numbers_summed_over_devices(text: str) -> int:
    """Return how many numbers a device adds to those of the others, in a program compiled without loops around it."""
    shapes = [line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    sizes = re.findall(r"\w+\[([\d,]*)\]", " ".join(shapes))
    return sum(math.prod(map(int, filter(None, size.split(",")))) for size in sizes)


def equations(jaxpr) -> Iterator:
    """Yield the equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
