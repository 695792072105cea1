"""Experiment trackers, Weights & Biases and MLflow: the run, its options, numbers and pictures.

Both packages are optional. Where a run goes, and under which account, they learn from their own environment variables.
"""

import dataclasses
import importlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn_jax.errors import UserError, one_line
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import read_bytes
from maskrcnn_jax.run_folder import flatten
from maskrcnn_jax.writing import replace_file

_log = logging.getLogger(__name__)


class Tracker:
    """The run in the tracker that ``options.tracker`` names; in none, everything does nothing.

    A tracker that fails later on, as when the network does, is left with a warning: training goes on.
    """

    def __init__(self, options: Options, workdir: Path, folder: Path, *, resumes: bool):
        """Start a run, or continue that of ``tracker.json`` in the workdir.

        Args:
            options: Of the run.
            workdir: Of the run.
            folder: On a disk, for files that wait until they are uploaded.
            resumes: Continue, if that file exists. A training that begins again would mix its numbers with others.

        Raises:
            UserError: if the package is not installed, or it cannot start the run.
        """
        kind, self._run = options.tracker, None
        if kind == "none":
            return
        path = workdir / "tracker.json"
        resumes = resumes and path.is_file()
        try:
            library = importlib.import_module(kind)
        except ImportError as error:
            raise UserError(
                f'tracker is {kind}, which cannot be imported ({error}); run pip install ".[{kind}]" in the clone, or '
                "use tracker none"
            ) from None
        try:
            ids = json.loads(read_bytes(path)) if resumes else {}
            run = _RUNS[kind](library, workdir.name, ids.get(kind), dataclasses.asdict(options), folder)
        except Exception as error:  # libraries and servers raise many types
            another = f", delete {path} to start another run there" if resumes else ""
            raise UserError(
                f"{kind} cannot start ({one_line(error)}); correct this{another}, or use tracker none"
            ) from None
        replace_file(path, json.dumps(ids | {kind: run.id}))
        self._kind, self._run = kind, run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        self._try("scalars", step, values)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Log an RGB image [h, w, 3] uint8."""
        self._try("picture", step, name, image)

    def close(self, *, failed: bool) -> None:
        """Upload what is left, and say whether the training has failed."""
        self._try("close", failed)

    def _try(self, method: str, *args) -> None:
        try:
            if self._run is not None:
                getattr(self._run, method)(*args)
        except Exception as error:
            self._run = None
            _log.warning("%s failed (%s); training goes on without it", self._kind, one_line(error))


class _WandbRun:
    """A run in Weights & Biases."""

    def __init__(self, wandb: Any, name: str, run_id: str | None, config: dict, folder: Path):
        project = os.environ.get("WANDB_PROJECT", "maskrcnn-jax")
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            config=config,
            allow_val_change=True,
            dir=str(folder),
        )
        self.id = self._run.id
        # Not W&B's own step: a resumed run could not log the evaluation of its last one.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step, values):
        self._run.log({"step": step, **values})

    def picture(self, step, name, image):
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def close(self, failed):
        self._run.finish(exit_code=int(failed))


class _MlflowRun:
    """A run in MLflow."""

    def __init__(self, mlflow: Any, name: str, run_id: str | None, config: dict, folder: Path):
        self._mlflow = mlflow
        self.id = mlflow.start_run(run_id=run_id, run_name=None if run_id else name).info.run_id
        if run_id is None:  # parameters cannot be changed later
            mlflow.log_params(flatten(config))
        mlflow.log_dict(config, "config.json")

    def scalars(self, step, values):
        self._mlflow.log_metrics(dict(values), step=step)

    def picture(self, step, name, image):
        self._mlflow.log_image(image, key=name, step=step)

    def close(self, failed):
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


_RUNS: dict[str, Any] = {"wandb": _WandbRun, "mlflow": _MlflowRun}
