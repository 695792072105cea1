"""What compiled programs do, read from their text."""

import re

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
