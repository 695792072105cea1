"""3x3 convolutions by Winograd's algorithm: 36 products of matrices of a quarter of the size, for CPUs.

A tile of 4 x 4 outputs needs 6 x 6 inputs. Three small linear maps B, G and A turn the convolution of tile d with
kernel g into products of single numbers, A^T [(G g G^T) * (B^T d B)] A: 36 a tile instead of the 144 of the
definition. Over all channels and many tiles they are 36 matrix products. The gradient of the kernel is the same in
reverse, and that of the input a convolution with the turned kernel.

Tiles are processed in strips that stay in the caches: transformed, an image takes 2.25 times its space.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016).
"""

import jax
import jax.numpy as jnp
import numpy as np

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
def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
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
    padded = strips.pad_input(x)

    def convolve(start):
        products = jnp.matmul(strips.transform_input(padded, start), transformed)  # [36, tiles, C]
        tiles = _constant(_OUTPUT, x) @ products.reshape(len(products), -1)
        return strips.untile(tiles, num_outputs)

    return strips.crop(jax.lax.map(convolve, strips.starts))


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
    padded, padded_gradient = strips.pad_input(x), strips.pad_output(gradient)

    def add(total, start):
        tiles = strips.tile_output(padded_gradient, start)  # [16, tiles * C]
        products = (_constant(_OUTPUT.T, x) @ tiles).reshape(_WINDOW**2, -1, gradient.shape[-1])
        inputs = strips.transform_input(padded, start)
        return total + jnp.einsum("ptk,ptc->pkc", inputs, products), None

    zeros = jnp.zeros((_WINDOW**2, x.shape[-1], gradient.shape[-1]), x.dtype)
    total, _ = jax.lax.scan(add, zeros, strips.starts)
    return (_constant(_KERNEL.T, x) @ total.reshape(len(total), -1)).reshape(3, 3, *total.shape[1:])


def _constant(matrix, like):
    return jnp.asarray(matrix, like.dtype)


class _Strips:
    """How [N, H, W, ...] divides into strips of tiles: of a part of the rows of one map, or of several whole maps."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape[:3]
        num_maps, height, width = self.shape
        rows, self.columns = -(-height // TILE), -(-width // TILE)
        self.rows = min(rows, max(1, _STRIP_TILES // self.columns))
        strips_per_map = -(-rows // self.rows)
        self.rows = -(-rows // strips_per_map)  # evenly
        self.maps = 1 if strips_per_map > 1 else min(num_maps, max(1, _STRIP_TILES // (rows * self.columns)))
        groups = -(-num_maps // self.maps)
        self.padded = (groups * self.maps, strips_per_map * self.rows * TILE, self.columns * TILE)
        first_maps, first_rows = np.arange(groups) * self.maps, np.arange(strips_per_map) * self.rows * TILE
        self.starts = jnp.array([(n, y, 0, 0) for n in first_maps for y in first_rows], jnp.int32)  # [strips, 4]

    def pad_output(self, x, around=0):
        n, height, width = (padded - size for padded, size in zip(self.padded, self.shape, strict=True))
        return jnp.pad(x, ((0, n), (around, height + around), (around, width + around), (0, 0)))

    def pad_input(self, x):
        return self.pad_output(x, around=1)

    def transform_input(self, padded, start):
        """Return the transformed tiles [36, tiles, K] of a strip of a padded input."""
        channels = padded.shape[-1]
        height, width = self.rows * TILE, self.columns * TILE
        strip = jax.lax.dynamic_slice(padded, start, (self.maps, height + 2, width + 2, channels))
        parts = [
            jax.lax.slice(
                strip, (0, i, j, 0), (self.maps, i + height - 3, j + width - 3, channels), (1, TILE, TILE, 1)
            )
            for i in range(_WINDOW)
            for j in range(_WINDOW)
        ]
        tiles = jnp.stack(parts).reshape(_WINDOW**2, -1)
        return (_constant(_INPUT, padded) @ tiles).reshape(_WINDOW**2, -1, channels)

    def tile_output(self, padded, start):
        """Return the tiles [16, tiles * C] of a strip of a padded output."""
        channels = padded.shape[-1]
        size = (self.maps, self.rows * TILE, self.columns * TILE, channels)
        strip = jax.lax.dynamic_slice(padded, start, size)
        tiles = strip.reshape(self.maps, self.rows, TILE, self.columns, TILE, channels)
        return tiles.transpose(2, 4, 0, 1, 3, 5).reshape(TILE**2, -1)

    def untile(self, tiles, channels):
        """Return the strip [maps, rows, columns, C] of tiles [16, tiles * C]."""
        tiles = tiles.reshape(TILE, TILE, self.maps, self.rows, self.columns, channels)
        return tiles.transpose(2, 3, 0, 4, 1, 5).reshape(self.maps, self.rows * TILE, self.columns * TILE, channels)

    def crop(self, strips):
        """Return [N, H, W, C] of all strips [strips, maps, rows, columns, C]."""
        num_maps, height, width = self.shape
        return strips.reshape(*self.padded, strips.shape[-1])[:num_maps, :height, :width]
