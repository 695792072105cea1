"""Whatever lies in a file of weights: it is read, or refused in a sentence, and none of it is run."""

import os
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from maskrcnn_jax.weights.files import read_arrays
from tests.hostile import damage_bytes, damages, hostile

_HELD = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
_FOLDER = Path(_HELD.name)
_CANARY = _FOLDER / "canary"
_ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5)}


class Mkdir:
    """Makes the canary when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(_CANARY),)


_PLAIN = [pickle.dumps({"model": OrderedDict(_ARRAYS)}, protocol) for protocol in (2, 4, 5)]
_HOSTILE = [pickle.dumps({"model": _ARRAYS | {"c": Mkdir()}}, protocol) for protocol in (0, 2, 4, 5)]
_TENSORS = safetensors.numpy.save(_ARRAYS)
_FILES = [(".pkl", data) for data in _PLAIN + _HOSTILE] + [(".safetensors", _TENSORS)] * 5


def _read(suffix, data):
    path = _FOLDER / f"a{suffix}"
    path.write_bytes(data)
    try:
        arrays = read_arrays(path)
    finally:
        assert not _CANARY.exists()
    assert arrays and all(type(array) is np.ndarray for array in arrays.values())
    assert sum(array.nbytes for array in arrays.values()) <= 4 * len(data)


def test_the_canary_is_made_by_an_unpickler():
    for data in _HOSTILE:
        pickle.loads(data)
        _CANARY.rmdir()


@pytest.mark.slow
@hostile(
    "weights",
    file=st.one_of(
        st.tuples(st.sampled_from(_FILES), damages).map(lambda made: (made[0][0], damage_bytes(made[0][1], made[1]))),
        st.tuples(st.sampled_from([".pkl", ".safetensors"]), st.binary(max_size=60)),
        st.tuples(st.sampled_from([0, 1, 8, 24, 10**4, 2**40, 2**64 - 1, -1]), st.integers(), st.integers()).map(
            lambda n: (".safetensors", _safetensors([n[0]], [n[1], n[2]]))
        ),
        st.tuples(st.sampled_from(_PLAIN), st.integers(0, 400), st.sampled_from(_HOSTILE)).map(
            lambda two: (".pkl", two[0][: two[1]] + two[2][2:])
        ),
    ),
)
def test_hostile_weights_are_read_or_refused_and_never_run(file):
    _read(*file)


def _safetensors(shape, offsets):
    header = f'{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    return len(header).to_bytes(8, "little") + header + bytes(24)


@pytest.fixture(scope="module", autouse=True)
def _torch_files():
    torch = pytest.importorskip("torch")
    path = _FOLDER / "made.pth"
    tensors = {name: torch.from_numpy(array) for name, array in _ARRAYS.items()}
    for state in (tensors, tensors | {"c": Mkdir()}):
        for zipped in (True, False):
            torch.save({"model": state}, path, _use_new_zipfile_serialization=zipped)
            _TORCH.append(path.read_bytes())


_TORCH = []


@hostile("torch", which=st.integers(0, 3), made=damages)
def test_hostile_files_of_torch_are_read_or_refused_and_never_run(which, made):
    _read(".pth", damage_bytes(_TORCH[which], made))
