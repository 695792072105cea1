"""Fills models with foreign arrays and exports them. Every array that does not fit is reported by name."""

import fnmatch
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.weights import detectron2, torchvision
from maskrcnn_jax.weights.layouts import Entry, flat_state

# Keys of checkpoints that no model needs: counters of frozen norms, the classifier of an ImageNet network, and
# constants that detectron2 computes itself (as we do).
IGNORED = (
    "*.num_batches_tracked",
    "fc.weight",
    "fc.bias",
    "classifier.[023].weight",
    "classifier.[023].bias",
    "pixel_mean",
    "pixel_std",
    "proposal_generator.anchor_generator.cell_anchors.*",
)
BACKBONES = {  # families of backbones without a detector -> two arrays that identify them
    "a ResNet, for the backbone": {"conv1.weight", "layer1.0.conv1.weight"},
    "a MobileNetV3, for the backbone": {"features.0.0.weight", "features.1.block.0.0.weight"},
    "a ConvNeXt, for the backbone": {"features.0.0.weight", "features.1.0.layer_scale"},
}
# The convolutions whose input is the image.
_STEMS = {("backbone", "stem", "conv", "kernel"), ("backbone", "stem", 0, "conv", "kernel")}


class Report(NamedTuple):
    """What was done with each array. Names are those of the file, in ``untouched`` those of the model."""

    family: str  # the kind of checkpoint that was recognised
    loaded: list[str]
    widened: list[str]  # loaded into the RGB channels; the other channels got the mean of these three
    reinitialised: list[str]  # in the file, but for other classes: the model keeps its initial values
    untouched: list[str]  # not in the file, which holds only a backbone: the model keeps its initial values
    ignored: list[str]

    def __str__(self) -> str:
        """Return a table."""
        rows = [
            ("loaded", self.loaded),
            ("more channels", self.widened),
            ("re-initialised", self.reinitialised),
            ("not in the file", self.untouched),
            ("ignored", self.ignored),
        ]
        lines = [f"weights of {self.family}"]
        for name, keys in rows:
            shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
            lines.append(f"  {name:15} {len(keys):4}  {shown if name != 'loaded' else ''}".rstrip())
        return "\n".join(lines)


def load_weights(
    model: MaskRCNN, arrays: dict[str, np.ndarray], *, source: str = "the file", partial: bool = False
) -> Report:
    """Fill a model with the arrays of a foreign checkpoint.

    Args:
        model: Changed in place, and only if everything fits.
        arrays: State dict of torchvision's Mask R-CNN (version 1, with old or new names, or version 2), of
            detectron2's, or of a ResNet (torchvision's or timm's), MobileNetV3 or ConvNeXt trained on ImageNet, which
            fills the backbone only.
        source: What errors call the arrays.
        partial: For fine-tuning: accept a backbone alone, another number of classes, and RGB weights for a model with
            more channels. The rest of the model, or the predictors of classes, boxes and masks, then keep their
            initial values, and the weights of each further channel are the mean of the three. Without it, these are
            errors.

    Returns:
        What was done with each array.

    Raises:
        UserError: Arrays are missing, unknown, of another shape or kind, or not finite; the message lists all of them.
    """
    family, arrays, entries = _recognise(model, arrays, source)
    if not partial and family in BACKBONES:
        raise UserError(f"{source} holds only a backbone, which detects nothing; train with it first")
    state = flat_state(model)
    known = {entry.key for entry in entries}
    ignored = [key for key in arrays if key not in known and _is_ignored(key)]
    more_classes = _more_classes(entries, arrays, state)
    widened = [
        entry.key
        for entry in entries
        if entry.path in _STEMS and model.options.in_channels > 3 and _num_inputs(arrays.get(entry.key)) == 3
    ]
    problems = [f"{key} is unknown" for key in arrays if key not in known and key not in ignored]
    for entry in entries:
        shape = state[entry.path].shape
        if entry.key in widened:
            shape = (*shape[:2], 3, shape[3])
        wanted = _foreign_shape(entry, shape)
        if partial and entry.rows_per_class:
            wanted = (wanted[0] + entry.rows_per_class * more_classes, *wanted[1:])
        problems += _problems_of(entry.key, arrays.get(entry.key), wanted, state[entry.path].dtype)
    if widened and not partial:
        problems.append(
            f"{widened[0]} is for 3 channels where model.in_channels is {model.options.in_channels}; train with it"
        )
    if problems:
        advice = "use the config that these weights belong to"
        if more_classes:
            advice = "they are for another number of classes: fine-tune them first, or " + advice
        listed = "\n  ".join(problems)
        raise UserError(f"{source}: {len(problems)} arrays do not fit the model; {advice}\n  {listed}")

    reinitialised = [entry for entry in entries if entry.rows_per_class and more_classes]
    filled = [entry for entry in entries if entry.key in arrays and entry not in reinitialised]
    for entry in filled:
        _fill(state[entry.path], entry.layout.read(arrays[entry.key]))
    touched = {entry.path for entry in (*filled, *reinitialised)}
    return Report(
        family,
        [entry.key for entry in filled if entry.key not in widened],
        widened,
        [entry.key for entry in reinitialised],
        ["/".join(map(str, path)) for path in state if path not in touched],
        ignored,
    )


