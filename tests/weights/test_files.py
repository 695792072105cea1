"""Weight files of torch, safetensors and detectron2 come and go whole, and hostile ones do nothing."""

import argparse
import copyreg
import io
import itertools
import json
import os
import pickle
import random
import resource
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.weights.files import read_arrays, write_arrays
from tests.limits import cpu_time_below

WEIGHT = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ARRAYS = {
    "conv.weight": WEIGHT,
    "transposed": WEIGHT.T,
    "reversed": WEIGHT[::-1],
    "big_endian": WEIGHT.astype(">f4"),
    "half": WEIGHT.astype(np.float16),
    "double": WEIGHT.astype(np.float64),
    "count": np.array(7, np.int64),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


def text(string):
    """The opcode that pushes a string."""
    encoded = string.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def pickled_array(shape=b"K\x02\x85", dtype="f4", data=b"C\x08\x00\x00\x80?\x00\x00\x00@"):
    """The opcodes of an array as NumPy writes it; by default of float32 [1, 2]."""
    empty = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    new_dtype = b"cnumpy\ndtype\n" + text(dtype) + b"K\x00K\x01\x87R"
    byte_order = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return empty + b"(K\x01" + shape + new_dtype + byte_order + b"\x89" + data + b"tb"


def in_dict(value, protocol=2):
    """A pickle of {"x": value}."""
    return b"\x80%c}" % protocol + text("x") + value + b"s."


def write(path, data):
    path.write_bytes(data)
    return path


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert (
            type(array) is np.ndarray and array.dtype.isnative and array.flags.c_contiguous and array.flags.writeable
        )
        assert array.dtype == expected[name].dtype.newbyteorder("=") and array.shape == expected[name].shape
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".PTH"])
def test_arrays_come_back_as_they_were_written(tmp_path, suffix):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    path = tmp_path / "deep" / f"a{suffix}"
    write_arrays(path, ARRAYS)
    assert_same(read_arrays(path), ARRAYS)
    read_only = np.broadcast_to(np.float32(3), (2, 2))
    write_arrays(path, {"bfloat16": WEIGHT.astype(ml_dtypes.bfloat16), "read_only": read_only})
    assert_same(read_arrays(path), {"bfloat16": WEIGHT, "read_only": read_only})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_torch_loads_what_was_written(tmp_path):
    torch = pytest.importorskip("torch")
    write_arrays(tmp_path / "a.pth", {"weight": np.float32([[1, 2]]), "bias": np.float32([3])})
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert type(state) is OrderedDict
    layer = torch.nn.Linear(2, 1)
    layer.load_state_dict(state)
    assert layer(torch.tensor([[10.0, 100.0]])).item() == 213


@pytest.mark.parametrize("key", ["model", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_torch_gives_its_state_dict(tmp_path, key, zipped):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 2, 8, 8)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [16, 22])
    state = model.state_dict()
    if key:  # what the references of torchvision save
        args = argparse.Namespace(device=torch.device("cpu"), lr=0.1)
        schedule = scheduler.state_dict()
        checkpoint = {key: state, "optimizer": optimizer.state_dict(), "lr_scheduler": schedule}
        state = {**checkpoint, "args": args, "epoch": 3}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    arrays = read_arrays(tmp_path / "a.pt")
    assert_same(arrays, expected)
    assert list(arrays) == list(expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_as_torch_reads_them(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(120, dtype=torch.float64).reshape(2, 3, 4, 5)
    tensors = {
        "whole": base,
        "slice": base[1, 1:, ::2],
        "transposed": base.permute(3, 1, 0, 2),
        "channels_last": base.float().to(memory_format=torch.channels_last),
        "expanded": base[:1, :1, :1, :1].expand(2, 1, 3, 1),
        "number": base[1, 2, 3, 4],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[0]),
        "buffer": torch.nn.BatchNorm2d(3).state_dict()["num_batches_tracked"],
    }
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16):
        tensors[str(dtype)] = base.to(dtype)[:, 1]
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert_same(read_arrays(tmp_path / "a.pth"), {name: loaded[name].detach().numpy() for name in tensors})


