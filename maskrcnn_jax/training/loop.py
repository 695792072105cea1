"""The training loop, top to bottom: data, model, optimizer, step, restore, then {step, log, save, evaluate}."""

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.coco import CocoIndex, drop_labels
from maskrcnn_jax.data.dataset import load_dataset
from maskrcnn_jax.data.loader import Loader, make_loader, training_subset
from maskrcnn_jax.distributed import is_first, make_mesh, replicated, shard_batch
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.training.check_data import check_before_training
from maskrcnn_jax.training.checkpoint import Checkpoints, changed_settings, has_checkpoint, save_config
from maskrcnn_jax.training.derive import fill_in
from maskrcnn_jax.training.memory import give_back_memory
from maskrcnn_jax.training.metrics import MetricWriter
from maskrcnn_jax.training.optimizer import make_optimizer, make_schedule
from maskrcnn_jax.training.step import (
    MIN_LOSS_SCALE,
    TrainState,
    TrainStep,
    create_train_state,
    device_memory,
    updates_done,
)


class Evaluation(Protocol):
    """What the loop uses of an evaluation."""

    metrics: dict
    picture: np.ndarray


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    make_evaluate: Callable[[Categories], Callable[[nnx.Module], Evaluation] | None],
    initialise: Callable[[MaskRCNN], None] | None = None,
) -> None:
    """Train a model, going on from the newest checkpoint in ``workdir`` if there is one.

    Args:
      config: as configs/base.py describes it.
      workdir: folder for everything that the run leaves; created if missing.
      make_evaluate: called once with the categories; what it returns is called with the model after epochs, unless
        ``eval_every`` is 0.
      initialise: called with the model when there is no checkpoint, to change its initial values.

    Raises:
      UserError: when the config, the data or the folder do not fit, or a loss is not finite.
    """
    # 1. Data
    mesh = make_mesh()
    _check_batch_size(config.batch_size, config.optim.accumulate)
    data = config.data
    index = load_dataset(data, data.train_split)
    check_before_training(config, index)
    index = drop_labels(index, data.drop_labels, config.seed)
    config = fill_in(config, len(training_subset(index, data.train_limit, config.seed)))
    evaluate = make_evaluate(index.categories)
    steps_per_epoch = _make_loader(config, index, 0, None).steps_per_epoch
    num_steps = min(config.epochs * steps_per_epoch, config.max_steps or np.inf)

    # 2. Model and optimizer
    model = MaskRCNN(index.categories.num_classes, **config.model, rngs=nnx.Rngs(config.seed))
    optim = config.optim.to_dict()
    optim.pop("lr_batch_size")  # lr is scaled already
    schedule = make_schedule(
        lr=optim.pop("lr"),
        warmup_steps=optim.pop("warmup_steps"),
        final_lr_fraction=optim.pop("final_lr_fraction"),
        num_steps=num_steps,
    )
    loss_scale, ema_decay = optim.pop("loss_scale"), optim.pop("ema_decay")
    step_options = {name: optim.pop(name) for name in ("loss_scale_interval", "accumulate")} | {"ema_decay": ema_decay}
    optimizer = make_optimizer(schedule, **optim)

    # 3. Step and state: of the newest checkpoint of this folder, else with weights from elsewhere, else fresh
    workdir = Path(workdir)
    if has_checkpoint(workdir):
        _check_same_categories(workdir, index.categories)
    elif initialise:
        initialise(model)
    elif config.optim.frozen_stages:
        raise UserError(
            f"optim.frozen_stages {config.optim.frozen_stages} would keep the first stages of the backbone at random "
            "values; give --weights, or set it to 0"
        )
    graphdef, state = create_train_state(
        model,
        optimizer,
        mesh,
        loss_scale=loss_scale,
        average=ema_decay > 0,
        divide=config.shard_params,
        frozen_stages=config.optim.frozen_stages,
    )
    train_step = TrainStep(graphdef, optimizer, mesh, **step_options)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made ({error.strerror}); choose another folder") from None
    with contextlib.closing(Checkpoints(workdir, keep=config.keep_checkpoints)) as checkpoints:
        restored = checkpoints.restore_newest(state)
        state = state if restored is None else restored
        changes = [] if restored is None else changed_settings(config, workdir)
        if is_first():
            save_config(config, workdir)
            index.categories.save(workdir / "categories.json")
        start = int(state.step)
        parameters = sum(array.size for array in jax.tree.leaves(state.params))
        parts = config.optim.accumulate
        in_parts = f" in {parts} parts of {config.batch_size // parts}" if parts > 1 else ""
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        _print(
            f"{'resuming' if start else 'starting'} at step {start} of {num_steps}, {steps_per_epoch} steps an epoch, "
            f"batch {config.batch_size}{in_parts} on {jax.device_count()} {jax.default_backend()} devices{processes}, "
            f"{parameters / 1e6:.1f} M parameters, {config.model.dtype}"
            + ("" if start or initialise else ", from random values")
        )
        if changes:
            _print(f"settings that this run did not have before: {', '.join(changes)}")

        def evaluation_is_due(step: int) -> bool:
            return bool(config.eval_every) and (step == num_steps or step % (config.eval_every * steps_per_epoch) == 0)

        to_evaluate = start > 0 and evaluation_is_due(start) and not checkpoints.is_evaluated(start)
        if start >= num_steps and not to_evaluate:
            _print(f"nothing to do: {workdir} has been trained for all of its {num_steps} steps")
            return

        # 4. Randomness and data, from that step on
        key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(config.seed)
        batches = iter(_make_loader(config, index, start, num_steps))

        # 5. Steps
        with (
            contextlib.closing(
                MetricWriter(workdir, first_step=start, evaluated=not to_evaluate, active=is_first())
            ) as writer,
            contextlib.closing(batches),
            _StopSignals() as stop,
            ThreadPoolExecutor(1) as watcher,
            tqdm(total=num_steps, initial=start, unit="step", desc="train", disable=not is_first()) as progress,
        ):

            def measure(step: int, state: TrainState) -> None:
                evaluation = evaluate(nnx.merge(graphdef, state.inference_params, state.variables, copy=True))
                writer.scalars(step, {k: v for k, v in evaluation.metrics.items() if isinstance(v, float)})
                writer.picture(step, "predictions", evaluation.picture)
                checkpoints.add_metrics(step, evaluation.metrics)
                del evaluation
                give_back_memory()

            if to_evaluate:  # the run was ended before or in this evaluation
                measure(start, state)
            log = _Log(writer, index, schedule, updates_done(state), config.batch_size, steps_per_epoch, watcher)
            expected = None
            for step in range(start + 1, num_steps + 1):
                wanted = time.perf_counter()
                batch = next(batches)
                came = time.perf_counter()
                placed = shard_batch(batch, mesh)  # while the devices are at the step before
                if program := train_step.compile(state, placed, key):
                    height, width = batch.images.shape[1:3]
                    seconds = time.perf_counter() - came
                    _print(
                        f"images of {height}x{width}: a step takes {device_memory(program)} of each device, "
                        f"compiled in {seconds:.0f} s"
                    )
                    log.restart_clock()
                state, metrics = train_step(state, placed, key)
                del placed  # before the next is made
                log.add(step, metrics, batch.image_index, wanted, came)
                progress.update()

                stop.agree(step - start)
                last = step == num_steps
                evaluating = evaluation_is_due(step) and not stop.requested
                saving = last or stop.requested or evaluating or step % (config.checkpoint_every or np.inf) == 0
                if saving or step % (config.log_every or np.inf) == 0:
                    progress.set_postfix_str(log.write())  # before saving: what is not finite must not be saved
                    if expected is None and not last:
                        expected = datetime.timedelta(seconds=round(log.seconds_per_step * (num_steps - step)))
                        _print(f"expected: {expected} for the other {num_steps - step} steps, without evaluations")
                if saving:
                    checkpoints.save(state)
                    if evaluating:
                        measure(step, state)
                    log.restart_clock()
                if saving and stop.requested:  # told so after it was decided not to save: in the next step
                    break
            checkpoints.wait()
    if stop.requested:
        _print(f"stopped at step {int(state.step)}; the same command goes on from here")
        raise SystemExit(128 + stop.requested)


