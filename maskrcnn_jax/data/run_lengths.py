"""Checks compressed run-length masks before pycocotools reads them.

pycocotools trusts its input: it reads past the end of text that ends within a number, and fills a mask of too few
pixels with whatever lies in memory.
"""

import re

import numpy as np

# Six characters hold numbers up to 2^29, as many pixels as images have. "0".."O" end a number, "P".."o" do not.
_WELL_FORMED = re.compile(rb"(?:[P-o]{0,5}[0-O])*")
_CHUNK = 1 << 20  # bytes looked at together


def is_well_formed(counts: bytes) -> bool:
    """Whether the text consists of complete numbers."""
    return _WELL_FORMED.fullmatch(counts) is not None


def num_pixels(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum the run lengths of masks.

    Args:
        counts: uint8, well-formed texts end to end.
        offsets: [R + 1] int64, where each starts, and the end of the last.

    Returns:
        [R] int64, the number of pixels of each mask's image; -1 where a run has a negative length.
    """
    totals = np.zeros(len(offsets) - 1, np.int64)
    first = 0
    while first < len(totals):
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _CHUNK, side="right")) - 1)
        begin, end = offsets[first], offsets[last]
        if end > begin:
            totals[first:last] = _sums(counts[begin:end], offsets[first : last + 1] - begin)
        first = last
    return totals


def _sums(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    digits = counts.astype(np.int64) - 48
    ends = np.flatnonzero(digits < 32) + 1  # of the numbers
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((digits & 31) << (5 * places), starts)
    numbers -= (digits[ends - 1] >> 4 & 1) << (5 * lengths)  # the sign is the fifth bit of the last digit
    first = np.searchsorted(starts, offsets)  # number of each mask
    mask = np.repeat(np.arange(len(first) - 1), np.diff(first))
    # From the fourth on, a number is what its run has more than the run two before: two chains of sums in each mask,
    # beside its first number.
    place = np.arange(len(numbers)) - first[mask]
    chain = 3 * mask + np.where(place == 0, 0, 1 + place % 2)
    order = np.argsort(chain, kind="stable")
    sums = np.cumsum(numbers[order])
    begins = np.flatnonzero(np.diff(chain[order], prepend=-1))
    runs = sums - np.repeat(sums[begins] - numbers[order][begins], np.diff(begins, append=len(order)))
    totals = np.bincount(mask[order], runs, len(first) - 1).astype(np.int64)
    totals[mask[order][runs < 0]] = -1
    return totals
