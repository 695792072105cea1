"""Compiled training steps kept between runs, so that the next run of the same kind need not trace its step.

JAX's own cache finds a program by its text, for which every run traces and lowers it first: most of what its start
takes. Here a program is found by what the text is made from: the sources of this package and of the libraries, the
structure of the model, what the optimizer does, the arguments, the devices, the settings of JAX and the compiler. What
cannot be told with certainty is not kept, and what cannot be read is compiled anew. Neither is a program kept that JAX
took from its own cache, which XLA cannot write out a second time.

Reading a program runs code, as it does with JAX's own cache. So the files belong to the user and nobody else can read
or write them; a file of someone else is not touched.
"""

import contextlib
import hashlib
import io
import os
import pickle
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jaxlib
import ml_dtypes
import numpy as np
import opt_einsum
import optax
from flax import nnx
from jax.experimental import serialize_executable
from jax.sharding import Mesh

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = [
    Path(library.__file__).resolve().parent for library in (jax, jaxlib, flax, optax, np, ml_dtypes, opt_einsum)
]
# Modules whose functions and classes may stand in the structure of a model: those whose sources are in the key.
_KNOWN = {"builtins", _PACKAGE.name, *(library.name for library in _LIBRARIES)}
# Of the environment, what compilers and libraries of numbers read. Where caches lie changes no program.
_ENVIRONMENT = ("XLA_", "JAX_", "FLAX_", "TF_", "LLVM_", "OMP_", "MKL_", "NPY_", "NPROC")
_WITHOUT_EFFECT = {"JAX_COMPILATION_CACHE_DIR", "jax_compilation_cache_dir"}


class Unknown(Exception):
    """What a program is made from cannot be told."""


class ProgramCache:
    """A folder of compiled programs; programs that use other devices than CPUs are left to JAX's cache."""

    def __init__(self, folder: str | Path, max_bytes: int = 2 * 10**9):
        """Prepare.

        Args:
          folder: made when the first program is kept.
          max_bytes: of all programs; those that were not used for the longest time are deleted first.
        """
        self._folder, self._max_bytes = Path(folder), max_bytes

    def load(self, key: str, mesh: Mesh) -> jax.stages.Compiled | None:
        """Return the program of a key, or nothing where there is none that can be read."""
        try:
            # Another user could have put a file here whose content runs as this one.
            with open(os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
                    return None
                content = file.read()
            checksum, packed = content[:32], content[32:]
            if checksum != _checksum(key, packed):
                return None
            program = serialize_executable.deserialize_and_load(
                *pickle.loads(zlib.decompress(packed)), execution_devices=list(mesh.devices.flat)
            )
            os.utime(self._path(key))
            return program
        except Exception:  # whatever is wrong with a file, the program can be compiled
            return None

    def save(self, key: str, program: jax.stages.Compiled) -> None:
        """Keep a program that was compiled in this process; does nothing where that cannot be."""
        try:
            packed = zlib.compress(pickle.dumps(serialize_executable.serialize(program)), 1)
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=self._folder)  # which only this user can read
            try:
                with open(handle, "wb") as file:
                    file.write(_checksum(key, packed) + packed)
                os.replace(temporary, self._path(key))
            except BaseException:
                os.unlink(temporary)
                raise
            self._forget_oldest()
        except Exception:  # a full disk, a folder that cannot be written, a program that cannot be taken apart
            return

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.program"

    def _forget_oldest(self) -> None:
        files = sorted(((path.stat(), path) for path in self._folder.glob("*.program")), key=lambda f: -f[0].st_mtime)
        total = 0
        for status, path in files:
            total += status.st_size
            if total > self._max_bytes:
                path.unlink()


def _checksum(key: str, packed: bytes) -> bytes:
    return hashlib.sha256(key.encode() + packed).digest()


