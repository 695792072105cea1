"""Batches of padded images, in an order that depends on the seed alone.

Every batch has one of a few padded sizes (buckets), so that the compiled steps see a handful of shapes; torchvision
pads each batch to its own largest image instead. Which images a step sees is a pure function of (seed, epoch), and
what augmentation does to each of them of (seed, epoch, position in the epoch): neither the number of threads or
processes nor where a run was resumed changes a byte. Resuming therefore needs the step number and no saved state.
"""

import dataclasses
import functools
import gc
import logging
from collections.abc import Iterator

import grain
import numpy as np

from maskrcnn_jax.data import transforms
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.structures import Batch, GroundTruth

_log = logging.getLogger(__name__)

_STRIDE = 32  # of the coarsest backbone level; padded sides are multiples of it


def buckets_for(short_side: int, long_side: int, mode: str) -> list[tuple[int, int]]:
    """Lists the padded sizes that batches may have, smallest area first.

    "auto" has sides for images up to 4:3 and for the longest ones, in both orientations: 800/1333 gives 800x1088,
    800x1344 and their transposes, which leave 7 % of COCO's pixels to padding. "exact" has none in advance: each image
    is padded to its own multiple of 32.

    Returns:
        (height, width) pairs in pixels; empty for "exact".

    Raises:
        UserError: an unknown mode, or sides that contradict each other.
    """
    if not 1 <= short_side <= long_side:
        raise UserError(f"data.short_side {short_side} must lie between 1 and data.long_side {long_side}")
    if mode == "exact":
        return []
    if mode != "auto":
        raise UserError(f"data.buckets {mode!r} is unknown; use auto or exact")
    short = _round_up(short_side)
    longer = {_round_up(min(short_side * 4 / 3, long_side)), _round_up(long_side)}
    sizes = {size for side in longer for size in ((short, side), (side, short))}
    return sorted(sizes, key=lambda size: (size[0] * size[1], size))


