"""The folder of a run (its workdir): options, categories, lock, and the model in its checkpoints.

A run leaves ``config.json``, ``categories.json``, ``metrics.jsonl``, ``metrics.json``, ``detections.json``, pictures,
TensorBoard files and ``checkpoints/<step>/``; ``split.json`` too, if it holds out images for evaluation. Training
writes the checkpoints through ``training.checkpoint``; code that only loads a model needs nothing from ``training``.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from maskrcnn_jax.config import to_options
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError, one_line
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.models.unfilled import make_unfilled
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import absolute, as_path, in_bucket, read_bytes
from maskrcnn_jax.writing import replace_file, writing

SPLIT_FILE = "split.json"  # which images data.val_share holds out
# Errors of TensorStore that say nothing about the files.
_PASSING = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED)\b")
# Options by the names that they had in an earlier version, and what they are called now: several, or none at all.
_FORMER: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {"box_iou_thresh": ("box_fg_iou_thresh",)},
    "data": {"mask_side": ()},
    "optim": {"decay_norm_and_bias": ("decay_norms", "decay_biases")},
}
# By default every device that holds a copy writes a slice of it, and a program is compiled for every slice.
_ONE_WRITER = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
)


class UnreadableCheckpoint(UserError):
    """Files of a checkpoint are missing or truncated."""


def save_options(options: Options, workdir: str | os.PathLike) -> None:
    """Write the options of a run into ``config.json``."""
    replace_file(as_path(workdir) / "config.json", json.dumps(dataclasses.asdict(options), indent=2) + "\n")


def load_options(workdir: str | os.PathLike) -> Options:
    """Read the options of a run; options that did not exist when it was trained have their defaults.

    Raises:
        UserError: if the folder has no ``config.json`` that training wrote.
    """
    path = as_path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no trained model ({path} is missing); give the workdir of a training")
    try:
        found = json.loads(read_bytes(path).decode())
        parts = {
            part: {now: value for name, value in found[part].items() for now in former.get(name, (name,))}
            for part, former in _FORMER.items()
        }
        options = to_options(ConfigDict(found | parts))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(f"{path} is not a config that training wrote ({reason})") from None
    recorded = as_path(workdir) / SPLIT_FILE
    if options.data.val_share and recorded.is_file():  # the folder may have been moved
        options = dataclasses.replace(options, data=dataclasses.replace(options.data, split_file=str(recorded)))
    return options


def changed_options(options: Options, workdir: str | os.PathLike) -> list[str]:
    """Return how options differ from those of a run's folder, such as ["batch_size 16 (8 before)"]."""
    try:
        before = flatten(dataclasses.asdict(load_options(workdir)))
    except UserError:
        return []
    now = flatten(dataclasses.asdict(options))
    return [f"{name} {now[name]} ({before[name]} before)" for name in now if before[name] != now[name]]


def flatten(options: dict, prefix: str = "") -> dict:
    """Return nested options by names such as "optim.lr"."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make a folder, and keep other trainings out of it meanwhile; in a bucket there are no locks.

    A folder that is new, and in which nothing is written, is removed at the end.

    Raises:
        UserError: if another training has it, or it cannot be made.
    """
    if in_bucket(workdir):
        yield
        return
    with writing(workdir):
        is_new = not workdir.exists()
        workdir.mkdir(parents=True, exist_ok=True)
        file = os.open(workdir / ".lock", os.O_CREAT | os.O_WRONLY)
    try:
        # lockf, not flock: forked data workers would keep a flock after this process is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise UserError(
            f"another training is writing into {workdir}; wait for it to end, or use another workdir"
        ) from None
    except OSError:
        pass  # not every file system has locks
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if is_new and [path.name for path in workdir.iterdir()] == [".lock"]:
                (workdir / ".lock").unlink()
                workdir.rmdir()
        os.close(file)  # which gives up the lock


def has_checkpoint(workdir: str | os.PathLike) -> bool:
    """Return whether a run has left a checkpoint."""
    folder = as_path(workdir) / "checkpoints"
    # In a bucket, one that is being written has its final name.
    return folder.is_dir() and any(
        path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path) for path in folder.iterdir()
    )


def load_run(workdir: str | os.PathLike, *, checkpoint: str = "latest") -> tuple[MaskRCNN, Categories, Options]:
    """Load the model of a run.

    Args:
        workdir: Folder of the run.
        checkpoint: "latest", "best" (by the option ``best_metric``) or a step.

    Returns:
        The model in evaluation mode, the categories that it was trained on, and the options of the run.

    Raises:
        UserError: if there is no such checkpoint, or it is of another architecture.
    """
    options = load_options(workdir)
    model, categories = load_model(workdir, options, checkpoint=checkpoint)
    return model, categories, options


def load_model(
    workdir: str | os.PathLike, options: Options, *, checkpoint: str = "latest"
) -> tuple[MaskRCNN, Categories]:
    """Load the model of a run with other options than those that it was trained with; otherwise as ``load_run``."""
    categories = Categories.load(as_path(workdir) / "categories.json")
    reader = CheckpointReader(workdir, best_metric=options.best_metric)
    try:
        model = make_unfilled(categories.num_classes, options.model)
        reader.restore_model(reader.find(checkpoint), model)
    finally:
        reader.close()
    model.eval()
    return model, categories


