"""The benchmark tool: its timing with a clock of our own, and every subject once, far too small to learn from."""

import dataclasses
import json

import numpy as np
import pytest

from tools import benchmark
from tools.benchmarks import scaling
from tools.benchmarks.inputs import NARROW, Settings
from tools.benchmarks.tables import write_docs
from tools.benchmarks.timing import Row, Spread, cell, compare, measure, table, write_json

TINY = Settings(height=96, width=96, rounds=2, options=NARROW, num_classes=7, dtype="float32")


@pytest.fixture
def against():
    """Settings with the reference, torch on one thread: many small operations wait long for a second one."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield dataclasses.replace(TINY, against=True)
    torch.set_num_threads(threads)


class Clock:
    """Advances only when a function says how long it took."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def function(self, name: str, durations):
        durations = iter(durations)

        def call():
            self.calls.append(name)
            self.now += next(durations)

        return call


def test_functions_take_turns_and_warm_up_does_not_count():
    clock = Clock()
    contenders = {"a": clock.function("a", [100, 1, 2, 9]), "b": clock.function("b", [50, 4, 4, 4])}
    times = measure(contenders, 3, clock=clock)
    assert clock.calls == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert times["a"] == Spread(2, 1.5, 5.5)
    assert times["b"] == Spread(4, 4, 4)


def test_the_fastest_setting_of_the_reference_is_what_we_are_compared_to(monkeypatch):
    times = {"maskrcnn_jax": Spread(2, 2, 2), "slow": Spread(9, 9, 9), "fast": Spread(3, 3, 3)}
    monkeypatch.setattr("tools.benchmarks.timing.measure", lambda *_: dict(times))
    row = compare("x", lambda: None, {"slow": lambda: None, "fast": lambda: None}, 3)
    assert row.reference_name == "fast"
    assert row.ratio == 1.5
    assert row.settings["reference_settings_s"] == {"slow": 9, "fast": 3}


def test_rows_are_written_with_where_they_were_measured(tmp_path):
    rows = [
        Row("x", Spread(0.002, 0.001, 0.003), Spread(4, 3, 5), "torchvision"),
        Row("m", Spread(7, 7, 7), unit="MB"),
    ]
    write_json(tmp_path / "rows.json", "ops", rows)
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {"subject", "hardware", "versions", "commit", "date", "rows"} == content.keys()
    assert {"cpu", "cores", "gpu"} == content["hardware"].keys()
    assert {"python", "jax"} <= content["versions"].keys()
    first, second = content["rows"]
    assert (first["name"], first["ours_s"], first["reference_s"], first["ratio"]) == ("x", 0.002, 4, 2000)
    assert (first["ours_low_s"], first["reference_high_s"]) == (0.001, 5)
    assert (second["ours_MB"], second["reference_MB"], second["ratio"]) == (7, None, None)
    assert "2 ms (1..3)" in table(rows)


def test_rows_of_a_subject_replace_those_that_the_document_has(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text("# B\n\n### CPU\n\n#### ops\n\nold\n\n#### data\n\nkept\n\n### GPU\n\nnot run\n")
    where = {"hardware": {"cpu": "Z80", "cores": 2, "gpu": None}, "versions": {"jax": "1"}, "commit": "c", "date": "d"}
    for seconds in (7, 0.002):
        rows = [Row("x", Spread(seconds, seconds, seconds), Spread(4, 3, 5), "torchvision"), Row("y", Spread(3, 3, 3))]
        write_docs(document, "ops", rows, where)
        write_docs(document, "train", rows, where)
    text = document.read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# B",
        "### CPU",
        "#### ops",
        "#### data",
        "#### train",
        "### GPU",
    ]
    assert text.count("| x | 2 ms (2..2) | 4 s (3..5) | 2000.00 |") == text.count("| y | 3 s (3..3) | – | – |") == 2
    assert "old" not in text and "7 s" not in text and "kept" in text and "Z80, 2 cores; jax 1." in text


def test_an_interrupted_benchmark_keeps_the_rows_so_far(capsys):
    row = Row("x", Spread(2, 1, 3))

    def interrupted():
        yield row
        assert "x: 2 s" in capsys.readouterr().err, "told before the next is measured"
        raise KeyboardInterrupt

    assert benchmark.collect(interrupted()) == ([row], True)
    assert benchmark.collect([row, row]) == ([row, row], False)


