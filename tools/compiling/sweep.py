"""The largest batch that fits a chip."""

from collections.abc import Callable
from typing import NamedTuple


class Fit(NamedTuple):
    """Whether a batch fits."""

    fits: bool
    memory: int  # bytes, of what is needed


def largest_that_fits(measure: Callable[[int], Fit], limit: int) -> int:
    """Return the largest number for which ``measure`` says that it fits; 0 if not even 1 does.

    Memory is nearly a straight line, so the first numbers tell about where the limit is reached. From there on the
    interval is halved: near the limit XLA computes values twice instead of keeping them.

    Args:
        measure: Of a number from 1; what fits must fit at any smaller number.
        limit: Bytes of memory.
    """
    fitting, too_large, number = 0, None, 1
    memory: list[tuple[int, int]] = []
    while too_large is None or too_large - fitting > 1:
        fit = measure(number)
        memory.append((number, fit.memory))
        if fit.fits:
            fitting = number
        else:
            too_large = number
        if too_large is not None:
            number = (fitting + too_large) // 2
        else:
            number = min(max(_where(memory, limit) + 1, fitting + len(memory)), 4 * fitting)
    return fitting


def _where(memory: list[tuple[int, int]], limit: int) -> int:
    """Return the number at which a line through the last two points meets the limit."""
    (first, less), (second, more) = memory[-2:] if len(memory) > 1 else [(0, 0), memory[0]]
    slope = (more - less) / (second - first)
    return int(second + (limit - more) / slope) if slope > 0 else 2 * second
