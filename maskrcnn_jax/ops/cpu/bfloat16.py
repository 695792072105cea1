"""bfloat16 on CPUs that multiply it in hardware: matrix products, and convolutions made of them.

XLA has fast products of bfloat16 only where their result is float32; everything else it converts to float32 and back.
That goes for copies too: it converts the whole of an array to write a few rows of it. So rows are moved as uint16.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32

_CPUINFO = Path("/proc/cpuinfo")
# Cells of the output that are computed at once, about: few enough for the caches.
_STRIP_CELLS = 2048


@functools.cache
def _processor() -> tuple[str, frozenset[str]]:
    """Return the vendor and the features of this processor; nothing where there is no Linux to ask."""
    try:
        lines = dict(line.split(":", 1) for line in _CPUINFO.read_text().splitlines() if ":" in line)
    except OSError:
        return "", frozenset()
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    return fields.get("vendor_id", ""), frozenset(fields.get("flags", "").split())


def has_products() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32.

    Those with AMX do, and AMD's with AVX512-BF16; Intel's with AVX512-BF16 alone gain nothing.
    """
    vendor, features = _processor()
    return "amx_bf16" in features or (vendor == "AuthenticAMD" and "avx512_bf16" in features)


def has_tiles() -> bool:
    """Return whether this processor has AMX, with which :func:`convolve` is faster than Winograd's algorithm."""
    return "amx_bf16" in _processor()[1]


@jax.custom_vjp
def matmul(x: BFloat16[Array, "*B K"], kernel: BFloat16[Array, "K ..."]) -> BFloat16[Array, "..."]:
    """Contract the last axis of x with the first of kernel; sums are in float32, and rounded once."""
    return _wide_product(x, kernel).astype(x.dtype)


def _matmul_forward(x, kernel):
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, gradient):
    x, kernel = residuals
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    columns = kernel.reshape(len(kernel), math.prod(kernel.shape[1:]))
    gradient = gradient.reshape(len(rows), columns.shape[1])
    return matmul(gradient, columns.T).reshape(x.shape), matmul(rows.T, gradient).reshape(kernel.shape)


matmul.defvjp(_matmul_forward, _matmul_backward)


def convolve(
    x: BFloat16[Array, "N H W K"], kernel: BFloat16[Array, "S S K C"], *, stride: int
) -> BFloat16[Array, "N _ _ C"]:
    """Convolve with (S - 1) / 2 zeros around, as lax.conv_general_dilated does, up to rounding.

    Args:
        x: [N, H, W, K].
        kernel: [S, S, K, C], S odd.
        stride: of both axes.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C].
    """
    strips = _Strips(x.shape, len(kernel), stride)
    inputs, windows = strips.sort(x), kernel.reshape(-1, *kernel.shape[2:])

    def compute(outputs, start):
        parts = [_wide_product(*pair) for pair in zip(strips.cut(inputs, start), windows, strict=True)]
        sums = functools.reduce(jnp.add, parts).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(outputs, _bits(sums), start, 0), None

    outputs = jnp.zeros((strips.starts[-1] + strips.length, kernel.shape[-1]), jnp.uint16)
    return _floats(strips.collect(jax.lax.scan(compute, outputs, strips.starts)[0]))


def conv3x3_gradients(
    x: BFloat16[Array, "N H W K"], kernel: BFloat16[Array, "3 3 K C"], gradient: BFloat16[Array, "N H W C"]
) -> tuple[BFloat16[Array, "N H W K"], BFloat16[Array, "3 3 K C"]]:
    """Return the gradients of x and kernel from that of :func:`convolve` with stride 1."""
    strips = _Strips(x.shape, side=3, stride=1)
    # Turned, because XLA's products are fast only along the last axis of the first factor.
    inputs, gradients = strips.sort(x).swapaxes(1, 2), strips.spread(gradient)

    def add(total, start):
        by_output = _floats(jax.lax.dynamic_slice_in_dim(gradients, start, strips.length))
        columns = strips.cut(inputs, start, axis=2)
        return total + jnp.stack([_wide_product(cells, by_output) for cells in columns]), None

    total = jnp.zeros((9, *kernel.shape[2:]), jnp.float32)
    by_kernel = jax.lax.scan(add, total, strips.starts)[0].reshape(kernel.shape).astype(kernel.dtype)
    return convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3), stride=1), by_kernel


class _Strips:
    """How the cells of maps [N, H, W, K] that are convolved divide into strips, which are computed one by one.

    With zeros around each map and all maps in one row, the neighbours of a cell lie at the same distance from it
    everywhere. So a strip of outputs is a sum of products, one for each cell of the window, with strips of inputs.
    What is computed for the zeros is thrown away. With a stride, the inputs are sorted into stride * stride such rows,
    by the remainders of their coordinates.
    """

    def __init__(self, shape: tuple[int, ...], side: int, stride: int):
        self.num_maps, self.stride, self.before = shape[0], stride, (side - 1) // 2
        self.size = [-(-length // stride) for length in shape[1:3]]  # of an output
        self.grid = [length + (side - 1) // stride for length in self.size]  # with zeros around
        self.num_cells = self.num_maps * self.grid[0] * self.grid[1]
        # Where each cell of the window finds its input: the row, and the distance from the output.
        self.places = [
            (i % stride * stride + j % stride, i // stride * self.grid[1] + j // stride)
            for i, j in np.ndindex(side, side)
        ]
        self.reach = max(distance for _, distance in self.places)
        num_strips = -(-self.num_cells // _STRIP_CELLS)
        self.length = -(-self.num_cells // num_strips)
        self.starts = self.length * np.arange(num_strips)

    def sort(self, x):
        """Return the inputs [N, H, W, K] as rows [stride * stride, cells, K] of bits."""
        after = [n * self.stride - self.before - length for n, length in zip(self.grid, x.shape[1:3], strict=True)]
        padding = [(0, 0, 0), *((self.before, n, 0) for n in after), (0, 0, 0)]
        x = jax.lax.pad(_bits(x), jnp.uint16(0), padding)
        x = x.reshape(self.num_maps, self.grid[0], self.stride, self.grid[1], self.stride, -1)
        rows = x.transpose(2, 4, 0, 1, 3, 5).reshape(self.stride**2, self.num_cells, -1)
        beyond = self.length * len(self.starts) + self.reach - self.num_cells
        return jnp.pad(rows, ((0, 0), (0, beyond), (0, 0)))

    def spread(self, outputs):
        """Return the outputs [N, _, _, C] as a row [cells, C] of bits, as :meth:`collect` takes it."""
        around = [(0, n - length) for n, length in zip(self.grid, self.size, strict=True)]
        row = jnp.pad(_bits(outputs), ((0, 0), *around, (0, 0))).reshape(self.num_cells, -1)
        return jnp.pad(row, ((0, self.length * len(self.starts) - self.num_cells), (0, 0)))

    def cut(self, rows, start, axis=1):
        """Return the inputs [length, K] of a strip for each cell of the window; rows have the cells along ``axis``."""
        cells = jax.lax.dynamic_slice_in_dim(rows, start, self.length + self.reach, axis)
        return [_floats(jax.lax.slice_in_dim(cells[row], d, d + self.length, axis=axis - 1)) for row, d in self.places]

    def collect(self, row):
        """Return the outputs [N, _, _, C] of a row of the cells of all strips."""
        maps = row[: self.num_cells].reshape(self.num_maps, *self.grid, -1)
        return maps[:, : self.size[0], : self.size[1]]


def _wide_product(x, kernel) -> Float32[Array, "..."]:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _floats(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
