"""Named and custom backbones, and the forms of their outputs."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.convnext import ARCHITECTURES as CONVNEXTS
from maskrcnn_jax.models.convnext import ConvNeXt
from maskrcnn_jax.models.mobilenet import MobileNetV3
from maskrcnn_jax.models.resnet import ARCHITECTURES, ResNet
from maskrcnn_jax.options import ModelOptions

MOBILENET = "mobilenet_v3_large"
MAX_MAPS = 4


@runtime_checkable
class Backbone(Protocol):
    """A module that :func:`check_backbone` accepts."""

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of the maps, finest first."""
        ...

    def __call__(self, images: Float[Array, "B H W I"], /) -> object:
        """Return what :func:`feature_list` understands."""
        ...


def make_backbone(options: ModelOptions, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Backbone:
    """Build the backbone that the options name, by calling a function of the user's if they name one.

    Args:
        options: Of the network.
        dtype: Compute dtype.
        rngs: For the initial values.

    Raises:
        UserError: if there is no backbone of this name, or what the function returns is no backbone.
    """
    name = options.backbone
    if ":" in name:
        return check_backbone(_named_function(name)(options, dtype=dtype, rngs=rngs))
    common: dict[str, Any] = {"in_channels": options.in_channels, "remat": options.remat, "dtype": dtype, "rngs": rngs}
    if name in CONVNEXTS:
        return ConvNeXt(name, **common)
    if name == MOBILENET:
        return MobileNetV3(norm=options.norm, **common)
    if name in ARCHITECTURES:
        return ResNet(
            name,
            stem_channels=options.stem_channels,
            stage_channels=options.stage_channels,
            bottleneck_channels=options.bottleneck_channels,
            norm=options.norm,
            norm_eps=options.norm_eps,
            stride_in_1x1=options.stride_in_1x1,
            **common,
        )
    names = ", ".join((*ARCHITECTURES, MOBILENET, *CONVNEXTS))
    raise UserError(f"model.backbone is {name!r}; use one of {names}, or a function of yours as module:function")


def _named_function(name: str) -> Callable[..., object]:
    """Import the function that ``name`` means, as module:function."""
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise UserError(f"model.backbone is {name!r}; name a function as module:function, such as my_networks:swin")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"model.backbone is {name!r}, and {module_name} cannot be imported: {error}; install it, or put its "
            "folder into PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"model.backbone is {name!r}, but {module_name} has no function {function_name}; add it")
    return function


def check_backbone(backbone: object) -> Backbone:
    """Return a backbone of the user's own if a feature pyramid can be built on it.

    Args:
        backbone: A module that returns what :func:`feature_list` understands. Its ``out_channels`` are a tuple of 1 to
            4 numbers, the channels of its maps, finest first.

    Raises:
        UserError: if it is no module or has no such ``out_channels``.
    """
    if not isinstance(backbone, nnx.Module):
        raise UserError(f"the backbone is of type {type(backbone).__name__}; give an nnx.Module")
    channels: Any = getattr(backbone, "out_channels", None)
    whole = isinstance(channels, tuple) and all(isinstance(k, int) and k > 0 for k in channels)
    if not (whole and 1 <= len(channels) <= MAX_MAPS):
        raise UserError(
            f"out_channels of the backbone {type(backbone).__name__} is {channels!r}; make it a tuple with the "
            f"channels of its 1 to {MAX_MAPS} maps, finest first"
        )
    return backbone  # type: ignore[return-value]  # out_channels is checked above


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
