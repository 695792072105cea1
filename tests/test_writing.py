import contextlib
import os

import pytest

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.training.metrics import MetricWriter
from maskrcnn_jax.writing import replace_file, replacing, writing


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, "ä")
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"
    (tmp_path / f".a.json.{os.getpid()}").symlink_to("/dev/full")  # where this process writes first
    with pytest.raises(UserError, match=r"a.json cannot be written \(No space left on device\); make room"):
        replace_file(path, "third")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_disk_says_through_a_library_is_understood_and_other_errors_pass():
    with pytest.raises(UserError, match=r"^runs cannot be written \(No space left on device\)"), writing("runs"):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 5 bytes: No space left on device [os_error_code='28']")
    with pytest.raises(KeyError), writing("runs"):
        raise KeyError("a bug")


def test_a_full_disk_under_the_metrics_is_a_sentence(tmp_path):
    writer = MetricWriter(tmp_path, first_step=0)
    writer.scalars(1, {"loss": 1.0})
    writer._file.close()
    with (
        contextlib.suppress(OSError),  # which closing says once more
        open("/dev/full", "w") as writer._file,
        pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No space left on device\)"),
    ):
        writer.scalars(2, {"loss": 1.0})
    writer._board.close()


def test_a_folder_appears_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "deep" / "folder"
    with pytest.raises(KeyError), replacing(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "a").write_text("1")
        raise KeyError("a bug")
    assert os.listdir(path.parent) == []
    path.mkdir()  # an empty folder may be there
    with replacing(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "a").write_text("1")
        assert os.listdir(path) == []
    assert os.listdir(path) == ["a"] and os.listdir(path.parent) == ["folder"]
