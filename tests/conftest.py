"""Settings of every test: eight simulated devices, checked shapes, strict broadcasting, kept compiled programs."""

import os
from pathlib import Path

# Read when JAX is first imported. Programs that use one device are unaffected.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Likewise torch: a thread that waits for one of another test process keeps its core busy.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

from tests import shape_checker

# Check the annotated shapes and dtypes at every call. This must come before the first import of these modules.
install_import_hook(["maskrcnn_jax.ops", "maskrcnn_jax.models"], f"{shape_checker.__name__}.check")
# A missing axis is a bug more often than a wish: [N] + [N, 4] must say what it means.
jax.config.update("jax_numpy_rank_promotion", "raise")
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "maskrcnn_jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Grain's worker processes read absl flags, which nothing parses under pytest.
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def quick_compilation():
    """Compile without optimizing, here and in child processes: for programs that compile far longer than they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def key() -> jax.Array:
    """A random key, the same for every test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def coco_dir() -> Path:
    """Folder of a COCO-format dataset, from the environment variable COCO_DIR; skips where there is none."""
    path = Path(os.environ.get("COCO_DIR") or "/nonexistent")
    if not (path / "annotations").is_dir():
        pytest.skip("COCO_DIR does not name a folder with annotations/")
    return path
