"""Training steps kept between runs: found only where nothing that they are made from differs."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskrcnn_jax.sharding import make_mesh, shard_batch
from maskrcnn_jax.training import program_cache
from maskrcnn_jax.training.program_cache import ProgramCache, programs_from_jax, step_key
from maskrcnn_jax.training.step import Settings, create_train_state
from tests.models.tiny import tiny_batch, tiny_model
from tests.training import cached_step

ROOT = Path(__file__).parents[2]
KEY = "0" * 64


@pytest.fixture
def cache(tmp_path):
    return ProgramCache(tmp_path)


@pytest.fixture
def mesh():
    return make_mesh(jax.devices()[:1])


def compiled(factor: float | None = None):
    """Compile a program, by default one that no other run of the tests can have left in JAX's cache."""
    factor = factor or random.uniform(2, 3)
    return jax.jit(lambda x: {"y": factor * x}).lower(jnp.arange(3.0)).compile()


def run(cache, mesh):
    """Return the factor by which the kept program multiplies, or nothing where there is none."""
    program = cache.load(KEY, mesh)
    return program and float(program(jnp.arange(3.0))["y"][1])


def test_a_kept_program_computes_the_same_and_is_the_users_alone(cache, mesh, tmp_path):
    assert run(cache, mesh) is None
    factor = random.uniform(2, 3)
    cache.save(KEY, compiled(factor))
    assert run(cache, mesh) == pytest.approx(factor)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "rename", "open", "link"])
def test_a_file_that_is_not_as_it_was_written_is_not_read(harm, cache, mesh, tmp_path):
    cache.save("1" * 64 if harm == "rename" else KEY, compiled())
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    wanted = tmp_path / f"{KEY}.program"
    if harm == "flip":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "cut":
        path.write_bytes(content[:-9])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "rename":
        path.rename(wanted)
    elif harm == "open":
        path.chmod(0o622)
    else:
        path.rename(tmp_path / "elsewhere")
        wanted.symlink_to(tmp_path / "elsewhere")
    assert run(cache, mesh) is None


def test_a_file_of_another_user_is_not_read(cache, mesh, monkeypatch):
    cache.save(KEY, compiled())
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert run(cache, mesh) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, mesh):
    (tmp_path / "file").touch()
    cache = ProgramCache(tmp_path / "file" / "folder")
    cache.save(KEY, compiled())
    assert run(cache, mesh) is None


def test_programs_not_used_for_the_longest_time_are_forgotten_first(tmp_path, mesh):
    cache = ProgramCache(tmp_path)
    for number in range(3):
        cache.save(str(number) * 64, compiled())
        os.utime(tmp_path / f"{str(number) * 64}.program", (number, number))
    size = (tmp_path / f"{KEY}.program").stat().st_size
    assert run(cache, mesh)  # now the newest
    ProgramCache(tmp_path, max_bytes=int(3.5 * size)).save("3" * 64, compiled())
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["0", "2", "3"]


def test_a_program_from_jaxs_cache_is_noticed():
    threshold = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        compiled(3.0)
        with programs_from_jax() as found:
            compiled(3.0)
        assert found
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", threshold)


def ingredients(optimizer=None, options=(), ema_decay=0.0, batch_size=8, side=64, **model_options):
    """Return the arguments of step_key."""
    mesh, optimizer = make_mesh(), optimizer or cached_step.optimizer()
    graphdef, state = create_train_state(tiny_model(**model_options), optimizer, mesh)
    batch = shard_batch(tiny_batch(batch_size=batch_size, side=side), mesh)
    return graphdef, optimizer, Settings(mesh, 2000, ema_decay, 1), dict(options), (state, batch, jax.random.key(0))


def make_key(**changes):
    return step_key(*ingredients(**changes))


@pytest.fixture(scope="module")
def usual():
    return ingredients()


@pytest.fixture
def usual_key(usual):
    return step_key(*usual)


def test_the_same_step_has_the_same_name(usual_key):
    assert usual_key and usual_key == make_key()


@pytest.mark.parametrize(
    "change",
    [
        {"rpn_nms_thresh": 0.6},
        {"norm": "batch"},
        {"dtype": "bfloat16"},
        {"side": 96},
        {"batch_size": 16},
        {"options": (("xla_cpu_scheduler_type", "X"),)},
        {"optimizer": cached_step.optimizer(num_steps=11)},
        {"optimizer": cached_step.optimizer(b2=0.99)},
        {"optimizer": optax.sgd(1e-3)},
        {"ema_decay": 0.9},
    ],
)
def test_a_step_made_of_something_else_has_another_name(change, usual_key):
    key = make_key(**change)
    assert key and key != usual_key


def test_two_schedules_that_differ_in_one_number_of_a_table_have_different_names():
    def follow(table):
        return optax.sgd(jax.jit(lambda step: jnp.asarray(table)[step]))

    table = np.linspace(0, 1, 5000, dtype=np.float32)
    other = table.copy()
    other[2500] += 1e-4
    keys = [make_key(optimizer=follow(values)) for values in (table, table.copy(), other)]
    assert keys[0] and keys[2]
    assert keys[0] == keys[1] != keys[2]


def test_settings_of_jax_are_part_of_the_name(usual, usual_key):
    with jax.default_matmul_precision("float32"):
        key = step_key(*usual)
    assert key and key != usual_key


def test_flags_of_the_compiler_are_part_of_the_name(monkeypatch, usual, usual_key):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
    key = step_key(*usual)
    assert key and key != usual_key


def test_other_sources_give_another_name(monkeypatch, usual, usual_key):
    monkeypatch.setattr(program_cache, "_sources", lambda *_: ["x = 1"])
    key = step_key(*usual)
    assert key and key != usual_key


def test_sources_are_part_of_the_name_unless_they_were_changed_while_the_process_ran(tmp_path):
    package, library = tmp_path / "package", tmp_path / "library"
    for folder in (package, library):
        folder.mkdir()
        (folder / "a.py").write_text("x = 1\n")

    def sources(start):
        return list(program_cache._sources(package, [library], start))

    later = time.time() + 60
    first = sources(later)
    assert first == sources(later)
    stamp = (package / "a.py").stat().st_mtime_ns
    (package / "a.py").write_text("x = 2\n")
    os.utime(package / "a.py", ns=(stamp, stamp))
    second = sources(later)
    assert first != second, "seen by its content, of the same size and time"
    (library / "b.py").write_text("x = 1\n")
    assert sources(later) != second
    with pytest.raises(program_cache.Unknown):
        sources(time.time() - 60)


def test_the_start_of_the_process_lies_before_now_and_after_the_last_boot():
    assert 0 < time.time() - program_cache._process_start() < time.clock_gettime(time.CLOCK_BOOTTIME) + 3


class OwnModel(nnx.Module):
    """A class of which the key knows no source."""


def test_what_is_not_of_this_package_and_its_libraries_has_no_name():
    with pytest.raises(program_cache.Unknown):
        program_cache._structure(nnx.graphdef(OwnModel()))


def test_an_optimizer_that_calls_the_host_has_no_name():
    def schedule(step):
        return jax.pure_callback(lambda s: np.float32(1e-3), jax.ShapeDtypeStruct((), jnp.float32), step)

    assert make_key(optimizer=optax.sgd(schedule)) is None


@pytest.mark.slow
def test_a_second_process_takes_the_program_of_the_first_and_computes_the_same_bits(tmp_path):
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }

    def run_steps():
        command = [sys.executable, str(ROOT / "tests/training/cached_step.py"), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    compiled_first, digest = run_steps()
    assert compiled_first == "1"
    assert run_steps() == ["0", digest]