def _print(line: str) -> None:
    if is_first():
        tqdm.write(line)  # above the progress bar, if there is one


def _check_same_categories(workdir: Path, categories: Categories) -> None:
    trained_on = Categories.load(workdir / "categories.json")
    if trained_on != categories:
        raise UserError(
            f"{workdir} was trained on other categories ({', '.join(trained_on.names[:3])}, ...) than the dataset has "
            f"({', '.join(categories.names[:3])}, ...); use another --workdir, or the dataset of that run"
        )


def _check_batch_size(batch_size: int, parts: int) -> None:
    if parts < 1:
        raise UserError(f"optim.accumulate {parts} must be a number of parts of the batch; use 1 for none")
    devices = jax.device_count()
    unit = devices * parts
    if batch_size % unit:
        lower = batch_size // unit * unit
        choices = f"{lower} or {lower + unit}" if lower else f"{unit}"
        among = f"{devices} devices" + (f" times {parts} parts (optim.accumulate)" if parts > 1 else "")
        raise UserError(f"batch_size {batch_size} is not divisible by {among}; use {choices}")


def _make_loader(config: ConfigDict, index: CocoIndex, start_step: int, num_steps: int | None) -> Loader:
    data = config.data
    return make_loader(
        index,
        batch_size=config.batch_size,
        channels=config.model.in_channels,
        short_side=data.short_side,
        long_side=data.long_side,
        buckets=data.buckets,
        resize=data.resize,
        shuffle=True,
        annotations=True,
        hflip=data.hflip,
        color_jitter=data.color_jitter,
        ignore_regions=data.ignore_regions,
        mask_side=data.mask_side,
        seed=config.seed,
        start_step=start_step,
        num_steps=num_steps,
        image_indices=training_subset(index, data.train_limit, config.seed),
        threads=data.threads,
        workers=data.workers,
        prefetch=data.prefetch,
        skip_broken=data.skip_broken,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


class _Log:
    """Collect the metrics of steps on the device, and fetch, check and write them together."""

    def __init__(
        self,
        writer: MetricWriter,
        index: CocoIndex,
        schedule,
        updates: int,
        batch_size: int,
        steps_per_epoch: int,
        watcher: ThreadPoolExecutor,
    ):
        self._writer, self._index, self._schedule, self._watcher = writer, index, schedule, watcher
        self._updates = updates  # of the parameters so far, by which the schedule goes: a skipped step is none
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._pending: list[tuple[int, dict, np.ndarray]] = []
        self._finished: Future[float] | None = None  # a future of when the last step has
        self.seconds_per_step = 0.0  # of the steps that were written last
        self._line = ""
        self.restart_clock()

    def restart_clock(self, now: float | None = None) -> None:
        """Forget the time spent on something other than training, up to ``now``."""
        self._started = time.perf_counter() if now is None else now
        self._waited, self._timed_steps = 0.0, 0

    def add(self, step: int, metrics: dict, image_index: np.ndarray, wanted: float, came: float) -> None:
        """Take over the metrics of a step, still on the device, the rows of its images and the times of its batch."""
        # Steps are queued without waiting for their results; at most two, or batches would pile up in memory.
        idle_since = self._finished.result() if self._finished else wanted
        # While the devices are at the step before, waiting for a batch costs nothing.
        self._waited += max(came - max(wanted, idle_since, self._started), 0)
        self._finished = self._watcher.submit(_when_ready, metrics)
        self._pending.append((step, metrics, image_index))
        self._timed_steps += 1

    def write(self) -> str:
        """Fetch and write what has been added since the last time; return a line for the progress bar.

        What is written is the mean over the steps, in float16 over those that were not skipped, if there are any; the
        learning rate is that of the last step that was not.
        Images per second are counted from end to end, with loading and logging, without compiling, evaluating and
        saving. The wait for data is the share of this time in which the devices had nothing to do for want of a batch.

        Raises:
          UserError: when a loss or gradient is not finite, with its terms, step and images. In float16 such a step is
            skipped and a smaller loss scale may mend it, so only one at the smallest scale stops the run.
        """
        if not self._pending:
            return self._line
        # One transfer for all steps, so that between log steps nothing waits for the device.
        rows = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, image_index), row in zip(self._pending, rows, strict=True):
            # A loss may be finite where its gradient, and so the next state, is not.
            skipped = row.get("skipped") and row["loss_scale"] > MIN_LOSS_SCALE
            if not np.isfinite(row["loss"] + row["gradient_norm"]) and not skipped:
                terms = ", ".join(
                    f"{name} {value:.4g}" for name, value in row.items() if "loss" in name or "norm" in name
                )
                images = self._index.image_ids[image_index[image_index >= 0]].tolist()
                raise UserError(
                    f"the loss at step {step} is not finite: {terms}; image ids {images}. Lower config.optim.lr, or "
                    "look at the annotations of these images; nothing from this step on has been saved"
                )
        now = time.perf_counter()
        seconds = now - self._started
        self.seconds_per_step = seconds / self._timed_steps
        step = self._pending[-1][0]
        taken = [row for row in rows if not row.get("skipped")]
        self._updates += len(taken)
        rate = self._schedule(max(self._updates - 1, 0))  # of the last update
        taken = taken or rows

        def mean(name):
            return float(np.mean([row[name] for row in (rows if name in ("loss_scale", "skipped") else taken)]))

        values = {
            "epoch": step / self._steps_per_epoch,
            "lr": float(rate),
            **{name: mean(name) for name in rows[0]},
            "images_per_second": self._timed_steps * self._batch_size / seconds,
            "data_wait": self._waited / seconds,
        }
        self._writer.scalars(step, {name: value for name, value in values.items() if np.isfinite(value)})
        self._line = (
            f"loss {values['loss']:.3f} (cls {values['loss_classifier']:.3f} box {values['loss_box_reg']:.3f} "
            f"mask {values['loss_mask']:.3f} rpn {values['loss_objectness']:.3f} {values['loss_rpn_box_reg']:.3f}) "
            f"{values['images_per_second']:.1f} im/s, data {values['data_wait']:.0%}"
        )
        self._pending.clear()
        self.restart_clock(now)
        return self._line


def _when_ready(metrics: dict) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()


class _StopSignals:
    """Turn Ctrl-C and SIGTERM into a request to save and stop after the current step; a second one stops at once.

    Several processes must stop after the same step, whichever of them is told to. JAX's preemption service, which
    handles SIGTERM itself, makes them agree; Ctrl-C is handed on to it.
    """

    def __enter__(self) -> "_StopSignals":
        self.requested = 0
        caught = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        self._previous = {number: signal.signal(number, self._request) for number in caught}
        return self

    def agree(self, call: int) -> None:
        """Learn whether any of several processes was told to stop; all call this after each step, with 1, 2, ...

        Not with the step itself: processes that were told before their first call agree on 1, which a resumed run
        would never come to.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(call):
            self.requested = int(signal.SIGTERM)

    def _request(self, number, _) -> None:
        signal.signal(number, self._previous[number])
        if jax.process_count() == 1:
            self.requested = int(number)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
