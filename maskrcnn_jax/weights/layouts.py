"""Correspondence between our arrays and those of PyTorch checkpoints: memory layouts and names."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from flax import nnx

Path = tuple[str | int, ...]  # of an array in the state of a model


def flat_state(model: nnx.Module) -> dict[Path, nnx.Variable]:
    """Return the arrays of a model by their paths."""
    # Keys are any sortable objects for Flax; ours are names of attributes and places in lists.
    return dict(nnx.to_flat_state(nnx.state(model)))  # type: ignore[arg-type]


class Layout(NamedTuple):
    """A conversion between a foreign layout and ours, in both directions."""

    read: Callable[[np.ndarray], np.ndarray]  # foreign to ours
    write: Callable[[np.ndarray], np.ndarray]  # ours to foreign


class Entry(NamedTuple):
    """One array of a model and its counterpart in a foreign checkpoint."""

    path: Path
    key: str  # in the foreign checkpoint
    layout: Layout
    rows_per_class: int = 0  # along the first axis of the foreign array; 0 if it does not depend on the classes


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # [out, in] to [in, out]
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW to HWIO
DECONV = Layout(lambda x: x.transpose(0, 2, 3, 1), lambda x: x.transpose(0, 3, 1, 2))  # IOHW to IHWO
POINTWISE = Layout(lambda x: x[:, :, 0, 0], lambda x: x[:, :, None, None])  # [out, in, 1, 1] to [out, in]
CHANNELS = Layout(lambda x: x[:, 0, 0], lambda x: x[:, None, None])  # [K, 1, 1] to [K]


def flattened_maps(side: int) -> Layout:
    """Return the layout of a linear layer on flattened side x side maps: channels first there, last here."""

    def read(x):  # [out, K * side * side] to [side * side * K, out]
        return x.reshape(len(x), -1, side, side).transpose(2, 3, 1, 0).reshape(-1, len(x))

    def write(x):
        return x.reshape(side, side, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(x.shape[1], -1)

    return Layout(read, write)


def then(first: Layout, second: Layout) -> Layout:
    """Compose two layouts: reading applies ``first`` to the foreign array and ``second`` to the result."""
    return Layout(lambda x: second.read(first.read(x)), lambda x: first.write(second.write(x)))


def module_layout(path: Path, ndim: int, pool_size: int) -> Layout:
    """Return the layout that an array of MaskRCNN has in PyTorch's modules.

    Args:
        path: Path of the array.
        ndim: Its number of axes.
        pool_size: Side of the maps that the first fully connected layer flattens.
    """
    if path == ("mask_head", "deconv", "kernel"):
        return DECONV
    if path[-1] == "layer_scale":
        return CHANNELS
    if path == ("mask_head", "logits_kernel"):
        return POINTWISE
    if path == ("box_head", "fcs", 0, "kernel"):
        return flattened_maps(pool_size)
    return {4: CONV, 2: LINEAR}.get(ndim, SAME)


# Our names of a module's arrays -> PyTorch's.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "num_batches": "num_batches_tracked",
    "layer_scale": "layer_scale",
}


def module_and_leaf(path: Path) -> tuple[list[str | int], str]:
    """Return the path of the module that an array belongs to, and PyTorch's name of the array."""
    *module, last = path
    leaf = str(last)
    if leaf in ("deconv_bias", "logits_kernel", "logits_bias"):  # we have no module for these
        name, leaf = leaf.split("_")
        module.append(name)
    return module, _LEAVES[leaf]
