import contextlib
import copy
import json
import logging
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import maskrcnn_jax as mr
from maskrcnn_jax.config import to_options
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.run_folder import load_run
from maskrcnn_jax.training import loop
from maskrcnn_jax.training.checkpoint import Checkpoints
from maskrcnn_jax.training.log import StepLog
from maskrcnn_jax.training.loop import shard_batch
from maskrcnn_jax.training.step import TrainStep
from tests.checking.dataset_faults import FAULTS, READ_ANYWAY, damage, file_listed_twice


class FakeEvaluation(NamedTuple):
    metrics: dict
    picture: np.ndarray = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture
def config(config):
    config.optim.lr, config.optim.lr_batch_size = 0.001, 16
    return config


_PROGRAMS = {}  # of each config, what its runs have compiled
_NOT_COMPILED = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "patience")


def train(config, workdir, *, anew=False, **options):
    """Train with the programs of earlier runs of this config, as most of the time is compiling, or compile anew.

    Returns the programs.
    """
    key = json.dumps({name: value for name, value in config.to_dict().items() if name not in _NOT_COMPILED})
    programs = {} if anew else _PROGRAMS.setdefault(key, {})

    def make_step(*args):
        step = TrainStep(*args)
        step.programs = programs
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "TrainStep", make_step)
        loop.train(to_options(config), workdir, **options)
    _PROGRAMS[key] = programs
    return programs


def never(categories):
    def evaluate(model):
        raise AssertionError("no evaluation was asked for")

    return evaluate


