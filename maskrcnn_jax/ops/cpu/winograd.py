"""3x3 convolutions by Winograd's algorithm: 36 products of matrices of a quarter of the size, for CPUs.

A tile of 4 x 4 outputs needs 6 x 6 inputs. Three small linear maps B, G and A turn the convolution of tile d with
kernel g into products of single numbers, A^T [(G g G^T) * (B^T d B)] A: 36 a tile instead of the 144 of the
definition. Over all channels and many tiles they are 36 matrix products. The gradient of the kernel is the same in
reverse, and that of the input a convolution with the turned kernel.

Tiles are processed in strips that stay in the caches: transformed, an image takes 2.25 times its space.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TILE = 4
_WINDOW = TILE + 2
# Where the polynomials behind the algorithm are evaluated, beside infinity. The usual 0, 1, -1, 2, -2 round four times
# worse.
_POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))
# Tiles of a strip, about: enough for efficient products, few enough for the caches.
_STRIP_TILES = 256


def _transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A^T [16, 36], G [36, 9] and B^T [36, 36] for both axes at once, on flattened tiles."""
    points = np.array(_POINTS)
    others = [np.delete(points, i) for i in range(len(points))]
    a = np.zeros((TILE, _WINDOW))
    g = np.zeros((_WINDOW, 3))
    b = np.zeros((_WINDOW, _WINDOW))
    a[:, :-1] = points[None] ** np.arange(TILE)[:, None]
    g[:-1] = [point ** np.arange(3) / np.prod(point - rest) for point, rest in zip(points, others, strict=True)]
    b[:-1, :-1] = [np.poly(rest)[::-1] for rest in others]
    # The point at infinity picks the highest coefficients.
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = np.poly(points)[::-1]
    return np.kron(a, a), np.kron(g, g), np.kron(b, b)


_OUTPUT, _KERNEL, _INPUT = _transforms()


@jax.custom_vjp
def conv3x3(x: Float[Array, "N H W K"], kernel: Float[Array, "3 3 K C"]) -> Float[Array, "N H W C"]:
    """Convolve with stride 1 and one cell of zeros around, as lax.conv_general_dilated does, up to rounding.

    Args:
        x: [N, H, W, K].
        kernel: [3, 3, K, C].

    Returns:
        [N, H, W, C].
    """
    strips = _Strips(x.shape)
    num_channels, num_outputs = kernel.shape[2:]
    transformed = (_constant(_KERNEL, x) @ kernel.reshape(9, -1)).reshape(-1, num_channels, num_outputs)
    arranged = strips.arrange(x, around=1)

    def convolve(outputs, start):
        products = jnp.matmul(strips.transform_input(arranged, start), transformed)  # [36, tiles, C]
        tiles = _constant(_OUTPUT, x) @ products.reshape(len(products), -1)
        return jax.lax.dynamic_update_slice(outputs, strips.untile(tiles, num_outputs)[:, None], start), None

    outputs = jnp.zeros(strips.output_shape(num_outputs), x.dtype)
    return strips.collect(jax.lax.scan(convolve, outputs, strips.starts)[0])


