"""Where a run's numbers and pictures go: ``metrics.jsonl`` and TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter


class MetricWriter:
    """Append scalars and pictures of a run.

    A resumed run goes on from its checkpoint, so lines after that step are removed first: every step stands once.
    """

    def __init__(self, workdir: str | Path, *, first_step: int, active: bool = True):
        """Open the files.

        Args:
          workdir: of the run.
          first_step: steps done so far; later ones are forgotten.
          active: False for one that writes nothing, in processes beside the one that does.
        """
        self._active = active
        if not active:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= first_step]
            self._path.write_text("".join(line + "\n" for line in kept))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers under their names."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an RGB image [h, w, 3] uint8."""
        if self._active:
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is still buffered."""
        if self._active:
            self._file.close()
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # cut off when the run was killed
