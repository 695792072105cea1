"""The rows and comparisons of the paper, and the document about them, with trainings of our own invention."""

import importlib
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from configs import paper
from maskrcnn_jax.errors import UserError
from tests.children import PATIENCE
from tools.paper import running
from tools.paper.experiments import COMPARISONS, comparison_run, table_run
from tools.paper.results_page import load_results, write_report

METRICS = ("bbox_AP", "segm_AP", "segm_AP75", "eval_accuracy", "eval_accuracy_foreground", "eval_loss")
TRAIN_METRICS = ("train_segm_AP", "train_accuracy", "train_loss")


def applied(run):
    """Return the config of a run, with its overrides."""
    path, _, which = run.config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = module.get_config(which) if which else module.get_config()
    for name, value in run.overrides:
        *folders, field = name.split(".")
        section = config
        for folder in folders:
            section = section[folder]
        assert field in section, f"there is no option {name}"
        section[field] = value
    return config


@pytest.mark.parametrize(("table", "row"), paper.ROWS)
def test_a_row_of_the_tables_is_the_paper_s_network_with_its_recipe(table, row):
    values = paper.ROWS[table, row]
    config = applied(table_run(table, row, 1, {}))
    assert (config.epochs, config.data.train_limit, config.optim.lr) == (values.epochs, values.train_size, values.lr)
    assert config.model.backbone == ("resnet50" if table == 1 else "resnet101")
    assert (config.batch_size, config.optim.weight_decay, config.optim.kind) == (16, 1e-4, "adamw")
    assert (config.model.rpn_channels, config.model.mask_deconv, config.optim.frozen_stages) == (512, False, 0)
    # Sec. 2.2, 2.3, 2.6, 3.1 and 3.2; scales of a third of an octave each fill the factor 2 between the levels.
    assert config.model.train_proposals == "gt_then_rpn" and config.model.min_proposals == 15
    assert config.model.roi_operator == "align"
    np.testing.assert_allclose(np.diff(np.log2([*config.model.anchor_scales, 2])), 1 / 3)
    assert tuple(config.model.aspect_ratios) == (0.5, 1.0, 2.0)
    losses = (config.model.classification_loss, config.model.box_loss, config.model.mask_loss)
    assert losses == ("cross_entropy", "smooth_l1", "bce")
    assert config.data.hflip == 0.5 and config.data.color_jitter > 0
    assert config.model.dtype == "bfloat16" and config.optim.clip_norm == 1
    assert config.optim.final_lr_fraction == 0, "a cosine to the end"
    assert config.eval_losses and config.eval_train_limit == 5000 and config.eval_every == 1
    small = applied(table_run(table, row, 0.01, {}))
    assert small.data.train_limit == values.train_size // 100
    assert small.data.eval_limit == 50
    assert small.epochs == max(1, round(values.epochs / 100))


def test_a_row_that_the_paper_does_not_have_is_refused():
    for which in ("table=1,row=5", "table=1,row=0", "table=3,row=1", "row=1", "", "table=1,row=1,x=2"):
        with pytest.raises(UserError, match="table=2,row=3"):
            paper.get_config(which)


def test_variants_differ_in_what_is_compared_and_take_as_many_steps_with_fewer_images():
    for comparison in COMPARISONS.values():
        runs = [comparison_run(changes, 0, 0.2) for changes in comparison.variants.values()]
        assert len({run.name for run in runs}) == len(runs)
        images = {config.epochs * config.data.train_limit for config in map(applied, runs)}
        assert len(images) == 1
        for claim in comparison.claims:
            assert {claim.better, claim.worse} <= set(comparison.variants)
    assert len({comparison_run({}, seed, 0.2).name for seed in range(3)}) == 3


def result_of(run, value):
    point = {"epoch": 2.0, "loss": 1.0} | dict.fromkeys((*METRICS, *TRAIN_METRICS), value)
    return {
        "run": run.name,
        "commit": "abc",
        "date": "2026-01-01",
        "steps": 200,
        "first_loss": 3.0,
        "last_loss": 1.0,
        "lr": [1e-6, 1e-3, 1e-9],
        "curve": [point],
    }


def keep(output, run, value):
    path = output / run.name / running.RESULT
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result_of(run, value)))