def _conv3x3_forward(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _conv3x3_backward(residuals, gradient):
    x, kernel = residuals
    x_gradient = conv3x3(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    return x_gradient, _kernel_gradient(x, gradient)


conv3x3.defvjp(_conv3x3_forward, _conv3x3_backward)


def _kernel_gradient(x, gradient):
    """Return the gradient [3, 3, K, C] of the kernel from that of the output [N, H, W, C]."""
    strips = _Strips(x.shape)
    arranged, arranged_gradient = strips.arrange(x, around=1), strips.arrange(gradient, around=0)

    # Each device sums its own part, and they exchange the sums once: devices that wait for each other inside a loop
    # can deadlock when there are fewer threads than devices.
    parts = math.gcd(strips.groups, jax.device_count())

    def apart(tiles):
        return tiles.reshape(_WINDOW**2, parts, -1, tiles.shape[-1])

    def add(total, start):
        tiles = strips.tile_output(arranged_gradient, start)  # [16, tiles * C]
        products = (_constant(_OUTPUT.T, x) @ tiles).reshape(_WINDOW**2, -1, gradient.shape[-1])
        inputs = strips.transform_input(arranged, start)
        return total + jnp.einsum("pdtk,pdtc->pdkc", apart(inputs), apart(products)), None

    zeros = jnp.zeros((_WINDOW**2, parts, x.shape[-1], gradient.shape[-1]), x.dtype)
    total = jax.lax.scan(add, zeros, strips.starts)[0].sum(axis=1)
    return (_constant(_KERNEL.T, x) @ total.reshape(len(total), -1)).reshape(3, 3, *total.shape[1:])


def _constant(matrix, like):
    return jnp.asarray(matrix, like.dtype)


class _Strips:
    """How maps [N, H, W, ...] divide into strips of tiles: some maps as a whole, or some rows of all maps.

    The maps lie as [group, member, ...] and a strip takes one member of each group. So where the maps are shared out
    to devices each of them has a part of every strip, and XLA need not bring strips together. Only rows are padded
    before they are cut; what else a strip needs is padded in it, since a padded copy of 256 small maps takes 85 MB.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.num_maps, self.height, self.width = shape[:3]
        rows, self.columns = -(-self.height // TILE), -(-self.width // TILE)
        self.groups = min(self.num_maps, max(1, _STRIP_TILES // (rows * self.columns)))
        if self.groups == 1:
            self.groups = self.num_maps  # large maps: strips of rows
        self.members = -(-self.num_maps // self.groups)
        strips_per_map = -(-rows // max(1, _STRIP_TILES // (self.groups * self.columns)))
        self.rows = -(-rows // strips_per_map)
        self.cut = strips_per_map > 1
        self.strip_rows = self.rows * TILE if self.cut else self.height
        self.all_rows = self.strip_rows * strips_per_map
        self.starts = jnp.array(
            [(0, m, y * self.strip_rows, 0, 0) for m in range(self.members) for y in range(strips_per_map)], jnp.int32
        )  # [strips, 5]

    def arrange(self, x, around):
        """Return x [N, H, W, K] as [groups, members, rows, W, K], its strips with ``around`` cells of zeros around."""
        maps = self.groups * self.members - self.num_maps
        rows = (around, self.all_rows - self.height + around) if self.cut else (0, 0)
        x = jnp.pad(x, ((0, maps), rows, (0, 0), (0, 0)))
        return x.reshape(self.groups, self.members, *x.shape[1:])

    def transform_input(self, arranged, start):
        """Return the transformed windows [36, tiles, K] of a strip of an input, arranged with the cells around it."""
        # A window is a tile and the first cells of the next.
        tiles = self._tiles(arranged, start, around=1)
        tall = jnp.concatenate([tiles[:, :, :, :-1], tiles[: _WINDOW - TILE, :, :, 1:]], axis=0)
        windows = jnp.concatenate([tall[..., :-1, :], tall[:, : _WINDOW - TILE, ..., 1:, :]], axis=1)
        flat = windows.reshape(_WINDOW**2, -1)
        return (_constant(_INPUT, arranged) @ flat).reshape(_WINDOW**2, -1, arranged.shape[-1])

    def tile_output(self, arranged, start):
        """Return the tiles [16, tiles * C] of a strip of an output."""
        return self._tiles(arranged, start, around=0).reshape(TILE**2, -1)

    def output_shape(self, channels):
        """Return the shape of an arranged output."""
        return self.groups, self.members, self.all_rows, self.width, channels

    def untile(self, tiles, channels):
        """Return the strip [groups, rows, W, C] of tiles [16, tiles * C]."""
        tiles = tiles.reshape(TILE, TILE, self.groups, self.rows, self.columns, channels)
        strip = tiles.transpose(2, 3, 0, 4, 1, 5)
        strip = strip.reshape(self.groups, self.rows * TILE, self.columns * TILE, channels)
        return strip[:, : self.strip_rows, : self.width]

    def collect(self, arranged):
        """Return [N, H, W, C] of an arranged output."""
        maps = arranged.reshape(-1, *arranged.shape[2:])
        return maps[: self.num_maps, : self.height]

    def _tiles(self, arranged, start, around):
        """Return the tiles [TILE, TILE, groups, rows, columns, K] of a strip, more where it has cells around it."""
        present, above = (self.strip_rows + 2 * around, 0) if self.cut else (self.height, around)
        size = (self.groups, 1, present, self.width, arranged.shape[-1])
        strip = jax.lax.dynamic_slice(arranged, start, size)[:, 0]
        rows, columns = self.rows + around, self.columns + around  # of tiles
        below, right = rows * TILE - above - present, columns * TILE - around - self.width
        strip = jnp.pad(strip, ((0, 0), (above, below), (around, right), (0, 0)))
        tiles = strip.reshape(self.groups, rows, TILE, columns, TILE, -1)
        return tiles.transpose(2, 4, 0, 1, 3, 5)
