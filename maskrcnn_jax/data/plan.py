"""Which images each step of a training or evaluation loads, and at what padded size.

Every batch has one of a few padded sizes (buckets), so that the compiled steps see a handful of shapes; torchvision
pads each batch to its own largest image instead. Which images a step sees is a pure function of (seed, epoch).
"""

import dataclasses
import functools
from typing import overload

import numpy as np

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.options import DataOptions

_STRIDE = 32  # of the coarsest backbone level; padded sides are multiples of it


def buckets_for(options: DataOptions) -> list[tuple[int, int]]:
    """Return the padded sizes that batches may have, smallest area first.

    With ``buckets="auto"`` there are sizes for images up to 4:3 and for the longest ones, in both orientations:
    800/1333 gives 800x1088, 800x1344 and their transposes, which leave 7 % of COCO's pixels to padding. With "exact"
    there are none in advance: each image is padded to its own multiple of 32.

    Returns:
        (height, width) pairs in pixels; empty for "exact".
    """
    if options.buckets == "exact":
        return []
    short = _round_up(options.short_side)
    longer = {_round_up(min(options.short_side * 4 / 3, options.long_side)), _round_up(options.long_side)}
    sizes = {size for side in longer for size in ((short, side), (side, short))}
    return sorted(sizes, key=lambda size: (size[0] * size[1], size))


def planned(options: DataOptions) -> DataOptions:
    """Return the options as the plan of a training takes them: each image has the largest size that it may get."""
    return dataclasses.replace(options, short_side=max(options.short_sides, default=options.short_side))


def training_buckets(options: DataOptions) -> list[tuple[int, int]]:
    """Return the padded sizes of training: those of the longest of ``short_sides``, or one if images are cropped."""
    if options.crop_size:
        return [(_round_up(options.crop_size), _round_up(options.crop_size))]
    return buckets_for(planned(options))


