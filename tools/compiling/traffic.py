"""Bytes that an instruction moves between HBM and the chip, from the shapes of what it reads and writes."""

from tools.compiling.hlo import Array, Computation, Instruction, Module, arrays

# Instructions that only name memory, and those that end what was counted at its start.
_FREE = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "domain",
    "add-dependency",
    "while",
    "conditional",
    "call",
}
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding", "SPMDFullToShardShape")
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME_ELEMENTS = ("bitcast", "reshape", "convert", "copy", "transpose", "negate")


def traffic(module: Module, instruction: Instruction, computation: Computation) -> int:
    """Return the bytes that an instruction reads from HBM and writes to it, with the padding of their layouts.

    Of what is only sliced or gathered from, the slices count; of what is changed in place, the changed part, which
    is read and written.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and instruction.attribute("custom_call_target").strip('"') in _FREE_CALLS:
        return 0
    operands = computation.operands(instruction)
    if opcode == "copy-start":  # returns (destination, source, context)
        assert isinstance(instruction.shape, tuple)
        return sum(array.hbm_bytes for part in instruction.shape[:2] for array in arrays(part))
    if opcode == "async-start":
        inner = [module.computations[name] for name in instruction.called]
        return sum(traffic(module, part, scope) for scope in inner for part in scope.instructions.values())
    if opcode.endswith("-start"):  # returns what it was given beside the result
        return 2 * sum(_hbm_bytes(operand) for operand in operands)
    if opcode == "fusion":
        return _fusion(module, instruction, operands)
    if opcode in _SLICES:
        (result,) = instruction.arrays
        sliced = result.padded_bytes if _in_hbm(operands[0]) else 0
        return sliced + result.hbm_bytes + sum(map(_hbm_bytes, operands[1:]))
    if opcode in ("dynamic-update-slice", "scatter"):
        return _in_place(instruction, operands)
    return sum(map(_hbm_bytes, operands)) + sum(array.hbm_bytes for array in instruction.arrays)


def _in_place(instruction: Instruction, operands: list[Instruction]) -> int:
    """Return the bytes of a top-level update: the new values, the indices, and the part of the array twice."""
    updates = _updates(instruction, operands)
    given = operands[1:] if instruction.opcode == "dynamic-update-slice" else operands[len(updates) :]
    changed = sum(array.padded_bytes for update in updates for array in update.arrays)
    return sum(map(_hbm_bytes, given)) + (2 * changed if _in_hbm(instruction) else 0)


def _updates(instruction: Instruction, operands: list[Instruction]) -> list[Instruction]:
    """Return the operands that hold new values."""
    if instruction.opcode == "dynamic-update-slice":
        return operands[1:2]
    return operands[len(operands) // 2 + 1 :]  # arrays, indices, as many updates as arrays


def _fusion(module: Module, instruction: Instruction, operands: list[Instruction]) -> int:
    fused = module.computations[instruction.called[0]]
    total = 0
    for number, operand in enumerate(operands):
        if _in_hbm(operand):
            total += _read(module, fused, fused.parameters[number])
    written = [fused.root] if fused.root is not None else []
    if written and written[0].opcode == "tuple":
        written = fused.operands(written[0])
    results = instruction.arrays
    if len(results) != len(written):
        return total + sum(array.hbm_bytes for array in results)
    for array, root in zip(results, written, strict=True):
        if array.space == 0:
            total += _written(module, fused, root, array)
    return total


def _read(module: Module, fused: Computation, value: Instruction) -> int:
    """Return the bytes of a fusion's parameter, or of what is computed from it alone, that the fusion reads."""
    total, full = 0, sum(array.padded_bytes for array in value.arrays)
    (kind,) = {array.bits for array in value.arrays} or {8}
    for user in fused.users[value.name]:
        first = user.operands[0] == value.name and user.operands.count(value.name) == 1
        if user.opcode in _SLICES and first:
            total += sum(array.padded_bytes * kind // array.bits for array in user.arrays)
        elif user.opcode in ("dynamic-update-slice", "scatter") and first:
            continue  # changed in place
        elif user.opcode in _SAME_ELEMENTS:
            (inner,) = {array.bits for array in user.arrays}
            total += _read(module, fused, user) * kind // inner
        elif user.opcode == "fusion":
            inside = module.computations[user.called[0]]
            numbers = [number for number, name in enumerate(user.operands) if name == value.name]
            total += sum(_read(module, inside, inside.parameters[number]) for number in numbers)
        else:
            return full
    if fused.root is value:
        return full
    return min(total, full)


def _written(module: Module, fused: Computation, root: Instruction, array: Array) -> int:
    """Return the bytes that a fusion writes for one of its results."""
    while root.opcode in ("bitcast", "copy", "reshape"):
        root = fused.operands(root)[0]
    if root.opcode in ("dynamic-update-slice", "scatter"):
        updates = _updates(root, fused.operands(root))
        return min(2 * sum(part.padded_bytes for update in updates for part in update.arrays), 2 * array.padded_bytes)
    if root.opcode == "fusion":
        inside = module.computations[root.called[0]]
        if inside.root is not None and inside.root.opcode != "tuple":
            return _written(module, inside, inside.root, array)
    return array.padded_bytes


def _hbm_bytes(instruction: Instruction) -> int:
    return sum(array.hbm_bytes for array in instruction.arrays)


def _in_hbm(instruction: Instruction) -> bool:
    return any(array.space == 0 for array in instruction.arrays)
