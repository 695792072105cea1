"""Named and custom backbones, and the forms of their outputs."""

from collections.abc import Mapping

import jax
from flax import nnx
from jaxtyping import Array, Float

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mobilenet import MobileNetV3
from maskrcnn_jax.models.resnet import ARCHITECTURES, ResNet

MOBILENET = "mobilenet_v3_large"
MAX_MAPS = 4


def make_backbone(backbone: object, *, resnet_options: dict, **options) -> nnx.Module:
    """Build a named backbone, or check a custom one.

    Args:
        backbone: one of ResNet's ARCHITECTURES, MOBILENET, or a module that :func:`feature_list` understands and whose
            ``out_channels`` are a tuple of 1 to 4 numbers, the channels of its maps, finest first.
        resnet_options: options of ResNet only.
        options: options of all named backbones.

    Raises:
        UserError: for an unknown name, or a module without such ``out_channels``.
    """
    names = ", ".join((*ARCHITECTURES, MOBILENET))
    if isinstance(backbone, nnx.Module):
        channels = getattr(backbone, "out_channels", None)
        counts = channels if isinstance(channels, tuple) else ()
        if not 1 <= len(counts) <= MAX_MAPS or not all(isinstance(k, int) and k > 0 for k in counts):
            raise UserError(
                f"out_channels of the backbone {type(backbone).__name__} is {channels!r}; make it a tuple with the "
                f"channels of its 1 to {MAX_MAPS} maps, finest first"
            )
        return backbone
    if not isinstance(backbone, str):
        raise UserError(f"backbone is of type {type(backbone).__name__}; give an nnx.Module or one of {names}")
    if backbone == MOBILENET:
        return MobileNetV3(**options)
    if backbone in ARCHITECTURES:
        return ResNet(backbone, **resnet_options, **options)
    raise UserError(f"backbone is {backbone!r}; use one of {names}")


def feature_list(
    features: object,
    out_channels: tuple[int, ...],
) -> list[Float[Array, "B _ _ _"]]:
    """Return the maps of a backbone as a list, finest first.

    Args:
        features: one map [B, H, W, K]; a list or tuple of maps, finest first; or a dict from "0", the finest, to "3",
            as in torchvision. Each map has half the height and width of the one before, rounded up.
        out_channels: of each map.

    Raises:
        UserError: for anything else.
    """
    if isinstance(features, Mapping):
        wanted = [str(i) for i in range(len(out_channels))]
        if set(features) != set(wanted):
            raise UserError(f"the backbone returned maps named {list(features)}; name them {wanted}, finest first")
        features = [features[name] for name in wanted]
    elif isinstance(features, jax.Array):
        features = [features]
    elif not isinstance(features, list | tuple):
        raise UserError(
            f"the backbone returned a {type(features).__name__}; return an array, a list, a tuple or a dict"
        )
    others = {type(feature).__name__ for feature in features if not isinstance(feature, jax.Array)}
    if others:
        raise UserError(f"the backbone returned maps of type {', '.join(sorted(others))}; return arrays")
    shapes = [feature.shape for feature in features]
    if [shape[3:] for shape in shapes] != [(channels,) for channels in out_channels]:
        raise UserError(
            f"the backbone returned maps of shapes {shapes}; with its out_channels {out_channels} they must be "
            f"{len(out_channels)} of shape [B, H, W, K], K being these"
        )
    for finer, coarser in zip(shapes[:-1], shapes[1:], strict=True):
        if coarser[1:3] != (-(-finer[1] // 2), -(-finer[2] // 2)):
            raise UserError(
                f"the backbone returned maps of shapes {shapes}; each must have half the height and width of the one "
                "before, rounded up"
            )
    return list(features)
