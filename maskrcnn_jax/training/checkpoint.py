"""Checkpoints of a run: written whole or not at all, the newest ones and the best kept, and read back strictly.

A run's folder (``workdir``) also holds what a checkpoint needs to be understood: ``config.json`` and
``categories.json``.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.distributed import gather, is_first
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN, make_unfilled
from maskrcnn_jax.training.step import TrainState
from maskrcnn_jax.writing import replace_file, writing

_log = logging.getLogger(__name__)

BEST_METRIC = "segm_AP"
# By default every device that holds a copy writes a slice of it, and a program is compiled for every slice.
_ONE_WRITER = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
)


def _metric(metrics: dict) -> float:
    return metrics[BEST_METRIC]


def _best_metric(metrics: dict) -> float:
    """Return the mask AP, or the box AP where no object has a mask, and COCO's mask AP is -1."""
    return metrics[BEST_METRIC] if metrics[BEST_METRIC] >= 0 else metrics.get("bbox_AP", metrics[BEST_METRIC])


class UnreadableCheckpoint(UserError):
    """Files of a checkpoint are missing or were cut off."""


class Checkpoints:
    """The checkpoints in ``<workdir>/checkpoints``, named by step."""

    def __init__(self, workdir: str | Path, *, keep: int = 2, read_only: bool = False):
        """Open the folder.

        Args:
          workdir: of the run.
          keep: how many of the newest are kept, beside the best by mask AP.
          read_only: change nothing, while another process may be training. Otherwise the folder is created if need be,
            and what a training left unfinished is deleted.

        Raises:
          UserError: when the folder cannot be made, another process writes into it, or an evaluation in it cannot be
            read.
        """
        folder = Path(workdir).absolute() / "checkpoints"
        if is_first() and not read_only:
            _lock(folder.parent)
        _check_metrics(folder)
        policy = AnyPreservationPolicy(
            [LatestN(keep), BestN(get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False)]
        )
        with writing(folder):
            self._manager = ocp.CheckpointManager(
                epath.Path(folder),
                # Named here, because a manager that has not saved yet cannot tell how its items were written.
                item_handlers={
                    name: ocp.PyTreeCheckpointHandler(type_handler_registry=_ONE_WRITER)
                    for name in ("model", "training")
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    best_fn=_metric,
                    # Not Orbax's own read_only, which warns of each option that it sets.
                    cleanup_tmp_directories=not read_only,
                    create=not read_only,
                    # Threads that wait for folders would keep a process for twenty minutes whose disk refuses them.
                    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
                ),
            )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None when there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint by mask AP, the newest when none was evaluated."""
        return self._manager.best_step() or self.latest_step

    def save(self, state: TrainState) -> None:
        """Write a checkpoint in the background; the state may be given up as soon as this returns.

        Raises:
          UserError: when the disk refuses this checkpoint, or did so with the one before.
        """
        with writing(self._manager.directory):
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree) for name, tree in _items(state).items()}),
                force=True,
            )

    def wait(self) -> None:
        """Wait until what is being saved is written; errors as in :meth:`save`."""
        with writing(self._manager.directory):
            self._manager.wait_until_finished()

    def add_metrics(self, step: int, metrics: dict) -> None:
        """Keep the metrics of the evaluation of a checkpoint, by which the best is chosen; errors as in :meth:`save`.

        Apart from :meth:`save`, so that an evaluation that is killed costs no training.
        """
        self.wait()
        if is_first():
            path = self._metrics_path(step)
            with writing(path):
                path.parent.mkdir(exist_ok=True)
            replace_file(path, json.dumps({BEST_METRIC: _best_metric(metrics)}))
        gather(None)  # written, for all processes
        self._manager.reload()

    def is_evaluated(self, step: int) -> bool:
        """Return whether a checkpoint has the metrics of its evaluation."""
        return self._metrics_path(step).is_file()

    def _metrics_path(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step) / "metrics" / "metrics"  # where Orbax looks for them

    def restore_newest(self, like: TrainState) -> TrainState | None:
        """Read the newest checkpoint that can be read; newer ones are put aside, with a warning.

        Args:
          like: as for :meth:`restore`.

        Returns:
          The state, or nothing when there is no checkpoint.

        Raises:
          UserError: when there are some and none of them can be read, or as :meth:`restore` does.
        """
        unreadable: list[tuple[int, str]] = []
        for step in reversed(self.steps):
            state, problem = None, None
            try:
                state = self.restore(step, like)
            except UnreadableCheckpoint as error:
                problem = str(error)
            problems = [said for said in gather(problem) if said]
            if not problems:
                self._put_aside(unreadable, step)
                return state
            unreadable.append((step, problems[0]))
        if unreadable:
            raise UserError(
                f"{unreadable[0][1]}, and no other in {self._manager.directory} can; bring back a copy, or use "
                "another --workdir to start anew"
            )
        return None

    def _put_aside(self, unreadable: list[tuple[int, str]], step: int) -> None:
        for newer, problem in unreadable:
            folder = Path(self._manager.directory) / str(newer)
            aside = folder.with_name(f"unreadable_{newer}")
            if is_first():
                with writing(folder):
                    if aside.exists():  # of an earlier time
                        shutil.rmtree(aside)
                    folder.rename(aside)
                _log.warning("%s; going on from step %d, and it is now called %s", problem, step, aside.name)
        if unreadable:
            gather(None)  # renamed, for all processes
            self._manager.reload()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Read a whole checkpoint.

        Args:
          step: which.
          like: state whose structure, shapes and placement on devices the result has.

        Raises:
          UserError: when the checkpoint is of another architecture or optimizer; names what differs.
          UnreadableCheckpoint: when files of it are missing or were cut off.
        """
        items = self._restore(step, _items(like))
        averaged = None if like.averaged is None else items["model"]["params"]
        return TrainState(**(items["model"] | items["training"]), averaged=averaged)

    def restore_model(self, step: int, model: nnx.Module) -> None:
        """Read the arrays of a model, without the optimizer's, into it; errors as in :meth:`restore`."""
        _, params, variables = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
        arrays = self._restore(step, {"model": {"params": params, "variables": variables}})["model"]
        nnx.update(model, arrays["params"], arrays["variables"])

    def close(self) -> None:
        """Wait until everything is written; errors as in :meth:`save`."""
        with writing(self._manager.directory):
            self._manager.close()

    def _restore(self, step: int, like: dict) -> dict:
        folder = self._manager.directory / str(step)
        abstract = {name: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree) for name, tree in like.items()}
        try:
            metadata = self._manager.item_metadata(step)
            for name, tree in like.items():
                if not metadata[name]:
                    raise FileNotFoundError(f"{name} is missing")
                _check_same_arrays(metadata[name], tree, folder)
            return self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{
                        name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
                        for name, tree in abstract.items()
                    }
                ),
            )
        except UserError:
            raise
        except Exception as error:  # of many kinds: whatever the files lack, they are no checkpoint
            said = (str(error).splitlines() or [type(error).__name__])[0][:80]
            raise UnreadableCheckpoint(f"checkpoint {folder} cannot be read ({said}...)") from None


