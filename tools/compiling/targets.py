"""The machines that can be compiled for: what a chip has, and how a topology such as v5e:4x4 is read."""

import dataclasses
import math
import re
from dataclasses import dataclass

from maskrcnn_jax.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Figures of one chip, as its maker gives them."""

    platform: str  # of JAX: tpu or cuda
    memory: int  # HBM, bytes that programs can use
    flops: float  # FLOP/s, peak of matrix products in bfloat16
    hbm: float  # HBM, bytes/s
    links: float  # to the other chips of a slice or node, bytes/s in one direction
    network: float  # to other slices or nodes, bytes/s in one direction, this chip's share of its host's network
    source: str


# Memory: what XLA leaves to programs of 16, 32, 32 and 95 GiB, as it says when it refuses one. Where two versions of a
# source differ (v5e: 800 or 819 GB/s of HBM), the larger figure is taken.
CHIPS = {
    "v5e": Chip("tpu", int(15.75 * _GIB), 197e12, 819e9, 200e9, 3.1e9, "cloud.google.com/tpu/docs/v6e, column v5e"),
    "v6e": Chip("tpu", int(31.25 * _GIB), 918e12, 1640e9, 400e9, 12.5e9, "cloud.google.com/tpu/docs/v6e"),
    "v4": Chip(
        "tpu", int(30.75 * _GIB), 275e12, 1200e9, 300e9, 6.2e9, "cloud.google.com/tpu/docs/v4; network: as v5p"
    ),
    "v5p": Chip("tpu", int(95.74 * _GIB), 459e12, 2765e9, 600e9, 6.2e9, "cloud.google.com/tpu/docs/v5p-training"),
    "h100": Chip(
        "cuda",
        84_929_347_584,
        989e12,
        3352e9,
        450e9,
        50e9,
        "NVIDIA's data sheet of the H100 SXM; network of a DGX H100",
    ),
}


@dataclass(frozen=True)
class Target:
    """A number of chips and how they are connected."""

    name: str  # of the chip
    shape: tuple[int, ...]  # of a TPU slice; nodes and GPUs in each
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """Figures of the chip."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape) * self.slices

    @property
    def groups(self) -> int:
        """Number of slices or nodes, between which the network is slower."""
        return self.shape[0] if self.chip.platform == "cuda" else self.slices

    def __str__(self) -> str:
        name = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return f"{name} ({self.slices} slices)" if self.slices > 1 else name

    def resized(self, shape: tuple[int, ...]) -> "Target":
        """Return the target with slices of another shape."""
        return dataclasses.replace(self, shape=shape)


def parse_target(text: str, slices: int = 1) -> Target:
    """Read a topology such as v5e:4x4, v5p:2x2x4 or h100:2x8 (nodes x GPUs).

    Raises:
        UserError: if there is no such chip, or the shape does not fit it.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology={text}: there is no chip {name!r}; use one of {', '.join(CHIPS)}")
    axes = 3 if name in ("v4", "v5p") else 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != axes:
        example = {"h100": "h100:1x8, nodes x GPUs"}.get(name, f"{name}:2x2x1" if axes == 3 else f"{name}:4x4")
        raise UserError(f"--topology={text}: {shape!r} is no shape of {axes} numbers; write it like {example}")
    if name == "h100" and slices > 1:
        raise UserError("--slices is for TPUs; the first number of an h100 topology is that of the nodes")
    return Target(name, tuple(map(int, shape.split("x"))), slices)
