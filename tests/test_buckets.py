"""Strings become paths: on a disk or in a bucket, and each says in a sentence why it cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskrcnn_jax import paths
from maskrcnn_jax.converting.convert import convert, in_coco_format
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path, file_names, in_bucket, local_path, read_bytes, write_bytes
from maskrcnn_jax.training.metrics import MetricWriter
from maskrcnn_jax.writing import GrowingFiles, replace_file, write_json


@pytest.fixture(autouse=True)
def _forget_buckets():
    paths._check_bucket.cache_clear()
    yield
    paths._check_bucket.cache_clear()


def test_a_path_on_a_disk_is_one_of_pathlib_and_nothing_is_imported_for_it():
    assert as_path("a/b") == Path("a/b") and as_path(Path("/a")) == Path("/a")
    code = (
        "import sys; from maskrcnn_jax.paths import as_path; as_path('a'); print({'etils', 'fsspec'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("url", ["s3://a/b", "http://a/b", "gs://", "gs:///a"])
def test_a_url_that_is_no_path_in_a_bucket_is_refused(url):
    with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
        as_path(url)


def test_a_missing_package_is_a_sentence():
    code = "import sys; sys.modules['gcsfs'] = None; from maskrcnn_jax.paths import as_path; as_path('gs://bucket/a')"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode and 'pip install ".[gcs]"' in failed.stderr.splitlines()[-1]


def test_files_in_a_bucket_are_written_read_and_listed(bucket):
    folder = as_path(f"{bucket.url}/files")
    write_json(folder / "a.json", [1])
    replace_file(str(folder / "b" / "c"), "ä")
    assert in_bucket(folder) and str(folder) == f"{bucket.url}/files" and as_path(folder) == folder
    assert read_bytes(folder / "a.json") == b"[1]\n"
    assert read_bytes(folder / "b" / "c").decode() == "ä"
    assert file_names(folder) == {"a.json", "b/c"}
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b"]
    assert folder.is_dir() and not folder.is_file() and not (folder / "nothing").exists()
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_bytes(folder / "nothing")
    with pytest.raises(UserError, match=f"the weights {folder} cannot be in a bucket; .*gcloud storage cp"):
        local_path(folder, "the weights")


def test_a_listing_sees_what_others_wrote_since_the_last(bucket):
    folder = as_path(f"{bucket.url}/shared")
    write_bytes(folder / "a", b"")
    assert [path.name for path in folder.iterdir()] == ["a"]
    code = f"from maskrcnn_jax.paths import *; write_bytes(as_path('{folder}/b'), b'')"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | bucket.environment)
    assert [path.name for path in folder.iterdir()] == ["a", "b"]
    assert (folder / "b").exists()


def test_a_bucket_that_does_not_exist_or_refuses_is_a_sentence(bucket):
    with pytest.raises(UserError, match="there is no bucket gs://elsewhere; correct the name, or create it"):
        as_path("gs://elsewhere/run")
    with bucket.refusing("GET"), pytest.raises(UserError, match="cannot be read .*nobody@x does not have .*; log in"):
        as_path(f"{bucket.url}/run")
    path = as_path(f"{bucket.url}/run")
    with bucket.refusing("GET"), pytest.raises(OSError, match="nobody@x does not have"):
        read_bytes(path)
    with bucket.refusing("POST"), pytest.raises(UserError, match=r"gs://bucket/run cannot be written \(.*nobody@x"):
        replace_file(path, "a")


def test_a_dataset_in_a_bucket_is_checked_there_and_only_its_conversion_is_refused(bucket, tmp_path):
    source = f"{bucket.url}/datasets"
    write_bytes(as_path(f"{source}/annotations/instances_train.json"), b"{}")
    with in_coco_format(source) as folder:
        assert str(folder) == source
    with pytest.raises(UserError, match=f"a dataset to convert {source} cannot be in a bucket"):
        convert(source, tmp_path / "out")


def test_files_that_grow_are_uploaded_when_it_is_asked_for_or_time(bucket, tmp_path):
    for folder in (tmp_path, as_path(f"{bucket.url}/growing")):
        files = GrowingFiles(folder)
        file = (files.path / "log").open("a")
        for line, after in (("1\n", 0.0), ("2\n", 60.0)):
            file.write(line)
            file.flush()
            files.upload(after=after)
        assert read_bytes(folder / "log") == (b"1\n" if in_bucket(folder) else b"1\n2\n")
        file.close()
        files.close()
        assert read_bytes(folder / "log") == b"1\n2\n"
        assert files.path.exists() != in_bucket(folder)


def test_the_lines_of_saved_steps_outlive_a_killed_run(bucket):
    workdir = as_path(f"{bucket.url}/metrics")
    killed = MetricWriter(workdir, first_step=0)
    killed.scalars(1, {"loss": 1.0})
    killed.upload()  # before the checkpoint of step 1
    killed.scalars(2, {"loss": 2.0})
    resumed = MetricWriter(workdir, first_step=1)
    resumed.scalars(2, {"loss": 3.0})
    resumed.close()
    lines = [json.loads(line) for line in read_bytes(workdir / "metrics.jsonl").splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]
    assert len(file_names(workdir / "tensorboard")) in (1, 2)  # named by the second in which they were begun
    killed._files.path.joinpath("metrics.jsonl").unlink()
    killed._file.close()
    killed._board.close()
