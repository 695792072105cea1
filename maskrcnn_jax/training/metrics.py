"""Where a run's numbers and pictures go: ``metrics.jsonl``, TensorBoard and experiment trackers."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import as_path, read_bytes
from maskrcnn_jax.training.tracker import Tracker
from maskrcnn_jax.writing import GrowingFiles, replace_file, writing

_UPLOAD_INTERVAL = 60  # seconds between uploads to a bucket, where a file cannot be appended to


class MetricWriter:
    """Append scalars and pictures of a run.

    A resumed run starts from its checkpoint, so later lines are removed first: every step is logged once.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        first_step: int,
        evaluated: bool = True,
        active: bool = True,
        options: Options | None = None,
    ):
        """Open the files.

        Args:
            workdir: of the run.
            first_step: steps done so far; later ones are forgotten.
            evaluated: False where an evaluation after these steps is still to come, so that it is forgotten too.
            active: False for one that writes nothing, in processes beside the one that does.
            options: of the run, for its tracker.

        Raises:
            UserError: when the disk refuses, here and in the methods; when the tracker cannot start.
        """
        self._active = active
        if not active:
            return
        workdir = as_path(workdir)
        self._files = GrowingFiles(workdir)
        self._path, board = self._files.path / "metrics.jsonl", self._files.path / "tensorboard"
        lines = _read_lines(workdir)
        resumes = first_step > 0
        # What a tracker has got it keeps; a resumed run, which computes the same again, must not log it twice.
        self._tracked = max(filter(_is_whole, map(_place_of, lines if resumes else [])), default=(0, False))
        self._tracker = Tracker(options or Options(), workdir, self._files.path, resumes=resumes)
        if lines:
            kept = [line for line in lines if _place_of(line) <= (first_step, evaluated)]
            replace_file(self._path, "".join(line + "\n" for line in kept))
        with writing(self._path):
            self._file = self._path.open("a")
            board.mkdir(exist_ok=True)
            # Not tensorboardX's SummaryWriter: its thread ends on a full disk, and then everything waits for it.
            self._board = EventsWriter(str(board / "events"))
        # TensorBoard forgets what it has read of later steps.
        self._add(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers: in TensorBoard under ``train/`` those of steps, under ``val/`` those of evaluations."""
        if not self._active:
            return
        with writing(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        group = "val" if _is_evaluation(values) else "train"
        for name, value in values.items():
            self._add(step, summary=summary.scalar(f"{group}/{name}", value))
        if (step, group == "val") > self._tracked:
            self._tracker.scalars(step, {f"{group}/{name}": value for name, value in values.items()})
        self._files.upload(after=_UPLOAD_INTERVAL)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an RGB image [h, w, 3] uint8."""
        if not self._active:
            return
        self._add(step, summary=summary.image(f"val/{name}", image, dataformats="HWC"))
        if (step, True) > self._tracked:
            self._tracker.picture(step, f"val/{name}", image)

    def upload(self) -> None:
        """Write everything so far also to a bucket. Call this before saving the step that it belongs to."""
        if self._active:
            self._files.upload()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; for a tracker the run has failed if it ended with an error, and not if it was stopped."""
        self.close(failed=kind is not None and issubclass(kind, Exception))

    def close(self, *, failed: bool = False) -> None:
        """Close the files."""
        if self._active:
            self._tracker.close(failed=failed)
            with writing(self._path):
                self._file.close()
                self._board.close()
            self._files.close()

    def _add(self, step: int, **content) -> None:
        with writing(self._path.with_name("tensorboard")):
            self._board.write_event(Event(wall_time=time.time(), step=step, **content))
            self._board.flush()


def read_evaluations(workdir: Path, step: int) -> dict[int, dict]:
    """Return the metrics of the evaluations of a run up to a step, by step and in their order."""
    rows = [json.loads(line) for line in _read_lines(workdir) if _place_of(line) <= (step, True)]
    return {row["step"]: row for row in rows if "segm_AP" in row}


def _read_lines(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return read_bytes(path).decode().splitlines() if path.exists() else []


def _place_of(line: str) -> tuple[float, bool]:
    """Return the step of a line, and whether it is of an evaluation, which follows the step."""
    try:
        values = json.loads(line)
        return values["step"], _is_evaluation(values)
    except (json.JSONDecodeError, KeyError):
        return float("inf"), True  # cut off when the run was killed


def _is_whole(place: tuple[float, bool]) -> bool:
    return place[0] < float("inf")


def _is_evaluation(values: Mapping[str, float]) -> bool:
    """Return whether numbers are of an evaluation; those of training steps have a loss, unless all were skipped."""
    return "loss" not in values and "skipped" not in values
