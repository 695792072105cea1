"""The training loop, top to bottom: data, model, optimizer, restore, then {step, log, save, evaluate}."""

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from maskrcnn_jax.checking.annotations import check_before_training
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.coco import CocoDataset, drop_labels
from maskrcnn_jax.data.dataset import load_dataset
from maskrcnn_jax.data.loader import Loader, make_loader
from maskrcnn_jax.data.plan import training_subset
from maskrcnn_jax.distributed import is_first, make_mesh, process_rank, replicated, shard_batch
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import as_path
from maskrcnn_jax.run_folder import changed_options, has_checkpoint, load_options, save_options
from maskrcnn_jax.training.checkpoint import Checkpoints
from maskrcnn_jax.training.derive import derive_options
from maskrcnn_jax.training.early_stopping import reason_to_stop
from maskrcnn_jax.training.log import StepLog
from maskrcnn_jax.training.metrics import MetricWriter
from maskrcnn_jax.training.optimizer import make_optimizer, make_schedule
from maskrcnn_jax.training.profiler import Profiler
from maskrcnn_jax.training.signals import StopSignals
from maskrcnn_jax.training.step import (
    TrainState,
    TrainStep,
    create_train_state,
    device_memory,
    give_back_memory,
    updates_done,
)

_log = logging.getLogger(__name__)


class Evaluation(Protocol):
    """What the loop uses of an evaluation."""

    metrics: dict
    picture: np.ndarray


Evaluate = Callable[[MaskRCNN], Evaluation]


class _Run(NamedTuple):
    """What stays the same from step to step."""

    options: Options
    dataset: CocoDataset
    workdir: Path
    graphdef: nnx.GraphDef
    schedule: optax.Schedule
    train_step: TrainStep
    checkpoints: Checkpoints
    evaluate: Evaluate | None
    steps_per_epoch: int
    num_steps: int
    profile_steps: int

    def evaluation_is_due(self, step: int) -> bool:
        """Return whether the model is evaluated after a step."""
        interval = self.options.eval_every * self.steps_per_epoch
        return self.evaluate is not None and (step == self.num_steps or step % interval == 0)

    def evaluation_is_owed(self, step: int) -> bool:
        """Return whether the run was interrupted before or in the evaluation after a step."""
        return step > 0 and self.evaluation_is_due(step) and not self.checkpoints.is_evaluated(step)

    def reason_to_stop(self, step: int) -> str:
        """Return why the run ends early after a step, an empty string if it does not; no evaluation may be owed."""
        return "" if step >= self.num_steps else reason_to_stop(self.options, self.workdir, step)


def train(
    options: Options,
    workdir: str | os.PathLike,
    *,
    make_evaluate: Callable[[Categories], Evaluate],
    initialize: Callable[[MaskRCNN], None] | None = None,
    profile_steps: int = 0,
) -> None:
    """Train a model, resuming from the newest checkpoint in ``workdir`` if there is one.

    Args:
        options: Of the run.
        workdir: Folder for everything that the run leaves; created if it does not exist.
        make_evaluate: Called once with the categories, unless ``eval_every`` is 0. What it returns is called with the
            model after epochs.
        initialize: Called with the model if there is no checkpoint, to change its initial values.
        profile_steps: Steps to trace.

    Raises:
        UserError: if the options, the data and the folder do not fit each other, or a loss is not finite.
    """
    # 1. Data
    mesh = make_mesh()
    _check_batch_size(options.batch_size, options.optim.accumulate)
    index = load_dataset(options.data, options.data.train_split)
    check_before_training(options, index)
    index = drop_labels(index, options.data.drop_labels, options.seed)
    options = derive_options(options, len(training_subset(index, options.data.train_limit, options.seed)))
    evaluate = make_evaluate(index.categories) if options.eval_every else None
    steps_per_epoch = _make_loader(options, index, 0, None).steps_per_epoch
    num_steps = _count_steps(options, steps_per_epoch)

    # 2. Model and optimizer
    model = MaskRCNN(index.categories.num_classes, options.model, rngs=nnx.Rngs(options.seed))
    schedule = make_schedule(options.optim, num_steps, steps_per_epoch)
    optimizer = make_optimizer(options.optim, schedule)

    # 3. State: of the newest checkpoint in this folder, else with given weights, else with random weights
    workdir = as_path(workdir)
    if has_checkpoint(workdir):
        _check_same_categories(workdir, index.categories)
    elif initialize:
        initialize(model)
    elif options.optim.frozen_stages:
        raise UserError(
            f"optim.frozen_stages {options.optim.frozen_stages} would keep the first stages of the backbone at random "
            "values; start from pretrained weights, or set it to 0"
        )
    graphdef, state = create_train_state(model, optimizer, mesh, options.optim, shard=options.shard_params)
    train_step = TrainStep(graphdef, optimizer, mesh, options.optim)
    with contextlib.closing(
        Checkpoints(workdir, keep=options.keep_checkpoints, best_metric=options.best_metric)
    ) as checkpoints:
        restored = checkpoints.restore_newest(state)
        state = state if restored is None else restored
        changes = [] if restored is None else changed_options(options, workdir)
        run = _Run(
            options,
            index,
            workdir,
            graphdef,
            schedule,
            train_step,
            checkpoints,
            evaluate,
            steps_per_epoch,
            num_steps,
            profile_steps,
        )
        step = int(state.step)
        reason = "" if restored is None or run.evaluation_is_owed(step) else run.reason_to_stop(step)
        if reason or (restored is not None and _is_finished(run, step)):
            _log_finished(run, step, changes, reason)
            return
        _log_start(run, state, random=restored is None and initialize is None)
        if changes:
            _log.warning("this run goes on with options that changed: %s", ", ".join(changes))

        # 4. Steps
        key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(options.seed)
        stopped = _take_steps(run, state, key, mesh)
    if stopped:
        raise SystemExit(128 + stopped)


