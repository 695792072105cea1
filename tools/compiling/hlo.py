"""A parser of XLA's text of optimized programs (HLO): computations, instructions, shapes with their layouts.

It reads what ``xla_dump_to`` writes for TPUs and GPUs, and keeps only what the other modules use.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_NEAR = 6  # instructions between XLA's own copies and those of the project's code
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Array:
    """An array as it lies in memory."""

    dtype: str  # such as bf16
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()  # axes, the one that is contiguous first
    tiles: tuple[
        tuple[int, ...], ...
    ] = ()  # T(8,128)(2,1): blocks to which the last axes are padded, then blocks of these
    space: int = 0  # 0: HBM; others are on the chip, such as 1, a TPU's vector memory

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return _BITS.get(self.dtype) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", self.dtype))

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return 0 if self.dtype in ("token", "opaque") else math.prod(self.dims) * self.bits // 8

    @functools.cached_property
    def padded_bytes(self) -> int:
        """Bytes in memory, with the padding of the tiles."""
        physical = [self.dims[axis] for axis in reversed(self.order)] if self.order else list(self.dims)
        for tile in self.tiles:
            physical = [1] * (len(tile) - len(physical)) + physical
            split = len(physical) - len(tile)
            blocks = [-(-size // block) for size, block in zip(physical[split:], tile, strict=True)]
            physical = [*physical[:split], *blocks, *tile]
        return 0 if self.dtype in ("token", "opaque") else math.prod(physical) * self.bits // 8

    @property
    def hbm_bytes(self) -> int:
        """Bytes in HBM: none of an array on the chip."""
        return self.padded_bytes if self.space == 0 else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


Shape = Array | tuple["Shape", ...]


def arrays(shape: Shape) -> Iterator[Array]:
    """Yield the arrays of a shape, which may be a tuple of tuples."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from arrays(part)


