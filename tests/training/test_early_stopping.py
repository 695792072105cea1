"""When training stops early: by the lines of metrics.jsonl, by hand."""

import json

import pytest

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import Options
from maskrcnn_jax.training import loop
from maskrcnn_jax.training.early_stopping import reason_to_stop


@pytest.fixture
def stops(tmp_path):
    def stops(rows, **options):
        """Return the first step, of evaluations every ten steps, after which training stops; None if it never does."""
        lines = []
        for step, (mask_ap, box_ap) in enumerate(rows, start=1):
            lines += [{"step": 10 * step, "loss": 1.0}, {"step": 10 * step, "segm_AP": mask_ap, "bbox_AP": box_ap}]
        content = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 999, "segm_'
        (tmp_path / "metrics.jsonl").write_text(content)
        after = (step for step in range(0, 10 * len(rows) + 1) if reason_to_stop(Options(**options), tmp_path, step))
        return next(after, None)

    return stops


MASKS = [(0.1, 0.5), (0.3, 0.6), (0.2, 0.7), (0.3, 0.6), (0.25, 0.6), (0.4, 0.6)]


@pytest.mark.parametrize(
    ("patience", "metric", "step"),
    [
        (0, "segm_AP", None),
        (1, "segm_AP", 30),
        (2, "segm_AP", 40),  # an equal value is no improvement
        (3, "segm_AP", 50),
        (4, "segm_AP", None),
        (2, "bbox_AP", 50),
    ],
)
def test_training_stops_after_so_many_evaluations_without_a_better_one(stops, patience, metric, step):
    assert stops(MASKS, patience=patience, best_metric=metric) == step


def test_without_masks_boxes_decide(stops):
    assert stops([(-1.0, box_ap) for _, box_ap in MASKS], patience=2) == 50


def test_the_reason_names_the_best_evaluation(stops, tmp_path):
    stops(MASKS, patience=2)
    told = "segm_AP has not been better than 0.300 since step 20 (patience 2)"
    assert reason_to_stop(Options(patience=2), tmp_path, 40) == told


@pytest.mark.parametrize(("num_steps", "early"), [(50, True), (40, False)])
def test_a_run_that_has_taken_all_of_its_steps_was_not_stopped_early(stops, tmp_path, num_steps, early):
    stops(MASKS)
    run = dict.fromkeys(loop._Run._fields) | {"options": Options(patience=2), "workdir": tmp_path}
    assert bool(loop._Run(**run | {"steps_per_epoch": 10, "num_steps": num_steps}).reason_to_stop(40)) == early


def test_nothing_stops_before_the_first_evaluation(tmp_path):
    assert not reason_to_stop(Options(patience=1), tmp_path, 5)


def test_patience_without_evaluations_is_refused():
    with pytest.raises(UserError, match="patience is 3 with eval_every 0"):
        Options(patience=3, eval_every=0)