@contextlib.contextmanager
def programs_from_jax() -> Iterator[list[str]]:
    """Collect an entry for each program that JAX takes from its own cache.

    XLA's CPU compiler writes such a program out again without its functions, which shows only when it is called.
    """
    found = []

    def listen(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listen)


def step_key(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    settings: NamedTuple,
    compiler_options: Mapping[str, str],
    arguments: tuple,
) -> str | None:
    """Return a name for the program of a training step, another one wherever anything that it is made from differs.

    Args:
      graphdef: structure of the model.
      optimizer: arbitrary functions, which are known by the program of their update.
      settings: of the step: numbers, and the mesh over which the batch is sharded, called ``mesh``.
      compiler_options: for this program.
      arguments: of the step, the state first.

    Returns:
      64 hexadecimal digits, or nothing where the program cannot be known without tracing it.
    """
    mesh = settings.mesh
    if mesh.devices.flat[0].platform != "cpu" or jax.process_count() > 1:
        return None
    try:
        state = arguments[0]
        parts = [
            *_sources(_PACKAGE, _LIBRARIES, _process_start()),
            _structure(graphdef),
            _update(optimizer, state.params, state.opt_state),
            repr(settings),
            repr(sorted(compiler_options.items())),
            repr(jax.tree.structure(arguments)),
            *(_describe(array) for array in jax.tree.leaves(arguments)),
            f"{mesh} {mesh.axis_types} {[device.id for device in mesh.devices.flat]} {len(jax.devices())}",
            *_host(),
        ]
    except Exception:  # Unknown, or a static attribute that cannot be pickled, or another JAX
        return None
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(part)} ".encode() + part)
    return digest.hexdigest()


def _describe(array: jax.Array) -> str:
    kind = jax.typeof(array)
    return f"{kind} {kind.weak_type} {array.committed} {array.sharding}"


def _sources(package: Path, libraries: Iterable[Path], process_start: float) -> Iterator[str | bytes]:
    """Yield name, size and time of every file of code, by which Python tells whether it compiled it, and our sources.

    Raises:
      Unknown: when a file was changed after the process had started, which may have read the earlier one.
    """
    for root in (package, *libraries):
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                if not name.endswith((".py", ".so")):
                    continue
                path = Path(folder, name)
                status = path.stat()
                if status.st_ctime > process_start:
                    raise Unknown(path)
                yield f"{root.name}/{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}"
                if root == package:
                    yield path.read_bytes()


def _process_start() -> float:
    """Return when this process started, in seconds of time.time(), two seconds early."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age - 2


class _StructurePickler(pickle.Pickler):
    """Refuses functions and classes whose sources are not in the key."""

    def reducer_override(self, obj):
        module = getattr(obj, "__module__", None) if isinstance(obj, type) or callable(obj) else type(obj).__module__
        if module is None or module.partition(".")[0] not in _KNOWN:
            raise Unknown(obj)
        return NotImplemented


def _structure(graphdef: nnx.GraphDef) -> bytes:
    content = io.BytesIO()
    _StructurePickler(content).dump(graphdef)
    return content.getvalue()


def _update(optimizer: optax.GradientTransformation, params, opt_state) -> str:
    """Return the program of an update, with all constants of the schedule and the optimizer."""
    text = jax.jit(optimizer.update).lower(params, opt_state, params).as_text()
    if "callback" in text:
        raise Unknown("a function on the host")
    return text


def _host() -> Iterator[str]:
    """Yield the settings, the versions of Python and XLA, and the processor."""
    environment = {k: v for k, v in os.environ.items() if k.startswith(_ENVIRONMENT) and k not in _WITHOUT_EFFECT}
    yield repr(sorted(environment.items()))
    yield repr(sorted((k, repr(v)) for k, v in jax.config.values.items() if k not in _WITHOUT_EFFECT))
    yield f"{sys.version} {jax.devices()[0].client.platform_version}"
    # XLA divides work among as many threads as there are.
    yield f"{os.cpu_count()} {len(os.sched_getaffinity(0))}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    yield from sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
