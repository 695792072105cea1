"""Long lists of a JSON file that are skipped or of which a few elements are wanted are never held whole."""

import json
import math
import tracemalloc

import pytest

from maskrcnn_jax.checking.examples import read_entries
from maskrcnn_jax.data import json_stream
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.errors import UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.json"


def peak_of(function, *arguments, **options):
    tracemalloc.start()
    try:
        return function(*arguments, **options), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_skipped_lists_are_not_decoded(path):
    entries = [{"id": i, "bbox": [1.5, 2.5, 3.5, 4.5]} for i in range(20_000)]
    path.write_text(json.dumps({"images": [{"id": 1}], "annotations": entries, "categories": []}))
    found, peak = peak_of(stream_json, path, {}, skip=["annotations"])
    assert found == {"images": [{"id": 1}], "annotations": None, "categories": []}
    assert peak < 2 * path.stat().st_size, "as Python objects they take ten times as much"


@pytest.mark.parametrize("entry", ['{"id": tru}', '{"id": 1,}', '{"id": "a}', '{"id": [1}]', "[1, 2"])
@pytest.mark.parametrize("batch", [1, 40, 1 << 17])
def test_what_is_no_json_is_found_in_a_skipped_list(path, monkeypatch, entry, batch):
    monkeypatch.setattr(json_stream, "_BATCH", batch)
    path.write_text('{"annotations": [' + ", ".join(['{"id": 1}'] * 20 + [entry] + ['{"id": 2}'] * 20) + "]}")
    with pytest.raises(UserError, match="is not valid JSON"):
        stream_json(path, {}, skip=["annotations"])


@pytest.mark.parametrize("batch", [1, 40, 1 << 17])
def test_skipped_entries_may_hold_lists_of_entries_that_begin_alike(path, monkeypatch, batch):
    monkeypatch.setattr(json_stream, "_BATCH", batch)
    entries = [{"id": i, "parts": [{"id": j, "x": math.nan} for j in range(5)]} for i in range(9)]
    path.write_text(json.dumps({"annotations": entries, "images": [1]}))
    assert stream_json(path, {}, skip=["annotations"])["images"] == [1]


@pytest.mark.parametrize("batch", [1, 40, 1 << 17])
def test_a_few_entries_are_found_by_their_places(path, monkeypatch, batch):
    monkeypatch.setattr(json_stream, "_BATCH", batch)
    entries = [{"id": i, "text": "é}, {", "box": [i, math.inf if i % 7 == 0 else 0.5]} for i in range(100)]
    entries[50] = "no entry"
    path.write_text(json.dumps({"images": list(range(100)), "annotations": entries, "categories": []}))
    wanted = {"images": {0, 99}, "annotations": {3, 49, 50, 98}}
    found = read_entries(path, wanted)
    assert found == {"images": {0: 0, 99: 99}, "annotations": {i: entries[i] for i in wanted["annotations"]}}
    assert read_entries(path, {"images": set(), "annotations": {100}}) == {"images": {}, "annotations": {}}


def test_examples_of_a_large_file_take_little_memory(path):
    entries = [{"id": i, "bbox": [1.5, 2.5, 3.5, 4.5]} for i in range(20_000)]
    path.write_text(json.dumps({"images": [{"id": 1}], "annotations": entries, "categories": []}))
    found, peak = peak_of(read_entries, path, {"images": {0}, "annotations": set()})
    assert found["images"] == {0: {"id": 1}} and peak < 2 * path.stat().st_size
