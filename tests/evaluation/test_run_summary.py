"""The summary of a run."""

import dataclasses
import json

from maskrcnn_jax import __version__
from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.evaluation.run_summary import describe_options, read_lines, summarize, trained

SHAPES = to_options(load_config("shapes"))


def test_options_are_named_by_the_closest_config():
    assert describe_options(SHAPES) == "shapes"
    changed = dataclasses.replace(SHAPES, epochs=99, data=dataclasses.replace(SHAPES.data, coco_dir="elsewhere"))
    assert describe_options(changed) == "shapes with epochs 99, data.coco_dir elsewhere"


def test_of_many_changes_some_are_named_and_the_others_counted():
    names = [field.name for field in dataclasses.fields(SHAPES.data) if type(getattr(SHAPES.data, field.name)) is int]
    data = dataclasses.replace(SHAPES.data, **{name: getattr(SHAPES.data, name) + 1 for name in names})
    changed = dataclasses.replace(SHAPES, data=data, seed=77, epochs=99, log_every=7, eval_batch_size=3, batch_size=5)
    assert describe_options(changed).endswith(" more")


def test_the_length_of_a_training_is_that_of_its_last_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1000, "epoch": 1.5, "loss": 2}, {"step": 2500, "epoch": 3.75}, {"step": 2500, "segm_AP": 0.1}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n[1]\n{"step": 9')
    assert trained(path) == "2,500 steps, 3.75 epochs"
    assert read_lines(path) == lines
    assert trained(None) == trained(tmp_path / "none") == ""


def test_a_summary_names_what_a_reader_needs_to_repeat_the_run(tmp_path):
    rows = dict(summarize(SHAPES, model="runs/a, checkpoint best", data="val2017 of COCO"))
    assert list(rows) == ["date", "model", "data", "config", "hardware", "software"]
    assert rows["software"].startswith(f"maskrcnn_jax {__version__}") and "jax" in rows["software"]
    assert "CPU cores" in rows["hardware"]