def padded_size(height: int, width: int, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) of the smallest bucket that holds an image, or its own multiple of 32."""
    fitting = (bucket for bucket in buckets if bucket[0] >= height and bucket[1] >= width)
    return next(fitting, (_round_up(height), _round_up(width)))


@overload
def _round_up(length: float) -> int: ...
@overload
def _round_up(length: np.ndarray) -> np.ndarray: ...
def _round_up(length: float | np.ndarray) -> int | np.ndarray:
    rounded = -(-length // _STRIDE) * _STRIDE
    return rounded.astype(np.int32) if isinstance(rounded, np.ndarray) else int(rounded)


def training_subset(index: CocoDataset, limit: int, seed: int) -> np.ndarray:
    """Pick the first ``limit`` images of a seeded shuffle, so that a smaller subset is part of every larger one.

    Returns:
        Rows of the index, [min(limit, N)] int64 in ascending order; all of them if ``limit`` is 0.
    """
    rows = np.arange(len(index))
    return np.sort(np.random.default_rng(seed).permutation(rows)[:limit]) if limit else rows


def repeat_factors(index: CocoDataset, image_indices: np.ndarray, threshold: float) -> np.ndarray:
    """Compute how often each image is to appear in an epoch, so that rare categories are seen more often.

    A category in a share f of the images has the factor max(1, sqrt(threshold / f)); an image has the largest of its
    categories. With a threshold of 0.5, and categories in 8, 2 and 1 of 8 images: 1, 1.41 and 2.

    Args:
        index: the dataset.
        image_indices: [n] int, the images that take part.
        threshold: share of the images below which a category counts as rare.

    Returns:
        [n] float64, at least 1; 1 for images without objects.

    Source: Sec. 4.2, LVIS (Gupta et al., 2019).
    """
    places = np.full(len(index), -1)
    places[image_indices] = np.arange(len(image_indices))
    labels, places = index.labels[~index.crowd], places[index.image_rows][~index.crowd]
    pairs = np.unique(np.stack([places, labels])[:, places >= 0], axis=1)
    shares = np.bincount(pairs[1], minlength=1) / len(image_indices)
    factors = np.ones(len(image_indices))
    np.maximum.at(factors, pairs[0], np.sqrt(threshold / shares[pairs[1]]))
    return factors


def draw_repeats(factors: np.ndarray, offset: float) -> np.ndarray:
    """Draw how often each image appears in one epoch, by systematic sampling.

    Args:
        factors: [n] float64, how often on average.
        offset: 0..1, random.

    Returns:
        [n] int64, each factor rounded down or up; their sum is that of the factors, rounded down or up.
    """
    return np.diff(np.floor(np.cumsum(factors) + offset).astype(np.int64), prepend=0)


class Plan:
    """Says which images every step of every epoch loads, and at what padded size."""

    def __init__(
        self,
        sizes: np.ndarray,
        image_indices: np.ndarray,
        *,
        batch_size: int,
        buckets: list[tuple[int, int]],
        shuffle: bool,
        seed: int,
        repeats: np.ndarray | None = None,
    ):
        """Assign every image to the smallest bucket that holds it.

        Args:
            sizes: [N, 2] int, sizes of all images of the dataset after resizing.
            image_indices: [n] int, the images that take part, in the order in which they are wanted unshuffled.
            batch_size: images a step.
            buckets: (height, width), smallest first; empty rounds each image's own size up.
            shuffle: a new order every epoch, and partial batches filled by other images of the same bucket;
                otherwise the given order within each bucket, and partial batches filled by -1.
            seed: of the shuffle.
            repeats: [n] float64, how often each image appears in an epoch on average; None for once. Only in training.
        """
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self._images = np.asarray(image_indices, np.int64)
        sizes = sizes[self._images]
        if buckets:
            fits = (sizes[:, None] <= np.array(buckets)).all(axis=2)  # [n, number of buckets]
            self._bucket_of, self._buckets = fits.argmax(axis=1), np.array(buckets, np.int32)
        else:
            self._buckets, self._bucket_of = np.unique(_round_up(sizes), axis=0, return_inverse=True)
        self._repeats = repeats
        counts = np.bincount(self._bucket_of, repeats, len(self._buckets))
        counts = np.ceil(counts - 1e-9).astype(int)  # an epoch may draw so many; the difference is rounding of the sum
        self._steps_of = -(-counts // batch_size)  # each bucket
        self.steps_per_epoch = int(self._steps_of.sum())
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def step(self, step: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Return the images of a step, [batch_size] rows of the index or -1, and their padded (height, width)."""
        epoch, step = divmod(step, self.steps_per_epoch)
        images, buckets = self._epoch(epoch)
        height, width = self._buckets[buckets[step]]
        return images[step], (int(height), int(width))

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the images [steps, batch_size] and the buckets [steps] of an epoch."""
        # The trailing zero keeps this stream apart from those of the samples, whose last number is never zero.
        rng = np.random.default_rng([self.seed, epoch, 0])
        order = rng.permutation(len(self._images)) if self.shuffle else np.arange(len(self._images))
        by_bucket = order[np.argsort(self._bucket_of[order], kind="stable")]
        ends = np.cumsum(np.bincount(self._bucket_of, minlength=len(self._buckets)))
        image_parts, bucket_parts = [], []
        for bucket, places in enumerate(np.split(by_bucket, ends[:-1])):
            members, num_steps = self._images[places], int(self._steps_of[bucket])
            if self._repeats is not None:
                members = rng.permutation(np.repeat(members, draw_repeats(self._repeats[places], rng.random())))
            if self.shuffle:
                rows = np.resize(members, num_steps * self.batch_size)  # wraps round to the first ones
            else:
                rows = np.full(num_steps * self.batch_size, -1)
                rows[: len(members)] = members
            image_parts.append(rows.reshape(num_steps, self.batch_size))
            bucket_parts.append(np.full(num_steps, bucket))
        images, buckets = np.concatenate(image_parts), np.concatenate(bucket_parts)
        if self.shuffle:
            batches = rng.permutation(len(images))
            images, buckets = images[batches], buckets[batches]
        return images, buckets
