"""Shapes of anchors, for the model that places them and for the checker that compares objects with them.

NumPy only: the checker does not import JAX, which :mod:`maskrcnn_jax.ops` does.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def cell_anchors(
    sizes: Sequence[float], aspect_ratios: Sequence[float], exact: bool = False
) -> Float32[np.ndarray, "A 4"]:
    """Return anchors [len(aspect_ratios) * len(sizes), 4] of areas size^2 centred at the origin.

    Args:
        sizes: square roots of the areas, pixels.
        aspect_ratios: height / width.
        exact: do not round, and order by size, then ratio, as in detectron2; otherwise round to integers and order by
            ratio, then size, as in torchvision.

    Example: size 32, ratio 0.5 has sides 45.25 x 22.63 and gives [-23, -11, 23, 11].
    """
    # torch rounds halves to even, as numpy does; torchvision in float32, and a half must fall the same way.
    dtype = np.float64 if exact else np.float32
    ratios, sides = np.sqrt(np.asarray(aspect_ratios, dtype))[:, None], np.asarray(sizes, dtype)
    half = np.stack([sides / ratios, sides * ratios], axis=-1) / 2  # [ratio, size, (width, height)]
    half = (half.swapaxes(0, 1) if exact else half).reshape(-1, 2)
    corners = np.concatenate([-half, half], axis=-1)
    return (corners if exact else np.round(corners)).astype(np.float32)
