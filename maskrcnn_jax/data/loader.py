"""Batches of padded images, in an order that depends on the seed alone.

Which images a step sees is a pure function of (seed, epoch), see ``plan``, and what augmentation does to each of them
of (seed, epoch, position in the epoch): neither the number of threads or processes nor where a run was resumed changes
a byte. Resuming therefore needs the step number and no saved state.
"""

import dataclasses
import functools
import gc
import logging
import threading
from collections.abc import Generator

import grain
import numpy as np
from absl import flags

from maskrcnn_jax.data import augment, transforms
from maskrcnn_jax.data.coco import CocoDataset, ImageAnnotations
from maskrcnn_jax.data.copy_paste import draw_scene
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.data.plan import Plan, planned, repeat_factors, training_buckets
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions
from maskrcnn_jax.structures import Batch, GroundTruth

_log = logging.getLogger(__name__)

# The masks of an image may take this many bytes. 640 pixels a side, enough for any mask of COCO, are always allowed.
_MASK_BYTES, _MASK_SIDE = 1 << 24, 640
# An image is named in a warning if it has more objects than this and so many times what most images have.
_MANY_OBJECTS, _MANY_TIMES = 100, 4


def mask_side(longest: int, num_objects: int) -> int:
    """Return the side of the canvas that holds the mask of an object, in pixels, a multiple of 8.

    Args:
        longest: The longest side of the masks of a dataset, in pixels. Masks that exceed the canvas are sampled.
        num_objects: For how many objects a batch has room in each image.
    """
    affordable = max(_MASK_SIDE, int((8 * _MASK_BYTES / num_objects) ** 0.5) // 8 * 8)
    return min(-(-longest // 8) * 8, affordable)


@dataclasses.dataclass(frozen=True)
class _BatchReader:
    """Reads the batch of a step; threads share it and processes get a copy, so it keeps no state."""

    index: CocoDataset
    plan: Plan
    options: DataOptions
    channels: int
    annotations: bool
    max_objects: int
    mask_side: int
    image_indices: np.ndarray  # rows of the index that take part
    process_rows: slice  # of every batch, those of this process

    def __call__(self, step: int) -> Batch | Exception:
        """Read a batch; a problem of the user's is returned, since processes would drop part of a raised one."""
        images, padded_size = self.plan.step(step)
        batch = self._empty(len(images[self.process_rows]), padded_size)
        epoch, step = divmod(step, self.plan.steps_per_epoch)
        for row, position in enumerate(range(len(images))[self.process_rows]):
            if images[position] >= 0:
                sample = (self.plan.seed, epoch, step * len(images) + position + 1)
                try:
                    self._fill(batch, row, int(images[position]), sample)
                except UserError as error:
                    if not self._skips(error):
                        return error
        return batch

    def _skips(self, error: UserError) -> bool:
        if skipped := self.options.skip_broken and isinstance(error, BrokenImageError):
            _warn_once(str(error))
        return skipped

    def _empty(self, rows: int, padded_size: tuple[int, int]) -> Batch:
        objects, side = self.max_objects, self.mask_side
        gt = GroundTruth(
            boxes=np.zeros((rows, objects, 4), np.float32),
            labels=np.zeros((rows, objects), np.int32),
            masks=np.zeros((rows, objects, side, side // 8), np.uint8),
            mask_windows=np.zeros((rows, objects, 4), np.int32),
            mask_sizes=np.ones((rows, 2), np.int32),
            valid=np.zeros((rows, objects), bool),
            has_mask=None if self.index.has_mask.all() else np.zeros((rows, objects), bool),
            ignored=np.zeros((rows, objects), bool) if self.options.ignore_regions else None,
        )
        return Batch(
            images=np.zeros((rows, *padded_size, self.channels), transforms.RESIZE[self.options.resize]),
            sizes=np.ones((rows, 2), np.int32),  # 1, so that a division by the size of an invalid row stays finite
            original_sizes=np.ones((rows, 2), np.int32),
            image_index=np.full(rows, -1, np.int32),
            valid=np.zeros(rows, bool),
            gt=gt if self.annotations else None,
        )

    def _fill(self, batch: Batch, row: int, i: int, sample: tuple[int, int, int]) -> None:
        rng = np.random.default_rng(sample)
        fill = self._fill_moved if augment.moves_images(self.options) else self._fill_resized
        image = fill(batch, row, i, rng)
        height, width, _ = image.shape
        batch.images[row, :height, :width] = image
        batch.sizes[row] = height, width
        batch.original_sizes[row] = self.index.sizes[i]
        batch.image_index[row] = i
        batch.valid[row] = True

    def _fill_resized(self, batch: Batch, row: int, i: int, rng: np.random.Generator) -> np.ndarray:
        """Fill in the objects of an image that is resized, and mirrored now and then; returns the image."""
        options = self.options
        flip = rng.random() < options.hflip
        image = self.index.read_image(i, self.channels)
        height, width, _ = image.shape
        short_side = augment.draw_short_side(options, rng)
        size = transforms.resized_size(height, width, short_side, options.long_side, options.resize)
        if options.color_jitter:
            image = transforms.color_jitter(image, options.color_jitter, rng)
        if flip:
            image = transforms.hflip_image(image)
        if batch.gt is not None:
            self._fill_objects(batch.gt, row, i, size, flip, rng)
        return transforms.resize_image(image, size, options.resize)

    def _fill_moved(self, batch: Batch, row: int, i: int, rng: np.random.Generator) -> np.ndarray:
        """Fill in the visible objects of an image that is cropped, turned or pasted over; returns the image."""
        crop = self.options.crop_size
        scene = draw_scene(
            *(self.index, i, self.options),
            canvas=(crop, crop) if crop else (batch.images.shape[1], batch.images.shape[2]),
            channels=self.channels,
            max_objects=self.max_objects,
            donors=self.image_indices,
            skips=self._skips,
            rng=rng,
        )
        if (gt := batch.gt) is None:
            return scene.image
        objects, size, num = scene.objects, scene.image.shape[:2], len(scene.objects.ids)
        packed, windows, gt.mask_sizes[row] = transforms.pack_masks(scene.crops, size, size, self.mask_side)
        gt.masks[row, :num], gt.mask_windows[row, :num] = packed, windows
        y, x, height, width = windows.T
        around = np.stack([x, y, x + width, y + height], axis=1)
        gt.boxes[row, :num] = np.where(objects.has_mask[:, None], around, objects.boxes)
        self._fill_columns(gt, row, objects)
        return scene.image

    def _fill_objects(
        self, gt: GroundTruth, row: int, i: int, size: tuple[int, int], flip: bool, rng: np.random.Generator
    ) -> None:
        objects = self.index.annotations(i, self.options.ignore_regions)
        chosen = np.arange(len(objects.ids))
        if len(chosen) > self.max_objects:
            chosen = np.sort(rng.choice(chosen, self.max_objects, replace=False))
        num = len(chosen)
        height, width = map(int, self.index.sizes[i])
        boxes = objects.boxes[chosen]
        if flip:
            boxes = transforms.hflip_boxes(boxes, width)
        gt.boxes[row, :num] = transforms.scale_boxes(boxes, (height, width), size)
        crops = self.index.crops(i, chosen, self.options.ignore_regions)
        gt.masks[row, :num], gt.mask_windows[row, :num], gt.mask_sizes[row] = transforms.pack_masks(
            crops, (height, width), size, self.mask_side, flip=flip
        )
        self._fill_columns(gt, row, ImageAnnotations(*(column[chosen] for column in objects)))

    def _fill_columns(self, gt: GroundTruth, row: int, objects: ImageAnnotations) -> None:
        num = len(objects.ids)
        gt.labels[row, :num] = objects.labels
        # What has no area now overlaps all anchors alike, by nothing, and would be matched to each.
        has_area = (gt.boxes[row, :num, 2:] > gt.boxes[row, :num, :2]).all(axis=1)
        gt.valid[row, :num] = has_area & ~objects.crowd
        if gt.has_mask is not None:
            gt.has_mask[row, :num] = objects.has_mask
        if gt.ignored is not None:
            gt.ignored[row, :num] = has_area & objects.crowd


_WARNING = threading.Lock()  # functools.cache alone would let threads warn at the same time


@functools.cache
def _warn(message: str) -> None:
    _log.warning("%s", message)


def _warn_once(message: str) -> None:
    with _WARNING:
        _warn(message)


class Loader:
    """Iterates over the batches of a run from one step on; each ``iter()`` starts there again."""

    def __init__(self, read: _BatchReader, *, steps: range):
        self.steps_per_epoch = read.plan.steps_per_epoch
        self.steps = steps
        self._read = read

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_images(self) -> int:
        """Images that an iteration brings, broken ones too."""
        rows = self._read.process_rows
        return sum(int((self._read.plan.step(step)[0][rows] >= 0).sum()) for step in self.steps)

    def __iter__(self) -> Generator[Batch, None, None]:
        if not len(self):
            return
        options = self._read.options
        steps = grain.MapDataset.range(self.steps.start, self.steps.stop, self.steps.step)
        batches = steps.map(self._read).to_iter_dataset(
            grain.ReadOptions(num_threads=options.threads, prefetch_buffer_size=max(options.prefetch, options.threads))
        )
        if options.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads its flags, which only absl's app.run parses
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=options.workers, per_worker_buffer_size=1)
            )
        iterator = iter(batches)
        try:
            for batch in iterator:
                if isinstance(batch, Exception):
                    raise batch
                yield _copy(batch) if options.workers else batch
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError("a process that loads images died, probably out of memory; lower data.workers") from None
        finally:
            iterator.close()
            if options.workers:
                # The last batches hang in a reference cycle of grain's; uncollected, their shared memory would stay
                # until the process ends, and Python would complain of a leak then.
                del iterator, batches
                batch = None
                gc.collect()


def _copy(batch: Batch) -> Batch:
    """Copy a batch out of memory shared with a worker, which is freed badly if somebody holds it to the end."""
    gt = batch.gt and GroundTruth(*(array if array is None else np.array(array) for array in batch.gt))
    return Batch._make([*map(np.array, batch[:-1]), gt])


def make_loader(
    index: CocoDataset,
    options: DataOptions,
    *,
    batch_size: int,
    train: bool,
    annotations: bool,
    channels: int = 3,
    seed: int = 0,
    start_step: int = 0,
    num_steps: int | None = None,
    image_indices: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Build an iterable of ``Batch`` of numpy arrays.

    Args:
        index: The dataset.
        options: How images are resized, augmented and loaded.
        batch_size: Images a step, over all processes.
        train: True for training: augmentation, a new order every epoch, partial batches filled with other images of
            their bucket. False for evaluation: every image exactly once, partial batches filled with rows whose
            ``valid`` is False.
        annotations: Whether batches have ``gt``.
        channels: Of the images, RGB first.
        seed: Of the order and the augmentation.
        start_step: First step to load, counted from the start of the run.
        num_steps: Steps of the whole run, counted from its start; None means one epoch.
        image_indices: Rows of the index that take part, None for all.
        process_index: Of this process among those that work together.
        process_count: In training each process loads an equal share of the rows of every batch, all at the same
            bucket; in evaluation every batch goes to one process.

    Returns:
        A ``Loader`` with ``steps_per_epoch``. Iterating raises BrokenImageError at the batch with a broken image.

    Raises:
        UserError: if there are no images, or the processes cannot share a batch.
    """
    image_indices = np.arange(len(index)) if image_indices is None else np.asarray(image_indices)
    if not len(image_indices):
        raise UserError("there are no images to load; check data.train_split, data.eval_split and their limits")
    if train and batch_size % process_count:
        raise UserError(
            f"batch_size is {batch_size} with {process_count} processes; use a multiple of {process_count}"
        )
    options = planned(options) if train else augment.unaugmented(options)
    if options.copy_paste and not (index.has_mask & ~index.crowd).any():
        _warn_once("data.copy_paste pastes nothing, since no object of the dataset has a mask; set it to 0")
    sizes = transforms.resized_sizes(index.sizes, options.short_side, options.long_side, options.resize)
    plan = Plan(
        np.minimum(sizes, options.crop_size) if options.crop_size else sizes,
        image_indices,
        batch_size=batch_size,
        buckets=training_buckets(options),
        shuffle=train,
        seed=seed,
        repeats=repeat_factors(index, image_indices, options.repeat_threshold) if options.repeat_threshold else None,
    )
    share = batch_size // process_count
    max_objects = _max_objects(index, options, train=train) if annotations else 0
    read = _BatchReader(
        index=index,
        plan=plan,
        options=options,
        channels=channels,
        annotations=annotations,
        max_objects=max_objects,
        mask_side=mask_side(_longest_mask(index, options), max_objects) if annotations else 0,
        image_indices=image_indices,
        process_rows=slice(process_index * share, (process_index + 1) * share) if train else slice(None),
    )
    num_steps = plan.steps_per_epoch if num_steps is None else num_steps
    steps = range(start_step, num_steps) if train else range(start_step + process_index, num_steps, process_count)
    return Loader(read, steps=steps)


def _max_objects(index: CocoDataset, options: DataOptions, *, train: bool) -> int:
    """Return for how many objects a batch has room in each image; in training, warn if one has by far the most."""
    counts = np.diff(index.offsets) if options.ignore_regions else index.num_objects
    most, usual = int(counts.max()), int(np.percentile(counts, 95))
    # For the objects that are pasted there is as much room as most images need.
    room = most + usual if options.copy_paste else most
    if train and options.max_objects:
        room = min(room, options.max_objects)
    elif train and most > max(_MANY_OBJECTS, _MANY_TIMES * usual):
        _log.warning(
            "%s has %d objects, while 95 %% of the images have at most %d. Every step takes the memory and time of %d "
            "objects an image; set data.max_objects to limit their number",
            *(index.file_names[counts.argmax()], most, usual, most),
        )
    return max(8, -(-room // 8) * 8)


def _longest_mask(index: CocoDataset, options: DataOptions) -> int:
    """Return the longest side of the objects in pixels of the image or of the network input, whichever has fewer."""
    sizes = transforms.resized_sizes(index.sizes, options.short_side, options.long_side, options.resize)
    # Scale jitter may leave an image as large as it is.
    scales = np.ones_like(sizes) if options.scale_jitter else np.minimum(sizes / index.sizes, 1)
    scales = scales[index.image_rows]  # [K, 2] of height, width
    sides = (index.boxes[:, 2:] - index.boxes[:, :2])[:, ::-1] * scales
    longest = int(np.ceil(sides.max(initial=0))) + 2  # a mask may reach into one more pixel on either side
    return min(longest, options.crop_size) if options.crop_size else longest