def _take_steps(run: _Run, state: TrainState, key: jax.Array, mesh: jax.sharding.Mesh) -> int:
    """Take the remaining steps; return the signal that stopped the run, or 0."""
    options, checkpoints = run.options, run.checkpoints
    start = int(state.step)
    to_evaluate = run.evaluation_is_owed(start)
    if start == 0:
        _save_options(run)
    batches = iter(_make_loader(options, run.dataset, start, run.num_steps))
    with (
        MetricWriter(
            run.workdir, first_step=start, evaluated=not to_evaluate, active=is_first(), options=options
        ) as writer,
        contextlib.closing(batches),
        contextlib.closing(Profiler(run.workdir, run.profile_steps, run.train_step)) as profiler,
        StopSignals() as stop,
        ThreadPoolExecutor(1) as watcher,
        tqdm(total=run.num_steps, initial=start, unit="step", desc="train", disable=not is_first()) as progress,
    ):
        reason_to_stop = ""
        if to_evaluate:
            _measure(run, state, start, writer)
            _save_options(run)
            reason_to_stop = run.reason_to_stop(start)
        log = StepLog(
            writer,
            run.dataset,
            run.schedule,
            updates=updates_done(state),
            batch_size=options.batch_size,
            steps_per_epoch=run.steps_per_epoch,
            watcher=watcher,
        )
        for step in range(start + 1, run.num_steps + 1):
            if reason_to_stop:
                _log.info("stopped early at step %d: %s", step - 1, reason_to_stop)
                break
            wanted = time.perf_counter()
            batch = next(batches)
            came = time.perf_counter()
            placed = shard_batch(batch, mesh)  # while the devices compute the previous step
            if program := run.train_step.compile(state, placed, key):
                _log_compiled(batch, program, time.perf_counter() - came)
                log.restart_clock()
            profiler.before_step(step - start)
            state, metrics = run.train_step(state, placed, key)
            profiler.after_step(step - start, metrics)
            del placed  # before the next is made
            log.add(step, metrics, batch.image_index, wanted, came)
            progress.update()

            stop.agree(step - start)
            last = step == run.num_steps
            evaluating = run.evaluation_is_due(step) and not stop.requested
            saving = last or stop.requested or evaluating or _is_multiple(step, options.checkpoint_every)
            if saving or _is_multiple(step, options.log_every):
                first = log.seconds_per_step == 0
                progress.set_postfix_str(log.write())  # before saving: what is not finite must not be saved
                if first and not last:
                    _log_expected(log.seconds_per_step, run.num_steps - step)
            if saving:
                # Not earlier in a resumed run: if its first steps fail, the folder must still fit its checkpoints.
                _save_options(run)
                writer.upload()  # a resumed run needs the lines of its steps
                checkpoints.save(state)
                if evaluating:
                    _measure(run, state, step, writer)
                    reason_to_stop = run.reason_to_stop(step)
                log.restart_clock()
            if (
                saving and stop.requested
            ):  # a request that comes after the decision not to save is handled in the next step
                break
        checkpoints.wait()
    if stop.requested:
        _log.info("stopped at step %d; the same command resumes from here", int(state.step))
    return stop.requested


def _count_steps(options: Options, steps_per_epoch: int) -> int:
    all_epochs = options.epochs * steps_per_epoch
    return min(all_epochs, options.max_steps or all_epochs)