class CheckpointReader:
    """Reads the checkpoints in ``<workdir>/checkpoints``, named by step, and changes nothing."""

    def __init__(
        self, workdir: str | os.PathLike, *, keep: int = 2, best_metric: str = "segm_AP", writes: bool = False
    ):
        """Open the folder.

        Args:
            workdir: Folder of the run.
            keep: How many of the newest a writer keeps, besides the best.
            best_metric: Which metric decides on the best: "segm_AP" or "bbox_AP".
            writes: Create the folder if it does not exist, and delete what an interrupted training left unfinished.

        Raises:
            UserError: if the folder cannot be created, or the metrics of an evaluation in it cannot be read.
        """
        folder = absolute(as_path(workdir)) / "checkpoints"
        _check_metrics(folder)
        metric = functools.partial(value_of_best, metric=best_metric)
        policy = AnyPreservationPolicy(
            [LatestN(keep), BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False)]
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
                    best_fn=metric,
                    # Not Orbax's own read_only, which warns of each option that it sets.
                    cleanup_tmp_directories=writes,
                    create=writes,
                    # If the disk refuses a folder, threads that wait for it keep the process for twenty minutes.
                    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
                ),
            )

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints."""
        return as_path(self._manager.directory)

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint, the newest if none was evaluated."""
        return self._manager.best_step() or self.latest_step

    def find(self, which: str) -> int:
        """Return the step of a checkpoint.

        Args:
            which: "latest", "best" or a step.

        Raises:
            UserError: if there is no such checkpoint.
        """
        if which in ("latest", "best"):
            step = self.latest_step if which == "latest" else self.best_step
        else:
            step = int(which) if which.isdigit() and int(which) in self.steps else None
        if step is None:
            raise UserError(
                f"{self.folder.parent} has no checkpoint {which!r}; there are: {self.steps or 'none'}. Choose one of "
                "these, or train longer"
            )
        return step

    def restore_model(self, step: int, model: nnx.Module) -> None:
        """Read the arrays of a model, without the optimizer's, into it; errors as in :meth:`restore_items`."""
        _, params, variables = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # the stub has one filter
        arrays = self.restore_items(step, {"model": {"params": params, "variables": variables}})["model"]
        nnx.update(model, arrays["params"], arrays["variables"])

    def restore_items(self, step: int, like: dict) -> dict:
        """Read items of a checkpoint.

        Args:
            step: Of the checkpoint.
            like: Trees of arrays by item, whose structure, shapes and placement on devices the result has.

        Raises:
            UnreadableCheckpoint: if files of it are missing or truncated.
            UserError: if the checkpoint is of another architecture or optimizer, with what differs, or cannot be read
                for a reason that may pass, such as too little memory or a lost connection.
        """
        folder = self.folder / str(step)
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
        except Exception as error:  # Orbax raises many types for damaged files
            reason = f"checkpoint {folder} cannot be read ({one_line(error)[:80]}...)"
            if _may_pass(error) or not _is_open(folder):
                raise UserError(
                    f"{reason}; this may pass, so try again; move the folder away to go on from the checkpoint before"
                ) from None
            raise UnreadableCheckpoint(reason) from None

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: if the disk refused it.
        """
        with writing(self.folder):
            self._manager.close()


def _may_pass(error: Exception) -> bool:
    """Return whether an error tells of memory, permissions or the network and not of the files that were read."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if type(error).__module__.startswith(("gcsfs", "google.", "aiohttp")):
        return True
    return isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or _PASSING.search(str(error)) is not None


def _is_open(folder: Path) -> bool:
    """Return whether this user may look into the folder of a checkpoint; Orbax finds nothing in one that is closed."""
    if in_bucket(folder):
        return True
    folders = [folder, *(folder / name for name in ("model", "training"))]
    return all(os.access(path, os.R_OK | os.X_OK) for path in folders if os.path.lexists(path))


def value_of_best(metrics: Mapping[str, float], metric: str) -> float:
    """Return the value by which an evaluation is better than others.

    Args:
        metrics: Of the evaluation.
        metric: "segm_AP" or "bbox_AP", which also takes the place of COCO's mask AP of -1, where no object has a mask.
    """
    box_ap = metrics.get("bbox_AP", metrics["segm_AP"])  # of checkpoints of earlier versions, the value is under this
    return box_ap if metric == "bbox_AP" or metrics["segm_AP"] < 0 else metrics["segm_AP"]


def _check_metrics(folder: Path) -> None:
    """Raise a UserError for truncated metrics, without which no best checkpoint can be chosen."""
    for path in folder.glob("*/metrics/metrics"):
        try:
            json.loads(read_bytes(path))
        except ValueError:
            raise UserError(
                f"{path} does not hold the metrics of an evaluation; delete the folder {path.parent}, and this "
                "checkpoint counts as not evaluated"
            ) from None


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
            "use the options that it was trained with, or another workdir"
        )
