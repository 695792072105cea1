"""Floating-point operations of convolutions and matrix products: two for each pair of numbers that are multiplied."""

import functools
import math
import re
from collections.abc import Iterator

from tools.compiling.hlo import Array, Computation, Instruction, Module


def products(
    module: Module, instruction: Instruction, computation: Computation
) -> Iterator[tuple[Instruction, int, set[str]]]:
    """Yield the convolutions and matrix products in an instruction: each, its FLOPs and the dtypes of its inputs."""
    if instruction.opcode in ("fusion", "async-start"):
        for name in instruction.called:
            for inner in module.computations[name].instructions.values():
                yield from products(module, inner, module.computations[name])
        return
    target = instruction.attribute("custom_call_target").strip('"') if instruction.opcode == "custom-call" else ""
    if instruction.opcode not in ("convolution", "dot") and not target.startswith(("__cudnn$conv", "__cublas$")):
        return
    left, right = (operand.arrays[0] for operand in computation.operands(instruction)[:2])
    result = instruction.arrays[0]
    if instruction.opcode == "dot" or target.startswith("__cublas$"):
        flops = _dot(instruction, left, result)
    elif target == "__cudnn$convBackwardInput":  # (gradient, kernel) -> gradient of the input
        flops = _convolution(instruction, result, right, left)
    elif target == "__cudnn$convBackwardFilter":  # (input, gradient) -> gradient of the kernel
        flops = _convolution(instruction, left, result, right)
    else:
        flops = _convolution(instruction, left, right, result)
    yield instruction, flops, {left.dtype, right.dtype}


def _dot(instruction: Instruction, left: Array, result: Array) -> int:
    in_text = instruction.attribute("lhs_contracting_dims")
    in_config = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)  # of cuBLAS
    axes = re.findall(r"\d+", in_config[1] if in_config else in_text)
    return 2 * math.prod(result.dims) * math.prod(left.dims[int(axis)] for axis in axes)


def _convolution(instruction: Instruction, left: Array, right: Array, result: Array) -> int:
    """Return the FLOPs of a convolution without products with padding and with the zeros between strided values."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert found is not None, instruction.attributes
    of_left, of_right, of_result = found.groups()
    total = 2 * result.dims[of_result.index("b")] * result.dims[of_result.index("f")] * right.dims[of_right.index("i")]
    window = dict(part.split("=") for part in instruction.attribute("window").split())
    for number, axis in enumerate(sorted(label for label in of_left if label.isdigit())):
        settings = []
        for name, default in (("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")):
            value = window[name].split("x")[number] if name in window else default
            settings.append(int(value.split("_")[0]))
        total *= _pairs(
            left.dims[of_left.index(axis)],
            right.dims[of_right.index(axis)],
            result.dims[of_result.index(axis)],
            *settings,
        )
    return total


@functools.cache
def _pairs(size: int, window: int, results: int, stride: int, pad: int, dilation: int, window_dilation: int) -> int:
    """Return how many (result, window position) pairs along one axis meet a value of the input."""
    last = (size - 1) * dilation
    total = 0
    for position in range(window):
        offset = position * window_dilation - pad
        # Results o with 0 <= o * stride + offset <= last, where that is a multiple of the dilation.
        total += sum(
            0 <= place <= last and place % dilation == 0
            for place in range(offset, offset + (results - 1) * stride + 1, stride)
        )
    return total