def padded_size(height: int, width: int, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """Returns the (height, width) of the smallest bucket that holds an image, or its own multiple of 32."""
    fitting = (bucket for bucket in buckets if bucket[0] >= height and bucket[1] >= width)
    return next(fitting, (_round_up(height), _round_up(width)))


def _round_up(length: float | np.ndarray) -> int | np.ndarray:
    rounded = -(-length // _STRIDE) * _STRIDE
    return rounded.astype(np.int32) if isinstance(rounded, np.ndarray) else int(rounded)


def training_subset(index: CocoDataset, limit: int, seed: int) -> np.ndarray:
    """Picks the first ``limit`` images of a seeded shuffle, so that a smaller subset is part of every larger one.

    Returns:
        Rows of the index, [min(limit, N)] int64 in ascending order; all of them if ``limit`` is 0.
    """
    rows = np.arange(len(index))
    return np.sort(np.random.default_rng(seed).permutation(rows)[:limit]) if limit else rows


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
    ):
        """Assigns every image to the smallest bucket that holds it.

        Args:
            sizes: [N, 2] int, sizes of all images of the dataset after resizing.
            image_indices: [n] int, the images that take part, in the order in which they are wanted unshuffled.
            batch_size: images a step.
            buckets: (height, width), smallest first; empty rounds each image's own size up.
            shuffle: a new order every epoch, and partial batches filled by other images of the same bucket;
                otherwise the given order within each bucket, and partial batches filled by -1.
            seed: of the shuffle.
        """
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self._images = np.asarray(image_indices, np.int64)
        sizes = sizes[self._images]
        if buckets:
            fits = (sizes[:, None] <= np.array(buckets)).all(axis=2)  # [n, number of buckets]
            self._bucket_of, self._buckets = fits.argmax(axis=1), np.array(buckets, np.int32)
        else:
            self._buckets, self._bucket_of = np.unique(_round_up(sizes), axis=0, return_inverse=True)
        counts = np.bincount(self._bucket_of, minlength=len(self._buckets))
        self.steps_per_epoch = int((-(-counts // batch_size)).sum())
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def step(self, step: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the images of a step, [batch_size] rows of the index or -1, and their padded (height, width)."""
        epoch, step = divmod(step, self.steps_per_epoch)
        images, buckets = self._epoch(epoch)
        height, width = self._buckets[buckets[step]]
        return images[step], (int(height), int(width))

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the images [steps, batch_size] and the buckets [steps] of an epoch."""
        # The trailing zero keeps this stream apart from those of the samples, whose last number is never zero.
        rng = np.random.default_rng([self.seed, epoch, 0])
        order = rng.permutation(len(self._images)) if self.shuffle else np.arange(len(self._images))
        by_bucket = order[np.argsort(self._bucket_of[order], kind="stable")]
        ends = np.cumsum(np.bincount(self._bucket_of, minlength=len(self._buckets)))
        images, buckets = [], []
        for bucket, members in enumerate(np.split(self._images[by_bucket], ends[:-1])):
            num_steps = -(-len(members) // self.batch_size)
            if self.shuffle:
                rows = np.resize(members, num_steps * self.batch_size)  # wraps round to the first ones
            else:
                rows = np.full(num_steps * self.batch_size, -1)
                rows[: len(members)] = members
            images.append(rows.reshape(num_steps, self.batch_size))
            buckets.append(np.full(num_steps, bucket))
        images, buckets = np.concatenate(images), np.concatenate(buckets)
        if self.shuffle:
            batches = rng.permutation(len(images))
            images, buckets = images[batches], buckets[batches]
        return images, buckets


@dataclasses.dataclass(frozen=True)
class _BatchReader:
    """Reads the batch of a step; threads share it and processes get a copy, so it keeps no state."""

    index: CocoDataset
    plan: Plan
    channels: int
    short_side: int
    long_side: int
    resize: str
    annotations: bool
    max_objects: int
    hflip: float
    color_jitter: float
    ignore_regions: bool
    mask_side: int
    skip_broken: bool
    process_rows: slice  # of every batch, those of this process

    def __call__(self, step: int) -> Batch | Exception:
        """Reads a batch; a problem of the user's is returned, since processes would drop part of a raised one."""
        images, padded_size = self.plan.step(step)
        batch = self._empty(len(images[self.process_rows]), padded_size)
        epoch, step = divmod(step, self.plan.steps_per_epoch)
        for row, position in enumerate(range(len(images))[self.process_rows]):
            if images[position] >= 0:
                sample = (self.plan.seed, epoch, step * len(images) + position + 1)
                try:
                    self._fill(batch, row, int(images[position]), sample)
                except BrokenImageError as e:
                    if not self.skip_broken:
                        return e
                    _warn_once(str(e))
                except UserError as e:
                    return e
        return batch

    def _empty(self, rows: int, padded_size: tuple[int, int]) -> Batch:
        objects, side = self.max_objects, self.mask_side
        gt = GroundTruth(
            boxes=np.zeros((rows, objects, 4), np.float32),
            labels=np.zeros((rows, objects), np.int32),
            masks=np.zeros((rows, objects, side, side // 8), np.uint8),
            mask_sizes=np.ones((rows, 2), np.int32),
            valid=np.zeros((rows, objects), bool),
            has_mask=None if self.index.has_mask.all() else np.zeros((rows, objects), bool),
            ignored=np.zeros((rows, objects), bool) if self.ignore_regions else None,
        )
        return Batch(
            images=np.zeros((rows, *padded_size, self.channels), transforms.RESIZE[self.resize]),
            sizes=np.ones((rows, 2), np.int32),  # 1, so that a division by the size of an invalid row stays finite
            original_sizes=np.ones((rows, 2), np.int32),
            image_index=np.full(rows, -1, np.int32),
            valid=np.zeros(rows, bool),
            gt=gt if self.annotations else None,
        )

    def _fill(self, batch: Batch, row: int, i: int, sample: tuple[int, int, int]) -> None:
        rng = np.random.default_rng(sample)
        flip = rng.random() < self.hflip
        image = self.index.read_image(i, self.channels)
        original_size = image.shape[:2]
        size = transforms.resized_size(*original_size, self.short_side, self.long_side, self.resize)
        if self.color_jitter:
            image = transforms.color_jitter(image, self.color_jitter, rng)
        if flip:
            image = transforms.hflip_image(image)
        if batch.gt is not None:
            self._fill_objects(batch.gt, row, i, size, flip)
        batch.images[row, : size[0], : size[1]] = transforms.resize_image(image, size, self.resize)
        batch.sizes[row] = size
        batch.original_sizes[row] = original_size
        batch.image_index[row] = i
        batch.valid[row] = True

    def _fill_objects(self, gt: GroundTruth, row: int, i: int, size: tuple[int, int], flip: bool) -> None:
        objects, masks = self.index.annotations(i, self.ignore_regions), self.index.masks(i, self.ignore_regions)
        height, width = map(int, self.index.sizes[i])
        boxes = objects.boxes
        if flip:
            boxes, masks = transforms.hflip_boxes(boxes, width), transforms.hflip_masks(masks)
        num = len(boxes)
        gt.boxes[row, :num] = transforms.scale_boxes(boxes, (height, width), size)
        gt.labels[row, :num] = objects.labels
        gt.masks[row, :num], gt.mask_sizes[row] = transforms.pack_masks(masks, self.mask_side)
        gt.valid[row, :num] = ~objects.crowd
        if gt.has_mask is not None:
            gt.has_mask[row, :num] = objects.has_mask
        if gt.ignored is not None:
            gt.ignored[row, :num] = objects.crowd


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


class Loader:
    """Iterates over the batches of a run from one step on; each ``iter()`` starts there again."""

    def __init__(self, read: _BatchReader, *, steps: range, threads: int, workers: int, prefetch: int):
        self.steps_per_epoch = read.plan.steps_per_epoch
        self.steps = steps
        self._read = read
        self._threads, self._workers, self._prefetch = threads, workers, prefetch

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_images(self) -> int:
        """Images that an iteration brings, broken ones too."""
        rows = self._read.process_rows
        return sum(int((self._read.plan.step(step)[0][rows] >= 0).sum()) for step in self.steps)

    def __iter__(self) -> Iterator[Batch]:
        if not len(self):
            return
        steps = grain.MapDataset.range(self.steps.start, self.steps.stop, self.steps.step)
        batches = steps.map(self._read).to_iter_dataset(
            grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=max(self._prefetch, self._threads))
        )
        if self._workers:
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
            )
        iterator = iter(batches)
        try:
            for batch in iterator:
                if isinstance(batch, Exception):
                    raise batch
                yield _copy(batch) if self._workers else batch
        except RuntimeError as e:
            if "terminated unexpectedly" not in str(e):
                raise
            raise UserError(
                "a process that loads images died, perhaps for want of memory; take fewer with --config.data.workers"
            ) from None
        finally:
            iterator.close()
            if self._workers:
                # The last batches hang in a reference cycle of grain's; uncollected, their shared memory would stay
                # until the process ends, and Python would complain of a leak then.
                del iterator, batches
                batch = None
                gc.collect()


def _copy(batch: Batch) -> Batch:
    """Copies a batch out of memory shared with a worker, which is freed badly if somebody holds it to the end."""
    gt = batch.gt and GroundTruth(*(array if array is None else np.array(array) for array in batch.gt))
    return Batch(*map(np.array, batch[:-1]), gt=gt)


def make_loader(
    index: CocoDataset,
    *,
    batch_size: int,
    short_side: int,
    long_side: int,
    shuffle: bool,
    annotations: bool,
    channels: int = 3,
    buckets: str = "auto",
    resize: str = "uint8",
    hflip: float = 0.0,
    color_jitter: float = 0.0,
    ignore_regions: bool = False,
    mask_side: int = 640,
    seed: int = 0,
    start_step: int = 0,
    num_steps: int | None = None,
    image_indices: np.ndarray | None = None,
    threads: int = 4,
    workers: int = 0,
    prefetch: int = 4,
    skip_broken: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Builds an iterable of ``Batch`` of numpy arrays.

    Args:
        index: the dataset.
        batch_size: images a step, over all processes.
        short_side: pixels, after resizing.
        long_side: pixels, at most.
        shuffle: True for training: a new order every epoch, partial batches filled by other images of their bucket.
            False for evaluation: every image exactly once, partial batches filled by rows with valid False.
        annotations: whether batches carry ``gt``.
        channels: of the images, RGB first.
        buckets: "auto" or "exact", see ``buckets_for``.
        resize: how images are resized, one of ``transforms.RESIZE``.
        hflip: probability of mirroring an image.
        color_jitter: strength of brightness, contrast and saturation changes, 0..1.
        ignore_regions: batches say where crowds and objects of unlisted categories are.
        mask_side: canvas of the masks in pixels, a multiple of 8.
        seed: of the order and the augmentation.
        start_step: the first step to load, counted from the start of the run.
        num_steps: steps of the whole run, counted from its start; None means one epoch.
        image_indices: rows of the index that take part, None for all.
        threads: threads that load, in this process or in each worker.
        workers: extra processes that load; 0 loads in this one. Grain wants absl flags parsed for them (``app.run``).
        prefetch: batches loaded ahead.
        skip_broken: a broken image becomes a row with valid False and is logged once, instead of an error.
        process_index: of this process among those that work together.
        process_count: in training, each process loads an equal share of the rows of every batch, all at the same
            bucket; in evaluation, where ``shuffle`` is False, every batch goes to one process.

    Returns:
        A ``Loader`` with ``steps_per_epoch``. Iterating raises BrokenImageError at the batch with a broken image.

    Raises:
        UserError: a value that does not fit the others; the message says which.
    """
    image_indices = np.arange(len(index)) if image_indices is None else np.asarray(image_indices)
    _check(
        (len(image_indices) > 0, "no images to load; the dataset or the chosen part of it is empty"),
        (batch_size >= 1, f"batch_size {batch_size} must be at least 1"),
        (
            not (shuffle and batch_size % process_count),
            f"batch_size {batch_size} must be a multiple of {process_count} processes",
        ),
        (mask_side >= 8 and mask_side % 8 == 0, f"data.mask_side {mask_side} must be a multiple of 8"),
        (resize in transforms.RESIZE, f"data.resize {resize!r} is unknown; use one of {', '.join(transforms.RESIZE)}"),
        (0 <= hflip <= 1, f"data.hflip {hflip} must be a probability, 0..1"),
        (0 <= color_jitter <= 1, f"data.color_jitter {color_jitter} must lie in 0..1"),
        (threads >= 1 and workers >= 0 and prefetch >= 1, "data.threads and data.prefetch must be at least 1"),
        (seed >= 0, f"seed {seed} must not be negative"),
    )
    plan = Plan(
        transforms.resized_sizes(index.sizes, short_side, long_side, resize),
        image_indices,
        batch_size=batch_size,
        buckets=buckets_for(short_side, long_side, buckets),
        shuffle=shuffle,
        seed=seed,
    )
    share = batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share) if shuffle else slice(None)
    num_objects = np.diff(index.offsets) if ignore_regions else index.num_objects
    read = _BatchReader(
        index=index,
        plan=plan,
        channels=channels,
        short_side=short_side,
        long_side=long_side,
        resize=resize,
        annotations=annotations,
        max_objects=max(8, -(-int(num_objects.max()) // 8) * 8),
        hflip=hflip,
        color_jitter=color_jitter,
        ignore_regions=ignore_regions,
        mask_side=mask_side,
        skip_broken=skip_broken,
        process_rows=rows,
    )
    num_steps = plan.steps_per_epoch if num_steps is None else num_steps
    steps = range(start_step, num_steps) if shuffle else range(start_step + process_index, num_steps, process_count)
    return Loader(read, steps=steps, threads=threads, workers=workers, prefetch=prefetch)


def _check(*checks: tuple[bool, str]) -> None:
    failed = [message for passed, message in checks if not passed]
    if failed:
        raise UserError("; ".join(failed))
