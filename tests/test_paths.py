"""Paths with ~ are those of the home folder, and programs run where there is none."""

import pwd
from pathlib import Path

import jax
import pytest

import maskrcnn_jax as mr
from maskrcnn_jax.commands import app
from maskrcnn_jax.config import load_config
from maskrcnn_jax.data.dataset import load_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.inputs import read_image
from maskrcnn_jax.options import DataOptions
from maskrcnn_jax.paths import cache_dir, expand
from maskrcnn_jax.weights.published import resolve


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MASKRCNN_JAX_CACHE", raising=False)
    return tmp_path


@pytest.fixture
def no_home(monkeypatch):
    """An account that the system does not know, as in a container that is run by number."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("MASKRCNN_JAX_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_tilde_at_the_start_is_the_home_folder(home):
    assert expand("~/a") == f"{home}/a"
    assert expand(Path("~")) == str(home)
    for path in ("a~", "./~", "a/~/b", "", "/~"):
        assert expand(path) == path


def test_every_reader_of_paths_finds_the_home_folder(home):
    (home / "own.py").write_text("from maskrcnn_jax.config import default_config as get_config")
    assert load_config("~/own.py").batch_size == load_config(home / "own.py").batch_size
    data = DataOptions(coco_dir="~/coco", tfds_dir="~/tfds")
    assert (data.coco_dir, data.tfds_dir) == (f"{home}/coco", f"{home}/tfds")
    with pytest.raises(UserError, match=f"coco_dir {home}/coco is not a folder"):
        load_dataset(data, "train2017")
    with pytest.raises(UserError, match=f"{home}/a.safetensors"):
        mr.load("~/a.safetensors", config="r50_fpn")
    with pytest.raises(UserError, match=f"{home}/run"):
        mr.load("torchvision:maskrcnn_resnet50_fpn", config="~/run")
    with pytest.raises(UserError, match=f"{home}/a.jpg cannot be read"):
        read_image("~/a.jpg")


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_it_is_missed_only_where_it_is_named_or_needed():
    assert cache_dir() is None
    assert expand("/a") == "/a"
    with pytest.raises(UserError, match="there is no home folder for ~ in ~/a; give the whole path"):
        expand("~/a")
    with pytest.raises(UserError, match="set the environment variable MASKRCNN_JAX_CACHE to a folder"):
        resolve("torchvision:resnet50")


def test_downloads_are_looked_for_in_the_folder_that_the_environment_names(home, monkeypatch):
    monkeypatch.setenv("MASKRCNN_JAX_CACHE", "~/kept")
    file = home / "kept" / "weights" / "resnet50-0676ba61.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=f"{file} is not the published file"):
        resolve("torchvision:resnet50")


def test_compiled_programs_are_kept_only_where_a_folder_can_be_made(home, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    chosen = {}
    monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home / "file"))
    app._keep_compiled_programs()
    assert not chosen
    monkeypatch.setenv("HOME", str(home))
    app._keep_compiled_programs()
    assert chosen["jax_compilation_cache_dir"] == str(home / ".cache" / "maskrcnn_jax" / "xla")


def test_a_device_is_not_read_to_its_end():
    with pytest.raises(UserError, match="it is a device"):
        read_image("/dev/zero")