def scores(*values):
    """Make an evaluation that returns these mask APs one after the other."""
    remaining = list(values)
    return lambda categories: lambda model: FakeEvaluation({"bbox_AP": 0.5, "segm_AP": remaining.pop(0)})


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def arrays(workdir):
    model, _, _ = load_run(workdir)
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.slow
def test_a_run_with_a_backbone_of_ones_own_is_loaded_and_exported_by_its_config(config, tmp_path, monkeypatch):
    (tmp_path / "networks_of_ones_own.py").write_text(
        "from tests.models.test_backbone import Strided\n\n\n"
        "def strided(options, *, dtype, rngs):\n    return Strided(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config.model.backbone, config.model.anchor_sizes = "networks_of_ones_own:strided", (16, 32)
    config.max_steps, config.eval_every = 1, 0
    loop.train(to_options(config), tmp_path / "run", make_evaluate=never)
    predictor = mr.load(tmp_path / "run")
    assert type(predictor.network.backbone).__name__ == "Strided"
    mr.export_model(predictor, tmp_path / "model.mrcnn", sizes=[(64, 64)])
    assert (tmp_path / "model.mrcnn").stat().st_size > 0


def test_a_run_leaves_its_config_categories_metrics_and_checkpoint(config, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "maskrcnn_jax.training"):
        programs = train(config, tmp_path, anew=True, make_evaluate=scores(0.1, 0.2))
    assert len(programs) == 1, "the step is compiled once"
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("maskrcnn_jax")]
    started, compiled, expected = messages[-3:]
    assert re.match(r"starting at step 0 of 4, 2 steps an epoch, batch 8 on 8 cpu devices, 0.\d M parameters", started)
    assert re.fullmatch(r"images of 64x64: a step takes [1-9]\d* MiB of each device, compiled in \d+ s", compiled)
    assert re.fullmatch(r"expected time: 0:0\d:\d\d for the other 2 steps, without evaluations", expected)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model"]["stem_channels"] == 8
    assert written["optim"]["lr"] == 0.0005, "not that of this batch size"
    assert (tmp_path / "categories.json").exists()
    assert list((tmp_path / "tensorboard").iterdir())
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4]
    assert logged[0]["lr"] <= 0.0005
    terms = ["loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"]
    for line in logged:
        assert all(np.isfinite(line[term]) for term in terms)
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
    assert [line["segm_AP"] for line in lines(tmp_path) if "segm_AP" in line] == [0.1, 0.2]


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_a_stopped_run_goes_on_with_the_same_bits(config, tmp_path, mixed, caplog):
    caplog.set_level(logging.INFO, "maskrcnn_jax.training")
    config.eval_every = 1
    if mixed:
        config.epochs, config.eval_every, config.batch_size, config.model.dtype = 4, 2, 16, "float16"
        config.optim.update(ema_decay=0.9, accumulate=2, loss_scale=2.0**18)
        config.optim.update(backbone_lr_factor=0.5, schedule="multistep", milestones=(3,))
    train(config, tmp_path / "whole", make_evaluate=scores(0.1, 0.2))

    def stopping(categories):
        def evaluate(model):
            signal.raise_signal(signal.SIGTERM)
            return FakeEvaluation({"bbox_AP": 0.5, "segm_AP": 0.1})

        return evaluate

    with pytest.raises(SystemExit) as stopped:
        train(config, tmp_path / "parts", make_evaluate=stopping)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert lines(tmp_path / "parts")[-1]["step"] == 2
    train(config, tmp_path / "parts", make_evaluate=scores(0.2))

    for whole, parts in zip(arrays(tmp_path / "whole"), arrays(tmp_path / "parts"), strict=True):
        np.testing.assert_array_equal(whole, parts)
    timeless = [
        [
            {k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")}
            for line in lines(tmp_path / run)
        ]
        for run in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]
    assert ("batch 16 in 2 accumulation steps of 8 on 8 cpu devices" in caplog.text) == mixed
    if mixed:
        skipped = [line["skipped"] for line in timeless[0] if "skipped" in line]
        assert skipped[0] > 0, "the scale is too small to tell anything"
        assert skipped[1] < 1, "no step was taken"


@pytest.mark.slow
def test_a_signal_at_any_moment_is_followed_by_a_checkpoint_and_costs_no_evaluation(config, tmp_path, monkeypatch):
    config.log_every, config.eval_every = 1, 1
    train(config, tmp_path / "whole", make_evaluate=scores(0.2, 0.1))

    def stop_at(patch, owner, name, call):
        """Send the signal at the end of such a call of a method."""
        real, calls = getattr(owner, name), []

        def method(*args):
            result = real(*args)
            calls.append(name)
            if len(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return result

        patch.setattr(owner, name, method)

    # Steps 2 and 4 are evaluated. What is logged after a step is waited for when it is decided whether to save.
    moments = [(StepLog, "write", 1, 2), (StepLog, "add", 2, 2), (StepLog, "add", 4, 4), (Checkpoints, "wait", 3, 4)]
    for i, (owner, name, call, stopped_at) in enumerate(moments):
        run = tmp_path / str(i)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, owner, name, call)
            train(config, run, make_evaluate=scores(0.2, 0.1))
        with contextlib.closing(Checkpoints(run)) as checkpoints:
            assert checkpoints.latest_step == stopped_at, (name, call)
        done = [line["segm_AP"] for line in lines(run) if "segm_AP" in line]
        train(config, run, make_evaluate=scores(*[0.2, 0.1][len(done) :]))
        whole, parts = [
            [(line["step"], line.get("loss"), line.get("segm_AP")) for line in lines(folder)]
            for folder in (tmp_path / "whole", run)
        ]
        assert parts == whole, (name, call)
        with contextlib.closing(Checkpoints(run)) as checkpoints:
            assert checkpoints.best_step == 2
        for ours, expected in zip(arrays(run), arrays(tmp_path / "whole"), strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
def test_models_are_evaluated_and_restored_with_their_averaged_parameters(config, tmp_path, monkeypatch):
    config.epochs, config.optim.ema_decay = 1, 0.9
    saved, evaluated = [], []

    def leaves(tree):
        return jax.tree.map(np.array, jax.tree.leaves(nnx.to_pure_dict(tree)))

    def save(self, state):
        saved.extend([leaves(state.params), leaves(nnx.merge_state(state.averaged, state.variables))])
        real(self, state)

    def evaluate(model):
        evaluated.append(leaves(nnx.state(model)))
        return FakeEvaluation({"bbox_AP": 0.5, "segm_AP": 0.1})

    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", save)
    train(config, tmp_path, make_evaluate=lambda categories: evaluate)
    params, expected = saved
    for ours, restored, average in zip(evaluated[0], arrays(tmp_path), expected, strict=True):
        np.testing.assert_array_equal(ours, average)
        np.testing.assert_array_equal(restored, average)
    assert not any(np.array_equal(params[0], average) for average in expected)

    config.epochs, config.optim.ema_decay = 2, 0.0
    with pytest.raises(UserError, match="or optimizer .*params/.* is not in this model"):
        train(config, tmp_path, make_evaluate=never)


@pytest.mark.slow
def test_the_best_checkpoint_outlives_newer_ones(config, tmp_path):
    config.keep_checkpoints = config.checkpoint_every = 1
    train(config, tmp_path, make_evaluate=scores(0.9, 0.3))
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.steps == [2, 4]
    assert (checkpoints.best_step, checkpoints.latest_step) == (2, 4)
    checkpoints.close()
    load_run(tmp_path, checkpoint="best")
    with pytest.raises(UserError, match=r"no checkpoint '3'; there are: \[2, 4\]"):
        load_run(tmp_path, checkpoint="3")


@pytest.mark.slow
def test_a_run_stops_early_at_the_same_step_however_often_it_is_interrupted(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "maskrcnn_jax.training")
    config.epochs, config.patience, config.keep_checkpoints = 6, 2, 1
    measured = [0.1, 0.3, 0.2, 0.3]  # after steps 2, 4, 6 and 8
    train(config, tmp_path / "whole", make_evaluate=scores(*measured))
    told = "segm_AP has not been better than 0.300 since step 4 (patience 2)"
    assert f"stopped early at step 8: {told}" in caplog.text

    run = tmp_path / "interrupted"
    for made_up_for in [[], [0.1], [0.3], [0.2]]:  # each start is killed in its next evaluation
        with pytest.raises(IndexError):
            train(config, run, make_evaluate=scores(*made_up_for))
    train(config, run, make_evaluate=scores(measured[-1]))
    whole, parts = (
        [(line["step"], line.get("loss"), line.get("segm_AP")) for line in lines(folder)]
        for folder in (tmp_path / "whole", run)
    )
    assert whole == parts
    for whole, parts in zip(arrays(tmp_path / "whole"), arrays(run), strict=True):
        np.testing.assert_array_equal(whole, parts)

    before = contents(run)
    train(config, run, make_evaluate=never)
    assert contents(run) == before
    assert f"nothing to do: {run} was stopped early at step 8: {told}" in caplog.text
    config.patience = 3
    train(config, run, make_evaluate=scores(0.1))
    assert lines(run)[-1]["step"] == 10


def test_batches_are_placed_while_a_step_runs(config, tmp_path, monkeypatch):
    results, running = [], []
    take = TrainStep.__call__

    def take_and_remember(*args):
        results.append(take(*args))
        return results[-1]

    def place(batch, mesh):
        running.append(bool(results) and not results[-1][1]["loss"].is_ready())
        return shard_batch(batch, mesh)

    monkeypatch.setattr(TrainStep, "__call__", take_and_remember)
    monkeypatch.setattr("maskrcnn_jax.training.loop.shard_batch", place)
    train(config, tmp_path, make_evaluate=scores(0.1, 0.2))
    assert any(running), "each batch waited for the end of the step before"


def test_the_wait_for_data_is_the_time_in_which_the_devices_have_nothing_to_do(monkeypatch):
    written = []

    class Writer:
        def scalars(self, step, values):
            written.append(values["data_wait"])

    now, ready = 0.0, 0.0
    monkeypatch.setattr("maskrcnn_jax.training.log.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("maskrcnn_jax.training.log._when_ready", lambda metrics: metrics["ready"])
    with ThreadPoolExecutor(1) as watcher:
        log = StepLog(Writer(), None, lambda _: 0, updates=0, batch_size=1, steps_per_epoch=1, watcher=watcher)
        for seconds_of_batch, seconds_of_step in [(0.1, 0.4), (0.1, 0.4), (0.6, 0.1), (0, 0)]:
            wanted, now = now, now + seconds_of_batch
            before, ready = ready, max(now, ready) + seconds_of_step
            log.add(1, {"loss": 1.0, "gradient_norm": 1.0, "ready": ready}, np.zeros(1), wanted, now)
            now = max(now, before)  # at most two steps are queued
        now = 2.0
        log.write()
    # The second batch comes while the first step runs, the third 0.2 s after the end of the second.
    np.testing.assert_allclose(written, [(0.1 + 0.2) / 2.0])


def test_the_logged_learning_rate_is_that_of_the_last_step_that_was_taken():
    written = []

    class Writer:
        def scalars(self, step, values):
            written.append((step, values["lr"]))

    names = ("loss", "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    with ThreadPoolExecutor(1) as watcher:
        # Resumed at step 10, of which 3 were skipped.
        schedule = {"updates": 7, "batch_size": 1, "steps_per_epoch": 1}
        log = StepLog(Writer(), None, lambda updates: 100 + updates, **schedule, watcher=watcher)
        for step, skipped in enumerate([0, 1, 1, 0, 1], start=11):
            row = dict.fromkeys(names, 1.0) | {"gradient_norm": np.inf if skipped else 1.0, "loss_scale": 2.0}
            log.add(step, row | {"skipped": float(skipped)}, np.zeros(1, int), 0, 0)
            if step != 14:
                log.write()
    assert written == [(11, 107), (12, 107), (13, 107), (15, 108)]


def test_a_loss_that_is_not_finite_stops_with_its_terms_step_and_images(config, tmp_path):
    def break_masks(model):
        model.mask_head.logits_bias[...] *= np.nan

    with pytest.raises(UserError, match=r"step 1 is not finite: .*loss_mask nan.*image ids \[\d+"):
        train(config, tmp_path, make_evaluate=never, initialize=break_masks)
    assert Checkpoints(tmp_path).latest_step is None


@pytest.mark.slow
def test_float16_goes_on_from_skipped_steps_until_the_loss_scale_is_at_its_smallest(config, tmp_path, monkeypatch):
    real = MaskRCNN.losses

    def broken(self, batch, key):
        terms, metrics = real(self, batch, key)
        return terms | {"loss_mask": terms["loss_mask"] * np.inf}, metrics

    config.model.dtype = "float16"
    config.optim.loss_scale = 4.0
    config.eval_every = 0
    monkeypatch.setattr(MaskRCNN, "losses", broken)
    with pytest.raises(UserError, match=r"step 3 is not finite: .*loss_scale 1;"):
        train(config, tmp_path, anew=True, make_evaluate=lambda categories: None)
    (line,) = lines(tmp_path)
    assert (line["step"], line["skipped"], line["loss_scale"]) == (2, 1, 3)
    assert "loss" not in line


def test_a_batch_that_the_devices_cannot_share_is_refused(config, tmp_path):
    config.batch_size = 6
    with pytest.raises(UserError, match="batch_size 6 is not divisible by 8 devices; use 8"):
        train(config, tmp_path, make_evaluate=never)
    config.batch_size = 12
    with pytest.raises(UserError, match="use 8 or 16"):
        train(config, tmp_path, make_evaluate=never)
    config.batch_size, config.optim.accumulate = 40, 2
    with pytest.raises(UserError, match=r"8 devices times 2 accumulation steps \(optim.accumulate\); use 32 or 48"):
        train(config, tmp_path, make_evaluate=never)
    config.optim.accumulate = 0
    with pytest.raises(UserError, match="optim.accumulate is 0"):
        train(config, tmp_path, make_evaluate=never)


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


CHANGES = {
    "batch_size 8 (16 before)": {"batch_size": 8},  # twice as many steps in as many epochs
    "eval_every 1 (0 before)": {"eval_every": 1},
    "model.box_score_thresh 0.9 (0.05 before)": {"model.box_score_thresh": 0.9},
    "optim.lr 0.1 (0.001 before)": {"optim.lr": 0.1},
    "epochs 1 (2 before)": {"epochs": 1},
    "seed 7 (0 before), max_steps 1 (0 before)": {"max_steps": 1, "seed": 7},
}


def test_a_finished_run_ignores_other_options_and_says_which(config, tmp_path, caplog):
    config.batch_size, config.eval_every, config.optim.lr_batch_size = 16, 0, 0
    train(config, tmp_path, make_evaluate=never)
    before = contents(tmp_path)
    for told, changes in CHANGES.items():
        caplog.clear()
        changed = copy.deepcopy(config)
        changed.update_from_flattened_dict(changes)
        train(changed, tmp_path, make_evaluate=never)
        assert contents(tmp_path) == before, told
        ignored = [message for record in caplog.records if "is finished" in (message := record.getMessage())]
        assert [f"options are ignored: {told};" in message for message in ignored] == [True], (told, caplog.text)
    caplog.clear()
    train(config, tmp_path, make_evaluate=never)
    assert "is finished" not in caplog.text
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_resumed_run_that_fails_before_a_checkpoint_keeps_the_options_of_its_checkpoints(
    config, tmp_path, monkeypatch
):
    config.batch_size, config.eval_every, config.optim.lr_batch_size = 16, 0, 0
    train(config, tmp_path, make_evaluate=never)
    before = (tmp_path / "config.json").read_bytes()
    config.epochs, config.model.box_score_thresh = 3, 0.9

    def fail(*args):
        raise UserError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory"):
        patch.setattr(TrainStep, "__call__", fail)
        train(config, tmp_path, make_evaluate=never)
    assert (tmp_path / "config.json").read_bytes() == before
    train(config, tmp_path, make_evaluate=never)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["box_score_thresh"] == 0.9


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture_is_refused(config, tmp_path):
    config.eval_every = 0
    train(config, tmp_path, make_evaluate=lambda categories: None)
    config.epochs = 3
    config.model.stem_channels = 16
    with pytest.raises(UserError, match="of another architecture"):
        train(config, tmp_path, make_evaluate=lambda categories: None)


def test_a_dataset_with_other_categories_is_refused(config, tmp_path):
    config.eval_every = 0
    train(config, tmp_path, make_evaluate=lambda categories: None)
    path = tmp_path / "categories.json"
    path.write_text(path.read_text().replace("circle", "wheel"))
    config.epochs = 3
    with pytest.raises(UserError, match="was trained on other categories"):
        train(config, tmp_path, make_evaluate=lambda categories: None)


def test_an_evaluation_that_fails_loses_no_step(config, tmp_path):
    def failing(model):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        train(config, tmp_path, make_evaluate=lambda categories: failing)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest_step == len((tmp_path / "metrics.jsonl").read_text().splitlines()) * config.log_every


@pytest.mark.slow
def test_annotations_of_which_some_are_wrong_are_trained_on_and_told_of(config, tmp_path, caplog):
    root = shutil.copytree(config.data.coco_dir, tmp_path / "damaged")
    for seed, fault in enumerate(READ_ANYWAY, start=1):  # these seeds pick different annotations
        damage(root, fault, seed)
    config.data.coco_dir = str(root)
    config.eval_every = 0
    train(config, tmp_path / "run", make_evaluate=lambda categories: None)
    for line in lines(tmp_path / "run"):
        assert all(np.isfinite(value) for value in line.values())
    told = "\n".join(record.getMessage() for record in caplog.records)
    for kind in {FAULTS[fault] for fault in READ_ANYWAY}:
        # The reader names what it drops or repairs; of the others a line gives the sentence.
        assert kind in told or any(kind.tell(count) in told for count in range(1, 9)), kind


def test_a_file_listed_twice_stops_before_anything_is_written(config, tmp_path):
    root = shutil.copytree(config.data.coco_dir, tmp_path / "damaged")
    damage(root, file_listed_twice)
    config.data.coco_dir = str(root)
    with pytest.raises(UserError) as raised:
        train(config, tmp_path / "run", make_evaluate=lambda categories: None)
    assert str(raised.value) == Kind.SAME_FILE.tell(1)
    assert not (tmp_path / "run").exists()