def test_the_document_has_the_paper_s_numbers_and_what_was_found(tmp_path):
    output, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    align, pool = COMPARISONS["roi_operator"].variants.values()
    for seed, (better, worse) in enumerate([(0.4, 0.3), (0.42, 0.33), (0.44, 0.32)]):
        keep(output, comparison_run(align, seed, 0.2), better)
        keep(output, comparison_run(pool, seed, 0.2), worse)
    keep(output, comparison_run(align, 0, 0.01), 0.1)  # one more, at a scale that says less
    keep(output, table_run(1, 2, 1, {}), 0.5)
    keep(output, table_run(2, 3, 0.001, {"batch_size": "2"}), 0.5)
    keep(output, comparison_run(COMPARISONS["curves"].variants["10 epochs"], 0, 0.2), 0.6)
    write_report(output, docs)
    text = (docs / "results.md").read_text()
    assert "| RoIAlign | 3 | 0.420 ± 0.020 |" in text
    assert "outlines of masks (Sec. 4.2): **holds (3 of 3 seeds)**; segm_AP75 +0.103 ± 0.015" in text
    assert "| 2 | resnet50 | 50 | 50000 | 0.0005 | 48, 45 | 50, 50 | 0.500, 0.500 |" in text
    tables = text.split("## RoIAlign")[0]
    assert tables.count("| not run | not run |\n") == 6
    assert "--table=2 --rows=3 --coco_dir=COCO --weights=torchvision:resnet101  # about 28 hours" in text
    assert "| table=2_row=3 |" in text
    assert "Not run." in text, "comparisons without any result say so"
    assert (docs / "results_curves.png").stat().st_size > 10_000
    # The documents hold every result, so that another machine goes on from them.
    assert len(load_results(docs)) == 10
    write_report(tmp_path / "nothing", docs)
    assert (docs / "results.md").read_text() == text


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([(0.3, 0.4)] * 2, "does not hold (0 of 2 seeds)"),
        ([(0.3, 0.4), (0.4, 0.3)], "undecided (1 of 2 seeds)"),
        ([(0.4, 0.3)], "undecided (one seed)"),
    ],
)
def test_a_claim_that_the_seeds_do_not_support_is_said_not_to_hold(tmp_path, values, verdict):
    variants = COMPARISONS["min_proposals"].variants
    for seed, (with_30, with_15) in enumerate(values):
        keep(tmp_path / "runs", comparison_run(variants["30"], seed, 0.2), with_30)
        keep(tmp_path / "runs", comparison_run(variants["15"], seed, 0.2), with_15)
    write_report(tmp_path / "runs", tmp_path)
    assert f"**{verdict}**" in (tmp_path / "results.md").read_text()


def test_a_training_is_summarised_once_and_a_failed_one_is_tried_again(tmp_path, monkeypatch):
    commands = []

    def train(command, **_):
        commands.append(command)
        workdir = next(part.partition("=")[2] for part in command if part.startswith("--workdir"))
        if len(commands) == 1:
            return SimpleNamespace(wait=lambda: 143)
        lines = [{"step": step, "epoch": step / 2, "loss": 4.0 - step, "lr": 0.1 * step} for step in (1, 2, 3)]
        lines.insert(2, {"step": 2, "segm_AP": 0.1, "eval_accuracy": 0.5, "bbox_AR1": 0.3})
        lines.append({"step": 3, "segm_AP": 0.2, "eval_accuracy": 0.6})
        with open(f"{workdir}/metrics.jsonl", "w") as file:
            file.write("\n".join(map(json.dumps, lines)))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=train))
    run = comparison_run({"model.roi_operator": "pool"}, 1, 0.2)
    options = {"coco_dir": "data/shapes", "weights": "backbone.safetensors"}
    with pytest.raises(UserError, match="status 143; the same command goes on"):
        running.train(run, tmp_path, **options)
    result = running.train(run, tmp_path, **options)
    assert running.train(run, tmp_path, **options) == result
    assert len(commands) == 2
    assert "--config.model.roi_operator=pool" in commands[0]
    assert "--config.seed=1" in commands[0]
    assert "--weights=backbone.safetensors" in commands[0]
    assert f"--workdir={tmp_path / run.name}" in commands[0]
    assert result["command"].endswith(
        "--config.data.coco_dir=data/shapes --workdir=seed1 --weights=backbone.safetensors"
    )
    assert result["curve"] == [
        {"epoch": 1.0, "loss": 2.5, "segm_AP": 0.1, "eval_accuracy": 0.5},
        {"epoch": 1.5, "loss": 1.0, "segm_AP": 0.2, "eval_accuracy": 0.6},
    ]
    assert result["lr"] == [0.1, pytest.approx(0.3), pytest.approx(0.3)]


def test_a_signal_to_stop_reaches_the_training_which_ends_by_itself(tmp_path):
    """The tool in a process of its own, with a training that takes its time to save."""
    (tmp_path / "training.py").write_text(
        "import signal, sys, time\n"
        "def stop(number, _):\n"
        "    time.sleep(1)\n"
        "    open(sys.argv[1], 'w').write('saved')\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "open(sys.argv[1], 'w').write('started')\n"
        "time.sleep(3000)\n"
    )
    said = tmp_path / "said"
    command = [sys.executable, str(tmp_path / "training.py"), str(said)]
    code = f"from tools.paper import running; print(running._run({command}))"
    tool = subprocess.Popen([sys.executable, "-c", code], cwd=running.ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + PATIENCE
    while not (said.exists() and said.read_text() == "started") and time.time() < deadline:
        time.sleep(0.1)
    tool.terminate()
    assert tool.communicate(timeout=PATIENCE)[0].strip() == "143"
    assert said.read_text() == "saved"
