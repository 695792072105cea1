"""Early stopping: training ends when its evaluations have not become better for some time."""

from pathlib import Path

from maskrcnn_jax.distributed import gather, is_first
from maskrcnn_jax.options import Options
from maskrcnn_jax.run_folder import value_of_best
from maskrcnn_jax.training.metrics import read_evaluations


def reason_to_stop(options: Options, workdir: Path, step: int) -> str:
    """Return why a run ends early after a step, as a phrase; an empty string if it goes on.

    Only ``metrics.jsonl`` decides, because checkpoints are deleted. So a resumed run stops where an uninterrupted one
    does. All processes call this together.

    Args:
        options: ``patience`` and ``best_metric`` are used.
        workdir: Of the run.
        step: The last step, whose evaluation has been written if there is one.
    """
    if not options.patience:
        return ""
    return gather(_reason(options, workdir, step) if is_first() else "")[0]


def _reason(options: Options, workdir: Path, step: int) -> str:
    evaluations = read_evaluations(workdir, step)
    values = {at: value_of_best(metrics, options.best_metric) for at, metrics in evaluations.items()}
    best = max(values, key=values.__getitem__, default=0)  # the first of equal ones
    without = sum(at > best for at in values)
    if without < options.patience:
        return ""
    return (
        f"{options.best_metric} has not been better than {values[best]:.3f} since step {best} (patience "
        f"{options.patience})"
    )