def has_checkpoint(workdir: str | Path) -> bool:
    """Return whether a run has left a checkpoint, without creating anything."""
    folder = Path(workdir) / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _lock(workdir: Path) -> None:
    """Keep other trainings out of a folder until this process ends."""
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = os.open(workdir / ".lock", os.O_CREAT | os.O_WRONLY)
    try:
        # Not flock, whose locks outlive a killed process in the data workers that it has forked.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise UserError(
            f"another training is writing into {workdir}; wait for its end, or use another --workdir"
        ) from None
    except OSError:
        os.close(file)  # not every file system has locks


def _check_metrics(folder: Path) -> None:
    """Raise a UserError for an evaluation that was cut off, without which no best checkpoint can be chosen."""
    for path in folder.glob("*/metrics/metrics"):
        try:
            json.loads(path.read_text())
        except ValueError:
            raise UserError(
                f"{path} is no evaluation that can be read; delete the folder {path.parent}, and this checkpoint "
                "counts as one that was not evaluated"
            ) from None


def _items(state: TrainState) -> dict:
    """Split the state into what prediction needs and what only training needs."""
    training = {"step": state.step, "opt_state": state.opt_state}
    if state.loss_scale is not None:
        training["loss_scale"] = state.loss_scale
    if state.averaged is not None:
        training["params"] = state.params
    return {"model": {"params": state.inference_params, "variables": state.variables}, "training": training}


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array by its path."""

    def name(path):
        return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)

    return {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_same_arrays(metadata, like, path) -> None:
    """Raise a UserError unless both trees hold the same names and shapes."""
    saved, wanted = _shapes(metadata), _shapes(like)
    differences = [f"{name} is missing" for name in wanted if name not in saved]
    differences += [f"{name} is not in this model" for name in saved if name not in wanted]
    differences += [
        f"{name} has shape {saved[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ]
    if differences:
        shown = "; ".join(differences[:3])
        raise UserError(
            f"checkpoint {path} is of another architecture or optimizer ({len(differences)} arrays differ: {shown}); "
            "use the config that it was trained with, or another --workdir"
        )


def restore_model(workdir: str | Path, options: Mapping, *, which: str = "latest") -> tuple[MaskRCNN, Categories]:
    """Load a trained model.

    Args:
      workdir: folder of the run.
      options: the ``model`` part of the run's config.
      which: "latest", "best" (by mask AP) or a step.

    Returns:
      The model in evaluation mode and the categories it was trained on.

    Raises:
      UserError: when there is no such checkpoint, or it is of another architecture.
    """
    workdir = Path(workdir)
    categories = Categories.load(workdir / "categories.json")
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if which in ("latest", "best"):
            step = checkpoints.latest_step if which == "latest" else checkpoints.best_step
        else:
            step = int(which) if which.isdigit() and int(which) in checkpoints.steps else None
        if step is None:
            raise UserError(
                f"{workdir} has no checkpoint {which!r}; there are: {checkpoints.steps or 'none'}. Train longer or "
                "choose one of these with --checkpoint"
            )
        model = make_unfilled(categories.num_classes, **options)
        checkpoints.restore_model(step, model)
    finally:
        checkpoints.close()
    model.eval()
    return model, categories


def load_config(workdir: str | Path, defaults: ConfigDict) -> ConfigDict:
    """Read the config of a run.

    Args:
      workdir: folder that train.py wrote.
      defaults: values of the options that there were none of when the run was made.

    Raises:
      UserError: when the folder holds none.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no trained model ({path} is missing); give the --workdir of train.py")
    config = defaults.unlock()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _check_types(found, config)
        with config.ignore_type():  # JSON has lists for tuples
            config.update(found)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no config that train.py wrote ({reason}); give it with --config") from None
    return config


