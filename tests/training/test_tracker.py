"""Weights & Biases and MLflow behind the metric writer: by modules that record calls, and the real ones offline."""

import contextlib
import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import Options
from maskrcnn_jax.training.metrics import MetricWriter

PICTURE = np.zeros((8, 8, 3), np.uint8)


def write(workdir, tracker, steps, *, first_step=0, evaluated=True):
    """Log steps and the evaluation after each."""
    options = Options(tracker=tracker)
    with contextlib.closing(
        MetricWriter(workdir, first_step=first_step, evaluated=evaluated, options=options)
    ) as writer:
        if not evaluated:
            writer.scalars(first_step, {"segm_AP": first_step / 10})
        for step in steps:
            writer.scalars(step, {"loss": float(step)})
            writer.scalars(step, {"segm_AP": step / 10})
            writer.picture(step, "predictions", PICTURE)


class Fake:
    """Both modules: a run of either is this object, which records what is logged."""

    id = "the id"
    info = SimpleNamespace(run_id="the id")

    def __init__(self):
        self.started, self.ended, self.logged, self.params = [], [], [], {}

    def init(self, **arguments):
        self.started.append(arguments)
        return self

    def start_run(self, **arguments):
        return self.init(**arguments)

    def log(self, values):
        self.logged.append(values)

    def log_metrics(self, values, step):
        self.log({"step": step, **values})

    def log_image(self, image, key, step):
        self.log({"step": step, key: image.shape})

    def log_params(self, params):
        self.params |= params

    def finish(self, exit_code):
        self.ended.append(exit_code != 0)

    def end_run(self, status):
        self.ended.append({"FINISHED": False, "FAILED": True}[status])

    def log_dict(self, content, name):
        self.params["config.json"] = content

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def Image(self, image):  # noqa: N802
        return image.shape


def rows(*steps):
    return [
        row
        for step in steps
        for row in (
            {"step": step, "train/loss": float(step)},
            {"step": step, "val/segm_AP": step / 10},
            {"step": step, "val/predictions": (8, 8, 3)},
        )
    ]


@pytest.fixture(params=["wandb", "mlflow"])
def kind(request):
    return request.param


@pytest.fixture
def fake(kind, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, kind, fake)
    return fake


def test_a_resumed_run_continues_its_run_and_logs_nothing_twice(kind, fake, tmp_path):
    write(tmp_path, kind, (1, 2, 3))
    assert fake.logged == rows(1, 2, 3)
    write(tmp_path, kind, (3, 4), first_step=2)  # killed after step 3, whose checkpoint was not written
    assert fake.logged == rows(1, 2, 3, 4)
    assert fake.ended == [False, False]
    first, second = fake.started
    identity = {"wandb": "id", "mlflow": "run_id"}[kind]
    assert (first[identity], second[identity]) == (None, "the id")
    assert json.loads((tmp_path / "tracker.json").read_text()) == {kind: "the id"}
    if kind == "wandb":
        assert first["config"]["optim"]["lr"] == 5e-4
        assert first["dir"] == str(tmp_path)
    else:
        assert fake.params["optim.lr"] == 5e-4 and fake.params["config.json"]["batch_size"] == 16


def test_an_evaluation_that_was_cut_off_is_logged_when_it_is_made_up_for(kind, fake, tmp_path):
    with contextlib.closing(MetricWriter(tmp_path, first_step=0, options=Options(tracker=kind))) as writer:
        writer.scalars(1, {"loss": 1.0})
    write(tmp_path, kind, (2,), first_step=1, evaluated=False)
    assert fake.logged == [rows(1)[0], rows(1)[1], *rows(2)]


@pytest.mark.parametrize(("error", "failed"), [(ValueError, True), (KeyboardInterrupt, False), (SystemExit, False)])
def test_a_training_that_ends_with_an_error_has_failed(kind, fake, tmp_path, error, failed):
    with pytest.raises(error), MetricWriter(tmp_path, first_step=0, options=Options(tracker=kind)):
        raise error
    assert fake.ended == [failed]


def test_a_tracker_that_fails_is_left_with_a_warning(kind, fake, tmp_path, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    for name in ("log", "log_metrics"):
        monkeypatch.setattr(fake, name, fail)
    with caplog.at_level(logging.WARNING, "maskrcnn_jax"):
        write(tmp_path, kind, (1, 2, 3))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == f"{kind} failed (no route to host); training goes on without it"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_tracker_that_cannot_start_is_a_sentence(kind, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "init", lambda **arguments: {}["api_key"])
    with pytest.raises(UserError, match=rf"{kind} cannot start \('api_key'\); correct this, or use tracker none"):
        write(tmp_path, kind, ())


@pytest.mark.parametrize("content", ['{"wandb": "th', "[]", "\xff"])
def test_a_damaged_id_is_a_sentence_that_names_its_file(kind, fake, tmp_path, content):
    (tmp_path / "tracker.json").write_text(content, encoding="latin1")
    with pytest.raises(UserError, match=r"correct this, delete .*tracker\.json to start another run there, or use"):
        write(tmp_path, kind, (), first_step=1)


def test_a_training_that_begins_again_is_another_run(kind, fake, tmp_path):
    write(tmp_path, kind, (1, 2))  # and stopped before the first checkpoint
    write(tmp_path, kind, (1, 2, 3))
    assert fake.logged == rows(1, 2, 1, 2, 3)
    assert [arguments[{"wandb": "id", "mlflow": "run_id"}[kind]] for arguments in fake.started] == [None, None]


def test_a_missing_package_is_named_with_its_extra(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError, match=rf'pip install "\.\[{kind}\]" in the clone, or use tracker none'):
        write(tmp_path, kind, ())


def test_without_a_tracker_nothing_is_written_for_one(tmp_path):
    write(tmp_path, "none", (1,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_weights_and_biases_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb", (1, 2))
    write(tmp_path, "wandb", (2, 3), first_step=1)
    identity = json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_a_run_in_its_local_database(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)  # where it keeps pictures
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    write(tmp_path / "run", "mlflow", (1, 2))
    write(tmp_path / "run", "mlflow", (2, 3), first_step=1)
    identity = json.loads((tmp_path / "run" / "tracker.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    run = client.get_run(identity)
    assert (run.info.run_name, run.info.status, run.data.params["optim.lr"]) == ("run", "FINISHED", "0.0005")
    history = client.get_metric_history(identity, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert {file.path for file in client.list_artifacts(identity)} == {"config.json", "images"}