def to_torchvision(model: MaskRCNN, *, backbone_only: bool = False) -> dict[str, np.ndarray]:
    """Return a model as a state dict of torchvision's MaskRCNN, the inverse of ``load_weights``.

    Args:
        model: The model to convert.
        backbone_only: Return the state dict of the backbone instead, with the names of torchvision's classifiers.
    """
    state = flat_state(model)
    arrays = {}
    for entry in torchvision.backbone_entries(model) if backbone_only else torchvision.entries(model):
        array = entry.layout.write(np.asarray(state[entry.path][...]))
        # torch counts batches in 64 bits.
        arrays[entry.key] = np.array(array, np.int64 if array.dtype == np.int32 else None, order="C")
    return arrays


def _fill(variable: nnx.Variable, array: np.ndarray) -> None:
    """Copy an array into a variable; a kernel that lacks input channels gets the mean of those it has."""
    if array.shape != variable.shape:
        mean = np.mean(array, axis=2, keepdims=True)  # [S, S, 1, O]
        array = np.concatenate([array, *[mean] * (variable.shape[2] - array.shape[2])], axis=2)
    # On CPUs jnp.asarray may share the memory of its argument, which its owner may change.
    variable[...] = jnp.array(array, variable.dtype, copy=True)


def _recognise(model, arrays, source) -> tuple[str, dict[str, np.ndarray], list[Entry]]:
    """Return the family of a checkpoint, its arrays under current names, and the entries that they fill."""
    if any(key.startswith("backbone.bottom_up.") for key in arrays):
        return "detectron2's Mask R-CNN", arrays, detectron2.entries(model)
    if any(key.startswith(torchvision.BACKBONE) for key in arrays):
        return "torchvision's Mask R-CNN", torchvision.modern_names(arrays), torchvision.entries(model)
    for family, known_by in BACKBONES.items():
        if known_by <= arrays.keys():
            return family, arrays, torchvision.backbone_entries(model)
    raise UserError(
        f"{source} holds no Mask R-CNN of torchvision or detectron2, no ResNet, MobileNetV3 or ConvNeXt (its arrays: "
        f"{', '.join(list(arrays)[:3]) or 'none'}); give one of these"
    )


def _more_classes(entries: list[Entry], arrays: dict[str, np.ndarray], state: dict) -> int:
    """Return how many classes the file has beyond the model's, by the size of the class scores."""
    for entry in entries:
        if entry.path == ("box_head", "cls_score", "bias") and entry.key in arrays and arrays[entry.key].ndim == 1:
            return len(arrays[entry.key]) - len(state[entry.path])
    return 0


def _problems_of(key: str, array: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> list[str]:
    """Return why an array of a file, or its absence, does not fit an array of the model."""
    if array is None:
        # Files of old versions of torch and of frozen norms lack the counters of batches.
        return [] if _is_ignored(key) else [f"{key} is missing"]
    if array.shape != shape:
        return [f"{key} has shape {array.shape} instead of {shape}"]
    if np.issubdtype(dtype, np.integer):
        if array.dtype.kind not in "iu":
            return [f"{key} has dtype {array.dtype} where whole numbers are needed"]
        limits = np.iinfo(dtype)
        fits = np.all((array >= limits.min) & (array <= limits.max))
        return [] if fits else [f"{key} holds numbers that do not fit {dtype}"]
    if array.dtype.kind != "f":
        return [f"{key} has dtype {array.dtype} where floats are needed"]
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(dtype)).all()
    return [] if finite else [f"{key} holds values that are not finite in {dtype}"]


def _num_inputs(array: np.ndarray | None) -> int:
    """Return the number of input channels of a foreign convolution, or 0 for any other array."""
    return array.shape[1] if array is not None and array.ndim == 4 else 0


def _is_ignored(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in IGNORED)


def _foreign_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    # A view of one number: only its shape matters.
    return entry.layout.write(np.broadcast_to(np.float32(0), shape)).shape