def test_narrow_floats_become_float32(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.tensor([1.5, -2.0]).bfloat16(), "b": torch.nn.Parameter(torch.tensor([0.5]).half())}
    torch.save(tensors, tmp_path / "a.pth")
    expected = {"a": np.float32([1.5, -2]), "b": np.float16([0.5])}
    assert_same(read_arrays(tmp_path / "a.pth"), expected)
    safetensors.numpy.save_file({"a": np.array([1.5, -2], ml_dtypes.bfloat16)}, tmp_path / "a.safetensors")
    assert_same(read_arrays(tmp_path / "a.safetensors"), {"a": np.float32([1.5, -2])})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_detectron2_gives_its_arrays(tmp_path, protocol):
    expected = {name: np.asarray(array, order="A") for name, array in ARRAYS.items() if array.size}
    model = OrderedDict(expected, scalar=np.float32(2.5))
    model._metadata = OrderedDict({"": {"version": 1}})  # as torch gives state dicts
    for tree in (
        {"model": model, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True, "iteration": 10**12},
        model,
    ):
        data = pickle.dumps(tree, protocol)
        for other in (data, data.replace(b"cnumpy._core.", b"cnumpy.core.")):  # NumPy 1; protocols < 4 name it so
            arrays = read_arrays(write(tmp_path / "a.pkl", other))
            assert_same(arrays, {**expected, "scalar": np.array(2.5, np.float32)})
            assert list(arrays) == [*expected, "scalar"]


def test_a_pickle_of_python_2_gives_its_arrays(tmp_path):
    # Its strings are bytes: U and T, with a length of 1 and of 4 bytes. Its ordered dicts are made of pairs.
    array = pickled_array(data=b"T\x08\x00\x00\x00\x00\x00\x80?\xff\xff\x7f\xff").replace(b"C\x01b", b"U\x01b")
    array = array.replace(text("f4"), b"U\x02f4").replace(text("<"), b"U\x01<")
    pairs = b"]](U\x01x" + array + b"ea"
    data = b"\x80\x02}U\x05modelccollections\nOrderedDict\n" + pairs + b"\x85Rs."
    assert pickle.loads(data, encoding="latin1")["model"]["x"].tolist() == [1, -np.finfo(np.float32).max]
    assert_same(read_arrays(write(tmp_path / "a.pkl", data)), {"x": np.float32([1, -np.finfo(np.float32).max])})


def test_an_entry_that_is_no_array_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    for bad in (7, "text", None, [1.0], {"y": torch.ones(1)}, torch.ones(2).to_sparse(), torch.ones(2, device="meta")):
        torch.save({"model": {"x": torch.ones(1), "layer.bad": bad}}, tmp_path / "a.pth")
        with pytest.raises(UserError, match="'layer.bad' .* is no array of numbers"):
            read_arrays(tmp_path / "a.pth")
    for bad in (7, "text", None, [1.0], {"y": WEIGHT}):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"x": WEIGHT, "layer.bad": bad}}))
        with pytest.raises(UserError, match="'layer.bad' .* is no array of numbers"):
            read_arrays(tmp_path / "a.pkl")
    for bad in (np.array([None]), np.array(["text"])):
        with pytest.raises(UserError, match="'layer.bad' .* is no array of numbers"):
            write_arrays(tmp_path / "b.safetensors", {"x": WEIGHT, "layer.bad": bad})
    assert not (tmp_path / "b.safetensors").exists()


