"""How long the first call takes beyond a later one, in fresh processes: with an empty cache, and from the cache."""

import tempfile
import time

import jax
import numpy as np

from maskrcnn_jax.inference.detect import make_detect
from tools.benchmarks import train
from tools.benchmarks.child import run_child
from tools.benchmarks.inputs import (
    Settings,
    default_dtype,
    make_batch,
    make_model,
    pad_images,
    random_objects,
    read_photos,
)
from tools.benchmarks.timing import Row, Spread, wait_for


def run(settings: Settings) -> list[Row]:
    """Measure the training step and inference."""
    rounds = settings.rounds or 3
    wanted = {"train step": ("time_train", train.defaults(settings))}
    inference = settings.having(height=800, width=1066, batch_size=1, dtype=default_dtype())
    wanted["inference"] = ("time_inference", inference)
    rows = []
    for name, (function, chosen) in wanted.items():
        seconds = {"cold": [], "from the cache": []}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as cache:
                environment = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
                for values in seconds.values():
                    values.append(run_child(f"compile:{function}", chosen, environment=environment)["seconds"])
        said = chosen.describe() | {"rounds": rounds}
        rows += [Row(f"compile {name}, {how}", Spread.of(values), settings=said) for how, values in seconds.items()]
    return rows


def time_train(settings: Settings) -> dict:
    """Time the compilation of the training step."""
    photos = read_photos(settings, settings.batch_size)
    rng = np.random.default_rng(settings.seed)
    batch = make_batch(photos, [random_objects(settings, train.ORDINARY, rng) for _ in photos])
    return {"seconds": _first_call(train.OurTraining(make_model(settings), batch).step)}


def time_inference(settings: Settings) -> dict:
    """Time the compilation of detection."""
    detect = make_detect(make_model(settings))
    inputs = jax.device_put(pad_images(read_photos(settings, settings.batch_size)))
    return {"seconds": _first_call(lambda: detect(*inputs))}


def _first_call(function) -> float:
    """Return the seconds that the first call takes beyond the second: tracing, compiling or reading the cache."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        wait_for(function())
        times.append(time.perf_counter() - start)
    return times[0] - times[1]
