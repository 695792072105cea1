"""Turns images and points by their orientation in EXIF: 1 is upright as stored, 2 to 8 mirrored, turned or both."""

import numpy as np

# How to turn a stored image upright: swap rows and columns, then reverse the rows, reverse the columns.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
ORIENTATIONS = frozenset(_TURNS)


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the (height, width) of the upright image of a stored one."""
    return size[::-1] if _TURNS[orientation][0] else size


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a stored image [h, w, ...] upright."""
    swap, rows, columns = _TURNS[orientation]
    image = image.swapaxes(0, 1) if swap else image
    return np.ascontiguousarray(image[:: -1 if rows else 1, :: -1 if columns else 1])


def turn_back(points: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Return points x, y [N, 2] of the upright image as points of the stored one.

    Args:
        points: in pixels.
        size: (height, width) of the stored image.
        orientation: of the stored image.
    """
    swap, rows, columns = _TURNS[orientation]
    height, width = upright_size(size, orientation)
    x, y = points.T
    x, y = width - x if columns else x, height - y if rows else y
    return np.stack([y, x] if swap else [x, y], axis=1)
