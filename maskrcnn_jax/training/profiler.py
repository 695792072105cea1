"""A trace of a few steps of a training, by jax.profiler, and how long each stage of the model took in it."""

import collections
import gzip
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

import jax

from maskrcnn_jax.paths import as_path
from maskrcnn_jax.training.step import TrainStep
from maskrcnn_jax.writing import GrowingFiles

_log = logging.getLogger(__name__)
_FIRST = 3  # step of a start: the first compiles, and the second still waits for what was compiled
# Scopes of MaskRCNN and of the step. An operation outside of them all counts as "other".
_STAGES = {
    *("backbone", "fpn", "rpn", "match_anchors", "sample_anchors", "rpn_losses", "propose", "sample_rois", "pool"),
    *("box_head", "head_losses", "mask_logits", "mask_targets", "sum_gradients", "optimizer"),
}
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.\-]+) = .*?([\w\-]+)\(.*op_name=\"([^\"]*)\"", re.MULTILINE)
_CONTAINERS = {"while", "conditional", "call"}  # what happens in them is in the trace, too


class Profiler:
    """Traces the steps of one start of a training; each process writes what its own devices do."""

    def __init__(self, workdir: str | os.PathLike, num_steps: int, train_step: TrainStep):
        """Prepare.

        Args:
            workdir: Folder of the run; the trace goes into its folder ``profile``.
            num_steps: Steps to trace, from the third on; 0 traces nothing.
            train_step: What is traced.
        """
        self._folder, self._num_steps, self._is_tracing = as_path(workdir) / "profile", num_steps, False
        self._train_step, self._results = train_step, None

    def before_step(self, number: int) -> None:
        """Start the trace where it is due.

        Args:
            number: of the step, 1 for the first of this start.
        """
        if self._num_steps and number == _FIRST:
            self._files = GrowingFiles(self._folder)
            jax.profiler.start_trace(self._files.path)
            self._is_tracing = True

    def after_step(self, number: int, results) -> None:
        """End the trace after its last step.

        Args:
            number: as of ``before_step``.
            results: arrays that the step computes, for which the end of the trace waits.
        """
        if self._is_tracing:
            self._results = results
            if number == _FIRST + self._num_steps - 1:
                self.close()

    def close(self) -> None:
        """End a trace that is still going on, as it is where the training ends before."""
        if not self._is_tracing:
            return
        jax.block_until_ready(self._results)
        jax.profiler.stop_trace()
        self._is_tracing = False
        _log.info("wrote a trace into %s", self._folder)
        newest = max(self._files.path.rglob("*.trace.json.gz"), key=os.path.getmtime)
        times = stage_times(newest, [program.as_text() or "" for program in self._train_step.programs.values()])
        total = max(sum(times.values()), 1e-9)
        lines = [f"{time / total:6.1%}  {stage}" for stage, time in times.items()]
        _log.info("time of the devices in it:\n%s", "\n".join(lines))
        self._files.close()


def stage_times(trace: Path, programs: Iterable[str]) -> dict[str, float]:
    """Return the seconds that the operations of each stage took, the most first.

    Args:
        trace: ``.trace.json.gz`` of ``jax.profiler``.
        programs: texts of the compiled programs, which say in which named scopes an operation is.

    Returns:
        By stages as they lie in each other, such as "head_losses/mask_logits/pool", the gradient included.
    """
    stages = {}
    for program in programs:
        for name, opcode, path in _INSTRUCTION.findall(program):
            if opcode not in _CONTAINERS:
                scopes = [scope for scope in re.findall(r"\w+", path) if scope in _STAGES]
                stages[name] = "/".join(dict.fromkeys(scopes)) or "other"
    times: collections.Counter[str] = collections.Counter()
    with gzip.open(trace) as file:
        for event in json.load(file)["traceEvents"]:
            operation = event.get("args", {}).get("hlo_op")
            if operation in stages:
                times[stages[operation]] += event["dur"] / 1e6
    return dict(times.most_common())