@dataclass
class Instruction:
    """One instruction: ``name = shape opcode(operands), attributes``."""

    name: str
    shape: Shape
    opcode: str
    operands: list[str]
    arguments: str  # text between the parentheses: names of operands, the value of a constant, a parameter's number
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """The arrays that it returns."""
        return list(arrays(self.shape))

    def attribute(self, name: str) -> str:
        """Return the value of an attribute such as ``window={...}`` or ``body=%name``, empty if there is none."""
        found = re.search(rf"\b{name}=(\{{[^{{}}]*\}}|[^,\s]+)", self.attributes)
        return found[1].strip("{}%") if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs: of a fusion, call, asynchronous operation, or the branches."""
        names = [self.attribute(name) for name in ("calls", "to_apply", "true_computation", "false_computation")]
        names += [name.strip(" %") for name in self.attribute("branch_computations").split(",")]
        return [name for name in names if name]


@dataclass
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by their number."""
        found = (instruction for instruction in self.instructions.values() if instruction.opcode == "parameter")
        return {int(instruction.arguments): instruction for instruction in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each one's result, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions whose results an instruction takes."""
        return [self.instructions[name] for name in instruction.operands]


@dataclass
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: Computation
    frames: dict[int, tuple[str, int, int]]  # of stack frames: file, line, id of the frame that called

    def place(self, instruction: Instruction, root: Path) -> str:
        """Return where the project's code asked for an instruction, as "file:line" below ``root``; else ""."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        frame, seen = int(found[1]) if found else 0, set()
        while frame in self.frames and frame not in seen:
            seen.add(frame)
            file, line, parent = self.frames[frame]
            if Path(file).is_relative_to(root) and not Path(file).is_relative_to(root / "tools"):
                return f"{Path(file).relative_to(root)}:{line}"
            frame = parent
        inline = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
        if inline and Path(inline[1]).is_relative_to(root):
            return f"{Path(inline[1]).relative_to(root)}:{inline[2]}"
        for name in instruction.called:  # what XLA has put together has no place of its own
            computation = self.computations.get(name)
            for inner in reversed(computation.instructions.values()) if computation else ():
                if place := self.place(inner, root):
                    return place
        return ""

    def place_near(self, instruction: Instruction, computation: Computation, root: Path) -> str:
        """Return the place of an instruction; of XLA's own copies, that of the next one that uses the result.

        Where nothing near uses it, the place where what is copied comes from.
        """
        for neighbours in (
            computation.users.__getitem__,
            lambda name: computation.operands(computation.instructions[name]),
        ):
            nearest = [instruction]
            for _ in range(_NEAR):
                for candidate in nearest:
                    if place := self.place(candidate, root):
                        return place
                nearest = [found for candidate in nearest for found in neighbours(candidate.name)][:_NEAR]
        return ""


_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_FRAME_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def parse(text: str) -> Module:
    """Parse the text of a program."""
    computations: dict[str, Computation] = {}
    entry = current = None
    lines = text.splitlines()
    for line in lines:
        if current is None:
            if found := _COMPUTATION.match(line):
                current = computations[found[2]] = Computation(found[2])
                entry = current if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _parse_instruction(found[2], re.sub(r"/\*.*?\*/", "", line[found.end() :]))
            current.instructions[instruction.name] = instruction
            current.root = instruction if found[1] else current.root
    if entry is None:
        raise ValueError("the text of the program has no entry computation")
    return Module(computations, entry, _parse_frames(lines))


def _parse_instruction(name: str, text: str) -> Instruction:
    shape, end = parse_shape(text)
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"no operation in {text[:200]!r}")
    start = opcode.end()
    close = _closing(text, start)
    arguments = text[start:close]
    operands = [] if opcode[1] in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", arguments)
    return Instruction(name, shape, opcode[1], operands, arguments, text[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Return where the parenthesis ends that was opened before ``start``."""
    depth = 1
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is not closed in {text[:200]!r}")


def parse_shape(text: str, start: int = 0) -> tuple[Shape, int]:
    """Parse a shape such as ``(f32[2,3]{1,0:T(8,128)}, s32[])``; return it and where it ends."""
    if text[start] != "(":
        found = _ARRAY.match(text, start)
        if found is None:
            raise ValueError(f"no shape in {text[start : start + 100]!r}")
        return _array(found[1], found[2], found[3] or ""), found.end()
    parts, position = [], start + 1
    while text[position] != ")":
        if text[position] in ", ":
            position += 1
            continue
        part, position = parse_shape(text, position)
        parts.append(part)
    return tuple(parts), position + 1


@functools.cache
def _array(dtype: str, dims: str, layout: str) -> Array:
    order, _, rest = layout.partition(":")
    tiling = re.search(r"T((?:\([\d,*]*\))+)", rest)
    tiles = re.findall(r"\(([\d,]+)\)", tiling[1]) if tiling else []
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
        tuple(int(axis) for axis in order.split(",") if axis.isdigit()),
        tuple(tuple(map(int, tile.split(","))) for tile in tiles),
        int(space[1]) if space else 0,
    )


def _parse_frames(lines: list[str]) -> dict[int, tuple[str, int, int]]:
    tables: dict[str, dict[int, str]] = {name: {} for name in _FRAME_TABLES}
    current = None
    for line in lines:
        if line in tables:
            current = tables[line]
        elif current is not None:
            number, _, content = line.partition(" ")
            if number.isdigit():
                current[int(number)] = content
            elif line:
                break  # the first computation
    names = {number: content.strip('"') for number, content in tables["FileNames"].items()}
    frames = {}
    for frame, content in tables["StackFrames"].items():
        location = tables["FileLocations"].get(_number(content, "file_location_id"), "")
        file = names.get(_number(location, "file_name_id"), "")
        frames[frame] = file, _number(location, "line"), _number(content, "parent_frame_id")
    return frames


def _number(text: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", text)
    return int(found[1]) if found else 0