def _check_types(found: object, known: ConfigDict) -> None:
    """Raise a ValueError unless the options in a file have values like those that are known."""
    if not isinstance(found, dict):
        raise ValueError("it holds something other than options by name")
    for name, value in found.items():
        default = known.get(name)
        if isinstance(default, ConfigDict):
            _check_types(value, default)
        elif default is not None and not _is_like(value, default):
            raise ValueError(f"{name} is not of the type {type(default).__name__}")


def _is_like(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list) and all(type(item) in (int, float) for item in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


def changed_settings(config: ConfigDict, workdir: str | Path) -> list[str]:
    """Return the fields in which a config differs from that of a run's folder, each as "batch_size 16 (8 before)"."""
    try:
        before = _flatten(json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return []
    now = _flatten(json.loads(config.to_json_best_effort()))
    return [f"{name} {now[name]} ({before[name]} before)" for name in now if before.get(name, now[name]) != now[name]]


def _flatten(options: object, prefix: str = "") -> dict:
    """Return nested options by names such as "optim.lr"."""
    if not isinstance(options, dict):
        return {prefix.removesuffix("."): options}
    return {k: v for name, inner in options.items() for k, v in _flatten(inner, f"{prefix}{name}.").items()}


def save_config(config: ConfigDict, workdir: str | Path) -> None:
    """Write the resolved config of a run."""
    replace_file(Path(workdir) / "config.json", config.to_json_best_effort(indent=2) + "\n")