def test_a_file_without_arrays_by_name_is_the_users_to_mend(tmp_path):
    torch = pytest.importorskip("torch")
    for tree, message in ([WEIGHT], "holds list"), ({}, "no arrays"), ({"model": {}}, "no arrays"):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
        torch.save(tree, tmp_path / "a.pth") if tree != [WEIGHT] else torch.save([torch.ones(1)], tmp_path / "a.pth")
        for name in ("a.pkl", "a.pth"):
            with pytest.raises(UserError, match=message):
                read_arrays(tmp_path / name)
    torch.save({3: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="named by int"):
        read_arrays(tmp_path / "a.pth")


def test_two_state_dicts_in_one_file_are_refused(tmp_path):
    tree = {"model": {"x": WEIGHT}, "state_dict": {"x": WEIGHT + 1}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
    with pytest.raises(UserError, match="'model' and 'state_dict'"):
        read_arrays(tmp_path / "a.pkl")


def test_a_path_without_a_known_file_is_the_users_to_mend(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read .*absent.pth: No such file"):
        read_arrays(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="cannot read .*folder.pth: Is a directory"):
        read_arrays(tmp_path / "folder.pth")
    with pytest.raises(UserError, match=r"a.onnx is not .* give one with .pkl, .pt, .pth, .safetensors"):
        read_arrays(tmp_path / "a.onnx")
    for name in ("a.pkl", "a.pt", "a", "pth"):
        with pytest.raises(UserError, match=r"give a name with .pth or .safetensors"):
            write_arrays(tmp_path / name, ARRAYS)
    for path in (tmp_path / "folder.pth", tmp_path / "a.onnx" / "b.safetensors"):
        with pytest.raises(UserError, match="cannot be written"):
            write_arrays(path, {"x": WEIGHT})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "folder.pth"]


def test_only_writing_files_of_torch_needs_torch(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    write_arrays(tmp_path / "a.pth", ARRAYS)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_same(read_arrays(tmp_path / "a.pth"), ARRAYS)
    with pytest.raises(UserError, match="install torch.*safetensors"):
        write_arrays(tmp_path / "b.pth", ARRAYS)
    write_arrays(tmp_path / "a.safetensors", ARRAYS)
    assert_same(read_arrays(tmp_path / "a.safetensors"), ARRAYS)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, suffix):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"a{suffix}"
    write_arrays(path, {"x": WEIGHT})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk
    try:
        with pytest.raises(UserError, match="cannot be written .File too large.; make room"):
            write_arrays(path, {"x": np.zeros(1_000_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(read_arrays(path), {"x": WEIGHT})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def hostile_pickles(marker):
    """Name -> (opcodes, protocol) that make the folder ``marker`` when Python's unpickler carries them out."""
    call = text(str(marker)) + b"\x85R"
    code = text(f"__import__('os').mkdir({str(marker)!r})")
    payload = np.array(None, object)
    payload[()] = Mkdir(str(marker))
    np.save(marker.with_suffix(".npy"), payload)
    imported_os = b"cbuiltins\n__import__\n" + text("os") + b"\x85R"
    arrays = b"}" + text("x") + pickled_array() + b"s"
    return {
        "GLOBAL": (b"cos\nmkdir\n" + call, 2),
        "STACK_GLOBAL": (text("os") + text("mkdir") + b"\x93" + call, 4),
        "INST": (b"(" + text(str(marker)) + b"ios\nmkdir\n", 2),
        "OBJ": (b"(cos\nmkdir\n" + text(str(marker)) + b"o", 2),
        "EXT": (b"\x82\xf0" + call, 2),
        "eval": (b"cbuiltins\neval\n" + code + b"\x85R", 4),
        "eval by its name in Python 2": (b"c__builtin__\neval\n" + code + b"\x85R", 2),
        "getattr": (b"cbuiltins\ngetattr\n" + imported_os + text("mkdir") + b"\x86R" + call, 4),
        "a dotted name": (text("numpy") + text("lib._npyio_impl.os.mkdir") + b"\x93" + call, 4),
        "numpy.load": (b"cnumpy\nload\n" + text(str(marker.with_suffix(".npy"))) + b"N\x88\x87R", 2),
        "this package": (
            b"cmaskrcnn_jax.weights.files\nwrite_arrays\n" + text(f"{marker}/a.safetensors") + arrays + b"\x86R",
            2,
        ),
        "within an array": (pickled_array(data=b"cos\nmkdir\n" + call + b"0C\x08\x00\x00\x80?\x00\x00\x00@"), 2),
        "within an object array": (pickle.dumps(payload, 2)[2:-1], 2),
    }


class Mkdir:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def extension():
    """Registers os.mkdir as extension 240, so that an EXT opcode can call it."""
    copyreg.add_extension("os", "mkdir", 240)
    yield
    copyreg.remove_extension("os", "mkdir", 240)


def test_a_hostile_pickle_does_nothing(tmp_path, extension):
    marker = tmp_path / "made"
    for name, (opcodes, protocol) in hostile_pickles(marker).items():
        data = in_dict(opcodes, protocol)
        pickle.loads(data)
        assert marker.is_dir(), f"{name} is harmless even to Python's unpickler, so this test shows nothing"
        for file in marker.iterdir():
            file.unlink()
        marker.rmdir()
        with pytest.raises(UserError, match="cannot be read as weights"):
            read_arrays(write(tmp_path / "a.pkl", data))
        assert not marker.exists(), name


@pytest.mark.parametrize(
    "value",
    [
        b"cnumpy\nndarray\nK\x03\x85R",  # of the allowed names, those that are no functions
        b"cnumpy\nndarray\n}" + text("__call__") + b"Nsb",
        b"cnumpy\nndarray\nN}" + text("tobytes") + b"Ns\x86b",
        b"cnumpy\ndtype\nN}" + text("code") + b"Ns\x86b",
        b"ccollections\nOrderedDict\nN}" + text("update") + b"Ns\x86b",
        b"ccollections\nOrderedDict\n" + pickled_array() + b"\x85R",
        b"ccollections\nOrderedDict\n])\x85a\x85R",
        b"c_codecs\nencode\n" + text("abc") + text("zlib") + b"\x86R",
        b"c_codecs\nencode\n" + text("caf\N{LATIN SMALL LETTER E WITH ACUTE}") + text("utf-8") + b"\x86R",
        b"c_codecs\nencode\n" + text("\N{SNOWMAN}") + text("latin1") + b"\x86R",
        b"cnumpy._core.multiarray\n_reconstruct\nccollections\nOrderedDict\nK\x00\x85C\x01b\x87R",
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R",  # without its state
        pickled_array() + b"N}" + text("value") + b"Ns\x86b",
        pickled_array() + b"Nb",
        b"}" + (text("a") + pickled_array() + b"s") * 2,  # one name twice
        pickled_array(dtype="O"),
        pickled_array(dtype="V8"),
        pickled_array(dtype="f4,f4"),
        pickled_array(data=b"]K\x01aK\x02a"),
        pickled_array(data=b"C\x07\x00\x00\x80?\x00\x00\x00"),
        pickled_array(shape=b"K\x03\x85"),
        pickled_array(shape=b"J\xff\xff\xff\xff\x85"),
        pickled_array(shape=b"\x88K\x02\x86"),
        pickled_array(shape=b"(" + b"K\x01" * 70 + b"K\x02t"),
        pickled_array(shape=b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85"),
        pickled_array(shape=b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85", data=b"C\x00"),
        pickled_array(shape=b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01\x85"),
        b"K\x01Q",
        b"Pid\n",
        b"})Ns",
        b"}K\x01Ns",
        b"](NNNu",
        b"]NNs",
        b"}Na",
        b"h\x09",
        b"000000",
        b"t",
        b"\x93",
        b"R",
        b"K\x01K\x02\x93",
        b"NNb",
    ],
)
def test_a_pickle_that_misuses_what_is_allowed_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_arrays(write(tmp_path / "a.pkl", in_dict(value)))
    assert_same(read_arrays(write(tmp_path / "b.pkl", in_dict(pickled_array()))), {"x": np.float32([1, 2])})


def nested_key(depth):
    """A dict whose key is tuples in tuples, each holding the one before twice: hashing takes 2^depth steps."""
    return b"})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth)) + b"Ns"


def one_after_another(function, args):
    """A function, its arguments, and what 2,000 calls with them return, in a list."""
    return b"](" + function + b"q\x00" + args + b"q\x01" + b"h\x00h\x01R" * 2000 + b"e"


def frombuffer_args(data):
    dtype = b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R"
    return b"(" + data + dtype + b"J\x90\xd0\x03\x00\x85" + text("C") + b"t"  # shape (250_000,)


FROMBUFFER = b"cnumpy._core.numeric\n_frombuffer\n"
PAIRS = b"](" + b"".join(b"](" + text(f"k{i}") + b"Ne" for i in range(2000)) + b"e"
BOMBS = {
    "a key that takes forever to hash": nested_key(60),
    "a deep key": b"})" + b"\x85" * 60_000 + b"Ns",
    "a deep list": b"]" * 40_000 + b"a" * 39_999,
    "a deep dict": b"}" + (text("a") + b"}") * 30_000 + b"s" * 30_000,
    "a far memo": b"Nr\xff\xff\xff\x7f",
    "long bytes": b"\x8e" + (1 << 40).to_bytes(8, "little"),
    "a long byte array": b"\x96" + (1 << 36).to_bytes(8, "little"),
    "long text": b"X\xff\xff\xff\xff",
    "a long string of Python 2": b"T\xff\xff\xff\x7f",
    "a long frame": b"\x95" + (1 << 40).to_bytes(8, "little"),
    "a long number": b"\x8b\xff\xff\xff\x7f",
    "many digits": b"L" + b"9" * 1_000_000 + b"L\n",
    "many objects": b"}" * 2_000_000,
    "many marks": b"(" * 2_000_000,
    "bytes in many arrays": one_after_another(FROMBUFFER, frombuffer_args(b"B@B\x0f\x00" + bytes(1_000_000))),
    "a string in many arrays": one_after_another(FROMBUFFER, frombuffer_args(b"T@B\x0f\x00" + bytes(1_000_000))),
    "a text in many bytes": one_after_another(b"c_codecs\nencode\n", text("a" * 1_000_000) + text("latin1") + b"\x86"),
    "a list in many dicts": one_after_another(b"ccollections\nOrderedDict\n", PAIRS + b"\x85"),
}


def torch_file(pickled, **storages):
    """A checkpoint of torch with these pickle and storages."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return content.getvalue()


def legacy_torch_file(pickled):
    """A checkpoint in torch's older format, without storages."""
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*head, pickled, pickle.dumps([], 2)])


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_cannot_fill_the_memory_or_take_forever(tmp_path, name, suffix):
    wrap = {".pkl": bytes, ".pth": torch_file, ".pt": legacy_torch_file}[suffix]
    path = write(tmp_path / f"a{suffix}", wrap(in_dict(BOMBS[name], 4)))
    tracemalloc.start()
    try:
        with cpu_time_below(5), pytest.raises(UserError, match="cannot be read as weights"):
            read_arrays(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * path.stat().st_size + 30e6


def test_damaged_files_are_refused_or_give_arrays(tmp_path):
    rng = random.Random(0)
    arrays = {"a": WEIGHT, "b": np.arange(5)}
    files = {}
    for protocol in (2, 4, 5):
        files[f"{protocol}.pkl"] = pickle.dumps({"model": OrderedDict(arrays)}, protocol)
    files["a.safetensors"] = safetensors.numpy.save(arrays)
    for name, data in files.items():
        path = tmp_path / name
        assert_same(read_arrays(write(path, data)), arrays)
        for length in range(0, len(data), 3):
            with pytest.raises(UserError, match="cannot be read as weights"):
                read_arrays(write(path, data[:length]))
        for _ in range(300):
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 3, 30))):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
            try:
                found = read_arrays(write(path, damaged))
            except UserError:
                continue
            assert found and all(type(array) is np.ndarray and array.nbytes < 1000 for array in found.values())
        for _ in range(100):
            with pytest.raises(UserError, match="cannot be read as weights"):
                read_arrays(write(path, rng.randbytes(rng.randrange(200))))


def test_a_hostile_file_of_torch_does_nothing(tmp_path):
    torch = pytest.importorskip("torch")
    marker, path = tmp_path / "made", tmp_path / "a.pth"
    for zipped, wrapped in itertools.product((True, False), (True, False)):
        state = {"x": torch.ones(1), "y": Mkdir(str(marker))}
        torch.save({"model": state} if wrapped else state, path, _use_new_zipfile_serialization=zipped)
        torch.load(path, weights_only=False)
        marker.rmdir()
        with pytest.raises(UserError, match="posix.mkdir.*no array needs"):
            read_arrays(path)
        assert not marker.exists()
    for data in (b"", b"PK\x03\x04", in_dict(pickled_array()), bytes(1000), path.read_bytes()[:-200]):
        with pytest.raises(UserError, match="cannot be read as weights"):
            read_arrays(write(path, data))


def tensor(offset=b"K\x00", size=b"K\x02\x85", stride=b"K\x01\x85", pid=None):
    """The opcodes of a tensor as torch writes it; by default of the two numbers of the storage "a"."""
    if pid is None:
        pid = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("a") + text("cpu") + b"K\x02t"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"Q" + offset + size + stride + b"\x89" + hooks + b"tR"


@pytest.mark.parametrize(
    "value",
    [
        tensor(offset=b"K\x01"),
        tensor(offset=b"J\xff\xff\xff\xff"),
        tensor(offset=b"N"),
        tensor(size=b"K\x03\x85"),
        tensor(size=b"J\xff\xff\xff\xff\x85"),
        tensor(size=b"J\xff\xff\xff\x7f\x85", stride=b"K\x00\x85"),
        tensor(size=b"K\x00\x8a\x08" + b"\xff" * 7 + b"\x7f\x86", stride=b"K\x01K\x01\x86"),
        tensor(size=b"K\x02"),
        tensor(size=b"\x88\x85"),
        tensor(stride=b"K\x02\x85"),
        tensor(stride=b"J\xff\xff\xff\xff\x85"),
        tensor(stride=b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"),
        tensor(stride=b"K\x01K\x01\x86"),
        tensor(size=b"(" + b"K\x01" * 70 + b"t", stride=b"(" + b"K\x01" * 70 + b"t"),
        tensor(pid=b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("b") + text("cpu") + b"K\x02t"),
        tensor(pid=b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("../a") + text("cpu") + b"K\x02t"),
        tensor(pid=b"(" + text("storage") + b"ctorch\nDoubleStorage\n" + text("a") + text("cpu") + b"K\x02t"),
        tensor(pid=b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("a") + text("cpu") + b"K\x03t"),
        tensor(pid=b"(" + text("storage") + b"ctorch\nnn.Linear\n" + text("a") + text("cpu") + b"K\x02t"),
        tensor(pid=text("a")),
        tensor(pid=b"})\x85" + text("a") + b"s"),
        b"ctorch._utils\n_rebuild_tensor\n(K\x00K\x00K\x00K\x00tR",
        b"ctorch._utils\n_rebuild_parameter\n)R",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__code__") + b"Ns\x86b",
        b"ctorch\nFloatStorage\n)R",
        b"ctorch\nFloatStorage\n}b",
        b"ctorch\nload\n" + text("a.pth") + b"\x85R",
    ],
)
def test_a_tensor_that_does_not_fit_its_data_is_refused(tmp_path, value):
    storage = np.float32([1, 2]).tobytes()
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_arrays(write(tmp_path / "a.pth", torch_file(in_dict(value), a=storage)))
    arrays = read_arrays(write(tmp_path / "b.pth", torch_file(in_dict(tensor()), a=storage)))
    assert_same(arrays, {"x": np.float32([1, 2])})


def test_a_file_of_torch_cannot_grow_beyond_its_size(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    torch.save({"x": torch.ones(1, dtype=torch.bfloat16).expand(10**12)}, path)
    with pytest.raises(UserError, match="larger than the file"):
        read_arrays(path)
    torch.save({"x": torch.zeros(10**6)}, path)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as parts, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in parts.infolist():
            archive.writestr(part.filename, parts.read(part))
    assert len(packed.getvalue()) < 10**5
    with pytest.raises(UserError, match="compressed"):
        read_arrays(write(path, packed.getvalue()))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        *(
            json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
            for dtype, shape, end in [
                ("F32", [1 << 40], 4),
                ("F32", [0, 1 << 62], 0),
                ("F32", [2], 1 << 40),
                ("F32", [-1], 4),
                ("F32", [1 << 70], 4),
                ("F9", [1], 4),
                ("F8_E4M3", [4], 4),  # a known type, but not to safetensors.numpy
            ]
        ),
    ],
)
def test_a_hostile_safetensors_file_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    for length in (len(header), len(header) + 1, 1 << 26, 1 << 62, (1 << 64) - 1):
        data = length.to_bytes(8, "little") + header + bytes(4 if b'"x"' in header else 0)
        with pytest.raises(UserError, match="cannot be read as weights"):
            read_arrays(write(path, data))
