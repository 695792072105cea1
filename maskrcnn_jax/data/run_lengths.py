"""Checks compressed run-length masks before pycocotools reads them, and decodes them in their own box only.

pycocotools trusts its input: it reads past the end of text that ends within a number, and fills a mask of too few
pixels with whatever lies in memory. It also decodes whole images: for a car in an aerial photograph, 16 MB.
"""

import re
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

# Six characters hold numbers up to 2^29, as many pixels as images have. "0".."O" end a number, "P".."o" do not.
_WELL_FORMED = re.compile(rb"(?:[P-o]{0,5}[0-O])*")
_CHUNK = 1 << 20  # bytes looked at together


class Crop(NamedTuple):
    """The part of a mask inside the smallest box that holds it; of an empty mask, no pixels."""

    mask: np.ndarray  # [h, w] uint8, 0 or 1
    y: int  # row of the image at which the crop starts
    x: int  # column of the image at which the crop starts


def cut_out(mask: np.ndarray) -> Crop:
    """Cut a mask [H, W] to the smallest box that holds it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Crop(np.zeros((0, 0), np.uint8), 0, 0)
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Crop(mask[window].astype(np.uint8), int(rows[0]), int(columns[0]))


def decode_crop(rle: dict) -> Crop:
    """Decode a mask in its own box.

    Args:
        rle: "size" (height, width) and "counts", well-formed compressed run lengths.

    Raises:
        ValueError: the runs do not fill an image of this size.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    digits = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    runs = _runs(digits, np.array([0, len(digits)]))[0] if len(digits) else np.zeros(0, np.int64)
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(f"run lengths of {runs.sum()} pixels for an image of {height}x{width}")
    x, y, w, h = map(int, coco_mask.toBbox(rle))
    edges = np.cumsum(runs)
    edges = edges[: len(edges) // 2 * 2] - x * height  # start, end, start, end, ..., from the first column on
    columns = np.zeros(w * height, np.uint8)
    for start, end in edges.reshape(-1, 2).tolist():
        columns[start:end] = 1
    return Crop(columns.reshape(w, height)[:, y : y + h].T, y, x)


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
    runs, mask = _runs(counts, offsets)
    totals = np.bincount(mask, runs, len(offsets) - 1).astype(np.int64)
    totals[mask[runs < 0]] = -1
    return totals


def _runs(counts: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of all runs, mask after mask, and which mask each belongs to."""
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
    runs = np.empty_like(numbers)
    runs[order] = sums - np.repeat(sums[begins] - numbers[order][begins], np.diff(begins, append=len(order)))
    return runs, mask
