"""Backbones by name."""

from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.mobilenet import MobileNetV3
from maskrcnn_jax.models.resnet import ARCHITECTURES, ResNet

MOBILENET = "mobilenet_v3_large"


def make_backbone(name: str, *, resnet_options: dict, **options) -> nnx.Module:
    """Build a backbone.

    Args:
      name: one of ResNet's ARCHITECTURES, or MOBILENET.
      resnet_options: of ResNet alone.
      options: of all.

    Raises:
      UserError: for an unknown name.
    """
    if name == MOBILENET:
        return MobileNetV3(**options)
    if name in ARCHITECTURES:
        return ResNet(name, **resnet_options, **options)
    raise UserError(f"backbone is {name!r}; use one of {', '.join((*ARCHITECTURES, MOBILENET))}")