def _is_finished(run: _Run, step: int) -> bool:
    """Return whether a run has taken all of its steps and has been evaluated as far as it was to be.

    Only other ``epochs`` or ``max_steps`` make a finished run longer. Options that change the number of steps in an
    epoch, such as the batch size, do not.
    """
    num_steps, before = run.num_steps, run.options
    with contextlib.suppress(UserError):  # without its options, it is what the new ones say
        before = load_options(run.workdir)
        if (before.epochs, before.max_steps) == (run.options.epochs, run.options.max_steps):
            own = _count_steps(before, _make_loader(before, run.dataset, 0, None).steps_per_epoch)
            num_steps = min(num_steps, own)
    return step >= num_steps and not (before.eval_every and run.evaluation_is_owed(step))


def _log_finished(run: _Run, step: int, changes: list[str], reason: str) -> None:
    if reason:
        _log.info("nothing to do: %s was stopped early at step %d: %s", run.workdir, step, reason)
    else:
        _log.info("nothing to do: %s has been trained for all of its %d steps", run.workdir, step)
    if changes:
        _log.warning(
            "%s is finished, so these options are ignored: %s; use another workdir, or more %s to go on from here",
            run.workdir,
            ", ".join(changes),
            "patience" if reason else "epochs",
        )


def _save_options(run: _Run) -> None:
    if is_first():
        save_options(run.options, run.workdir)
        run.dataset.categories.save(run.workdir / "categories.json")


def _measure(run: _Run, state: TrainState, step: int, writer: MetricWriter) -> None:
    """Evaluate the model after a step and write the result."""
    assert run.evaluate is not None  # as evaluation_is_due has found
    evaluation = run.evaluate(nnx.merge(run.graphdef, state.inference_params, state.variables, copy=True))
    writer.scalars(step, {k: v for k, v in evaluation.metrics.items() if isinstance(v, float)})
    writer.picture(step, "predictions", evaluation.picture)
    writer.upload()
    run.checkpoints.add_metrics(step, evaluation.metrics)
    del evaluation
    give_back_memory()


def _is_multiple(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _log_start(run: _Run, state: TrainState, *, random: bool) -> None:
    options, start, parts = run.options, int(state.step), run.options.optim.accumulate
    parameters = sum(array.size for array in jax.tree.leaves(state.params))
    _log.info(
        "%s at step %d of %d, %d steps an epoch, batch %d%s on %d %s devices%s, %.1f M parameters, %s%s",
        "resuming" if start else "starting",
        start,
        run.num_steps,
        run.steps_per_epoch,
        options.batch_size,
        f" in {parts} accumulation steps of {options.batch_size // parts}" if parts > 1 else "",
        jax.device_count(),
        jax.default_backend(),
        f" of {jax.process_count()} processes" if jax.process_count() > 1 else "",
        parameters / 1e6,
        options.model.dtype,
        ", from random weights" if random else "",
    )


def _log_compiled(batch, program: jax.stages.Compiled, seconds: float) -> None:
    height, width = batch.images.shape[1:3]
    memory = device_memory(program)
    _log.info("images of %dx%d: a step takes %s of each device, compiled in %.0f s", height, width, memory, seconds)


def _log_expected(seconds_per_step: float, num_steps: int) -> None:
    expected = datetime.timedelta(seconds=round(seconds_per_step * num_steps))
    _log.info("expected time: %s for the other %d steps, without evaluations", expected, num_steps)


def _check_same_categories(workdir: Path, categories: Categories) -> None:
    trained_on = Categories.load(workdir / "categories.json")
    if trained_on != categories:
        raise UserError(
            f"{workdir} was trained on other categories ({', '.join(trained_on.names[:3])}, ...) than the dataset has "
            f"({', '.join(categories.names[:3])}, ...); use another workdir, or the dataset of that run"
        )


def _check_batch_size(batch_size: int, parts: int) -> None:
    devices = jax.device_count()
    unit = devices * parts
    if batch_size % unit:
        lower = batch_size // unit * unit
        choices = f"{lower} or {lower + unit}" if lower else f"{unit}"
        among = f"{devices} devices" + (f" times {parts} accumulation steps (optim.accumulate)" if parts > 1 else "")
        raise UserError(f"batch_size {batch_size} is not divisible by {among}; use {choices}")


def _make_loader(options: Options, index: CocoDataset, start_step: int, num_steps: int | None) -> Loader:
    return make_loader(
        index,
        options.data,
        batch_size=options.batch_size,
        channels=options.model.in_channels,
        train=True,
        annotations=True,
        seed=options.seed,
        start_step=start_step,
        num_steps=num_steps,
        image_indices=training_subset(index, options.data.train_limit, options.seed),
        process_index=process_rank(make_mesh()),
        process_count=jax.process_count(),
    )
