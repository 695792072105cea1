"""Settings of every test: eight simulated devices, quick compilation, checked shapes, strict broadcasting."""

import os
from pathlib import Path

from tests.children import QUICK_XLA, children, kill_children

# Read when JAX is first imported. Programs that use one device are unaffected by the others.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count=8 {QUICK_XLA}".strip()
# For child processes.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
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
# Most programs of the tests compile far longer than they run.
_QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
jax.config.update("jax_disable_most_optimizations", _QUICK)
# A missing axis is a bug more often than a wish: [N] + [N, 4] must say what it means.
jax.config.update("jax_numpy_rank_promotion", "raise")
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "maskrcnn_jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Grain's worker processes read absl flags, which nothing parses under pytest.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def _no_process_is_left_behind():
    before = children()
    yield
    kill_children(spared=before)


@pytest.fixture
def optimized():
    """Compile with all optimizations, here and in child processes: for programs that run longer than they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", _QUICK)


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


@pytest.fixture(scope="session")
def bucket():
    """An emulated bucket of Google Cloud Storage; tests use different folders of it."""
    from tests.bucket import emulated  # a package that only some tests need

    with emulated() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A tab of headless Chromium; skips where it is not installed."""
    from tests.browser import CHROMIUM, Browser

    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
