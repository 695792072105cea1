"""Checkpoints of a training: written whole or not at all, the newest and the best kept, restored strictly."""

import json
import logging
from pathlib import Path

import orbax.checkpoint as ocp
from etils import epath

from maskrcnn_jax.distributed import gather, is_first
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.run_folder import CheckpointReader, UnreadableCheckpoint
from maskrcnn_jax.training.step import TrainState
from maskrcnn_jax.writing import replace_file, writing

_log = logging.getLogger(__name__)


class Checkpoints(CheckpointReader):
    """Writes and restores checkpoints of the training state."""

    def __init__(self, workdir: str | Path, *, keep: int = 2, best_metric: str = "segm_AP"):
        """Open the folder of a run.

        Args:
            workdir: Created if it does not exist. What an interrupted training left unfinished is deleted.
            keep: How many of the newest checkpoints are kept, besides the best.
            best_metric: Which metric decides on the best: "segm_AP" or "bbox_AP".

        Raises:
            UserError: if the folder cannot be created, or metrics in it are truncated.
        """
        super().__init__(workdir, keep=keep, best_metric=best_metric, writes=True)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint in the background; the memory of the state may be reused as soon as this returns.

        Raises:
            UserError: if the disk refuses this checkpoint, or refused the one before.
        """
        with writing(self.folder):
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree) for name, tree in _items(state).items()}),
                force=True,
            )

    def wait(self) -> None:
        """Wait until everything is written; errors as in :meth:`save`."""
        with writing(self.folder):
            self._manager.wait_until_finished()

    def add_metrics(self, step: int, metrics: dict) -> None:
        """Add the metrics of an evaluation to a checkpoint, by which the best is chosen; errors as in :meth:`save`.

        This is apart from :meth:`save`, so that an evaluation that is killed costs no training.
        """
        self.wait()
        if is_first():
            chosen = {name: metrics[name] for name in ("segm_AP", "bbox_AP") if name in metrics}
            replace_file(self._metrics_path(step), json.dumps(chosen))
        gather(None)  # all processes wait for the file
        self._manager.reload()

    def is_evaluated(self, step: int) -> bool:
        """Return whether a checkpoint has the metrics of its evaluation."""
        return self._metrics_path(step).is_file()

    def _metrics_path(self, step: int) -> Path:
        return self.folder / str(step) / "metrics" / "metrics"  # where Orbax looks for them

    def restore_newest(self, like: TrainState) -> TrainState | None:
        """Restore the newest checkpoint that can be read; newer ones are renamed, with a warning.

        Args:
            like: As for :meth:`restore`.

        Returns:
            The state, None if there is no checkpoint.

        Raises:
            UserError: if there are some and none of them can be read, or as :meth:`restore`; in all processes.
        """
        unreadable: list[tuple[int, str]] = []
        for step in reversed(self.steps):
            state, damage, other = None, "", ""
            try:
                state = self.restore(step, like)
            except UnreadableCheckpoint as error:
                damage = str(error)
            except UserError as error:
                other = str(error)
            found = gather([damage, other])
            if problem := next((other for _, other in found if other), ""):
                raise UserError(problem)
            damages = [damage for damage, _ in found if damage]
            if not damages:
                self._set_aside(unreadable, step)
                return state
            unreadable.append((step, damages[0]))
        if unreadable:
            raise UserError(
                f"{unreadable[0][1]}, nor can any other in {self.folder}; restore a copy, or use another workdir to "
                "start anew"
            )
        return None

    def _set_aside(self, unreadable: list[tuple[int, str]], step: int) -> None:
        """Rename checkpoints that cannot be read."""
        for newer, problem in unreadable:
            folder = self.folder / str(newer)
            aside = folder.with_name(f"unreadable_{newer}")
            if is_first():
                with writing(folder):
                    if aside.exists():  # from an earlier time
                        epath.Path(aside).rmtree()
                    folder.rename(aside)
                _log.warning("%s; resuming from step %d, and renaming it to %s", problem, step, aside.name)
        if unreadable:
            gather(None)  # all processes wait until they are renamed
            self._manager.reload()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restore the whole state.

        Args:
            step: Of the checkpoint.
            like: State whose structure, shapes and placement on devices the result has.

        Raises:
            UserError: as :meth:`restore_items`.
        """
        items = self.restore_items(step, _items(like))
        averaged = None if like.averaged is None else items["model"]["params"]
        return TrainState(**(items["model"] | items["training"]), averaged=averaged)


def _items(state: TrainState) -> dict:
    """Split the state into what prediction needs and what only training needs."""
    training = {"step": state.step, "opt_state": state.opt_state}
    if state.loss_scale is not None:
        training["loss_scale"] = state.loss_scale
    if state.averaged is not None:
        training["params"] = state.params
    return {"model": {"params": state.inference_params, "variables": state.variables}, "training": training}
