"""Trainings in processes that may be killed, forked from one that has imported everything so that they start soon."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from maskrcnn_jax.commands.app import set_up_logging
from maskrcnn_jax.config import to_options
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.training.loop import train
from tests.children import QUICK_XLA


class FakeEvaluation(NamedTuple):
    metrics: dict
    picture: np.ndarray = np.zeros((8, 8, 3), np.uint8)


def _make_evaluate(categories):
    def evaluate(model):
        # Some number of the model, up and down over the steps, for the best checkpoint to be one of any age.
        total = sum(float(array.sum()) for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
        return FakeEvaluation({"bbox_AP": 0.5, "segm_AP": float(np.sin(1e6 * total))})

    return evaluate


def _run(config: ConfigDict, workdir: Path | str, cache: Path, log: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    os.environ["XLA_FLAGS"] = QUICK_XLA  # read when the first device is asked for: one device
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with open(log, "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    set_up_logging()
    try:
        train(to_options(config), workdir, make_evaluate=_make_evaluate)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def start(
    config: ConfigDict,
    workdir: Path | str,
    cache: Path,
    *,
    log: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> multiprocessing.Process:
    """Start a training on one device.

    Args:
        config: of the run.
        workdir: likewise.
        cache: folder of compiled programs.
        log: what is printed is appended to it; by default it lies beside the workdir.
        environment: variables to set, since the environment is that of the first process that was forked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(
        target=_run, args=(config, workdir, cache, log or Path(workdir).with_suffix(".log"), dict(environment))
    )
    process.start()
    return process