def measured(subject: str, settings: Settings) -> dict[str, Row]:
    rows = list(benchmark.run(subject, settings))
    assert all(row.ours.low <= row.ours.median <= row.ours.high for row in rows)
    assert json.dumps([row.as_json() for row in rows])
    return {row.name: row for row in rows}


@pytest.mark.slow
def test_without_a_reference_only_ours_is_timed():
    rows = measured("ops", dataclasses.replace(TINY, num_classes=3))
    assert len(rows) >= 6
    assert all(row.reference is None and row.ratio is None for row in rows.values())


@pytest.mark.slow
def test_operations_give_the_same_on_both_sides_and_are_timed(against):
    rows = measured("ops", against)
    assert all(row.ratio == row.reference.median / row.ours.median for row in rows.values())


@pytest.mark.slow
def test_inference_is_timed_with_many_and_with_few_of_the_same_detections(against):
    rows = measured("inference", dataclasses.replace(against, batch_size=1))
    few = rows["inference, batch 1, 5 detections"]
    assert few.settings["same_detections"] == 1.0
    assert few.ratio > 0
    assert "channels_last" in "".join(few.settings["reference_settings_s"])
    many = [row for name, row in rows.items() if name.endswith("detections")]
    assert len(many) == 2
    assert sum(": " in name for name in rows) == 7, "a row for each stage"


@pytest.mark.slow
def test_exported_models_are_timed_beside_torchvisions_export(against):
    rows = measured("export", against)
    assert all(row.ratio > 0 for row in rows.values())
    beside = {row.reference_name for row in rows.values()}
    assert beside == {"torchvision's export", "JAX, float32", "torch autocast, bf16"}
    assert rows["export, OpenVINO, float32"].settings["detections"] > 1


@pytest.mark.slow
def test_a_training_step_is_timed_with_equal_numbers_of_positives(against):
    rows = measured("train", dataclasses.replace(against, batch_size=2))
    full = rows["training step, batch 2, full quotas"].settings
    quota = NARROW["box_batch_size_per_image"] // 4
    assert full["our_positives"] == quota
    assert full["reference_positives"] == [quota] * 2
    np.testing.assert_allclose(full["our_loss"], full["reference_loss"], rtol=0.2)
    assert {"training, batch 2: forward", "training, batch 2: gradient"} < rows.keys()


def test_evaluation_gives_the_numbers_of_pycocotools():
    rows = measured("eval", dataclasses.replace(TINY, num_images=4, rounds=1))
    assert any(name.startswith("COCO box and mask AP") for name in rows)


def test_loading_is_timed_on_real_images(coco_dir, against):
    rows = measured("data", dataclasses.replace(against, coco_dir=str(coco_dir), num_images=2, rounds=1))
    assert len(rows) == 4
    assert all(row.settings["images_per_s"] > 0 for row in rows.values())


@pytest.mark.slow
def test_memory_and_compilation_are_measured_in_processes_of_their_own(against):
    rows = measured("memory", dataclasses.replace(against, rounds=1, batch_size=1))
    assert all(row.ours.median > 0 and row.reference.median > 0 for row in rows.values())
    rows = measured("compile", dataclasses.replace(TINY, rounds=1, batch_size=1))
    assert rows["compile train step, from the cache"].ours.median < rows["compile train step, cold"].ours.median


@pytest.mark.slow
def test_every_axis_of_scaling_is_measured_and_drawn(tmp_path, monkeypatch):
    for name, values in (("SIDES", (1,)), ("BATCHES", (1,)), ("OBJECTS", (1,)), ("DETECTIONS", (5,))):
        monkeypatch.setattr(scaling, name, values)
    monkeypatch.setattr(scaling, "DEVICES", (1, 2))
    monkeypatch.setattr(scaling, "IMAGES", (200,))
    rows = list(measured("scaling", dataclasses.replace(TINY, height=64, width=64, rounds=1)).values())
    where = {"hardware": {"cpu": "Z80", "cores": 2, "gpu": None}, "versions": {"jax": "1"}, "commit": "c", "date": "d"}
    scaling.write_html(tmp_path / "page.html", rows, where)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == len({row.settings["axis"] for row in rows}) == 7
    assert all(cell(row.ours, row.unit) in page for row in rows)
    assert all(f">{unit}</text>" in page for unit in ("seconds", "MB", "pixels", "devices", "images"))
