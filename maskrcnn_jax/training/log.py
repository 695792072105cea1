"""What training prints and writes about its steps."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
import optax

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import MIN_LOSS_SCALE
from maskrcnn_jax.training.metrics import MetricWriter

# Name in the metrics -> name in the progress line.
_SHOWN = {
    "loss": "loss",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_objectness": "rpn objectness",
    "loss_rpn_box_reg": "rpn box",
}


class StepLog:
    """Collects the metrics of steps on the device, and fetches, checks and writes them together."""

    def __init__(
        self,
        writer: MetricWriter,
        index: CocoDataset,
        schedule: optax.Schedule,
        *,
        updates: int,
        batch_size: int,
        steps_per_epoch: int,
        watcher: ThreadPoolExecutor,
    ):
        """Start the clock.

        Args:
            writer: Where the metrics go.
            index: The dataset, to name the images of a step.
            schedule: The learning rate as a function of the number of updates.
            updates: Updates of the parameters so far. Steps that float16 skipped are none.
            batch_size: Images a step.
            steps_per_epoch: Steps an epoch.
            watcher: A thread that waits for the devices.
        """
        self._writer, self._index, self._schedule, self._watcher = writer, index, schedule, watcher
        self._updates, self._batch_size, self._steps_per_epoch = updates, batch_size, steps_per_epoch
        self._pending: list[tuple] = []
        self._finished: Future[float] | None = None  # the time at which the last step finishes
        self.seconds_per_step = 0.0  # of the steps that were written last
        self._line = ""
        self.restart_clock()

    def restart_clock(self, now: float | None = None) -> None:
        """Forget the time until ``now``, which was spent on something other than training."""
        self._started = time.perf_counter() if now is None else now
        self._waited, self._timed_steps = 0.0, 0

    def add(self, step: int, metrics: dict, image_index: np.ndarray, wanted: float, came: float) -> None:
        """Add the metrics of a step.

        Args:
            step: Its number.
            metrics: Still on the device.
            image_index: [B] rows of its images in the dataset, -1 for none.
            wanted: When its batch was asked for.
            came: When its batch arrived.
        """
        # Steps are queued without waiting for their results; at most two, or batches would pile up in memory.
        idle_since = self._finished.result() if self._finished else wanted
        # While the devices compute the step before, waiting for a batch costs nothing.
        self._waited += max(came - max(wanted, idle_since, self._started), 0)
        self._finished = self._watcher.submit(_when_ready, metrics)
        self._pending.append((step, metrics, image_index))
        self._timed_steps += 1

    def write(self) -> str:
        """Fetch and write what was added since the last call.

        The values are means over the steps, in float16 over those that were not skipped if there are any; the learning
        rate is that of the last update. ``images_per_second`` includes loading and logging and excludes compiling,
        evaluating and saving. ``data_wait`` is the share of the time in which the devices waited for a batch.

        Returns:
            A line for the progress bar.

        Raises:
            UserError: if a loss or gradient is not finite. In float16 such a step is skipped, and only one at the
                smallest loss scale stops the run.
        """
        if not self._pending:
            return self._line
        # One transfer for all steps, so that nothing waits for the device between log steps.
        rows = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, image_index), row in zip(self._pending, rows, strict=True):
            self._check_finite(step, row, image_index)
        now = time.perf_counter()
        seconds = now - self._started
        self.seconds_per_step = seconds / self._timed_steps
        step = self._pending[-1][0]
        taken = [row for row in rows if not row.get("skipped")]
        self._updates += len(taken)
        values = {
            "epoch": step / self._steps_per_epoch,
            "lr": float(self._schedule(max(self._updates - 1, 0))),
            **_means(rows, taken or rows),
            "images_per_second": self._timed_steps * self._batch_size / seconds,
            "data_wait": self._waited / seconds,
        }
        self._writer.scalars(step, {name: value for name, value in values.items() if np.isfinite(value)})
        losses = ", ".join(f"{shown} {values[name]:.3f}" for name, shown in _SHOWN.items() if name in values)
        speed, wait = values["images_per_second"], values["data_wait"]
        self._line = f"{losses}, {speed:.1f} images/s, waiting for data {wait:.0%}"
        self._pending.clear()
        self.restart_clock(now)
        return self._line

    def _check_finite(self, step: int, row: dict, image_index: np.ndarray) -> None:
        # A loss may be finite where its gradient, and so the next state, is not.
        skipped = row.get("skipped") and row["loss_scale"] > MIN_LOSS_SCALE
        if np.isfinite(row["loss"] + row["gradient_norm"]) or skipped:
            return
        terms = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if "loss" in name or "norm" in name)
        images = self._index.image_ids[image_index[image_index >= 0]].tolist()
        raise UserError(
            f"the loss at step {step} is not finite: {terms}; image ids {images}. Lower optim.lr, or check the "
            "annotations of these images; nothing from this step on has been saved"
        )


def _means(rows: list[dict], taken: list[dict]) -> dict[str, float]:
    """Return the mean of every metric over the steps that were taken, or over all for the loss scale."""
    of_all = ("loss_scale", "skipped")
    return {name: float(np.mean([row[name] for row in (rows if name in of_all else taken)])) for name in rows[0]}


def _when_ready(metrics: dict) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()
