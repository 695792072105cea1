"""What an evaluation was made with: date, version, config, weights, hardware and length of the training."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import jax

from maskrcnn_jax import __version__
from maskrcnn_jax.config import config_names, load_config, to_options
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import read_bytes
from maskrcnn_jax.run_folder import flatten

_NAMED = 12  # options that differ from those of the config; the others are counted


def summarize(options: Options, *, model: str, data: str, training: Path | None = None) -> list[tuple[str, str]]:
    """Return names and values.

    Args:
        options: of the evaluation.
        model: the weights, or the run and its checkpoint.
        data: what it was evaluated on.
        training: metrics.jsonl of the run, if there is one.
    """
    now = datetime.datetime.now().astimezone()
    devices = jax.devices()
    rows = [
        ("date", f"{now:%Y-%m-%d %H:%M %Z}"),
        ("model", model),
        ("data", data),
        ("training", trained(training)),
        ("config", describe_options(options)),
        ("hardware", f"{len(devices)} {devices[0].device_kind}, {os.cpu_count()} CPU cores, {_processor()}"),
        (
            "software",
            f"maskrcnn_jax {__version__}{_commit()}, jax {jax.__version__}, Python {platform.python_version()}",
        ),
    ]
    return [(name, value) for name, value in rows if value]


def trained(path: Path | None) -> str:
    """Return the steps and epochs of a run by its metrics.jsonl; nothing if it is not known."""
    last: dict = {}
    for line in read_lines(path):
        last |= {key: line[key] for key in ("step", "epoch") if isinstance(line.get(key), int | float)}
    parts = [f"{last['step']:,.0f} steps"] if "step" in last else []
    parts += [f"{last['epoch']:.4g} epochs"] if "epoch" in last else []
    return ", ".join(parts)


def read_lines(path: Path | None) -> list[dict]:
    """Return the lines of a metrics.jsonl; none if there is no such file."""
    if path is None or not path.is_file():
        return []
    lines = []
    for line in read_bytes(path).decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # the last line is cut off if the run was killed
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def describe_options(options: Options) -> str:
    """Return the config that options are closest to, and where they differ, such as "r50_fpn with optim.lr 0.01"."""
    now = flatten(dataclasses.asdict(options))
    differences = {}
    for name in config_names():
        config = flatten(dataclasses.asdict(to_options(load_config(name))))
        differences[name] = [f"{option} {value}" for option, value in now.items() if value != config[option]]
    closest = min(differences, key=lambda name: len(differences[name]))
    listed, more = ", ".join(differences[closest][:_NAMED]), len(differences[closest]) - _NAMED
    return closest + (f" with {listed}" if listed else "") + (f" and {more} more" if more > 0 else "")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """Return the commit of a checkout, in brackets; nothing for an installed package."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        return f" (commit {found})"
    return ""
