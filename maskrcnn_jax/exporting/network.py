"""The parts of the network that have parameters, as ONNX: backbone, pyramid and heads, walked module by module.

Norms with fixed statistics are folded into the convolution before them. Everything is float32 and NCHW.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.exporting.graph import Value
from maskrcnn_jax.models.box_head import BoxHead
from maskrcnn_jax.models.convnext import NORM_EPS, ConvNeXt, Downsample, LayerNorm, PatchConv
from maskrcnn_jax.models.convnext import Block as ConvNeXtBlock
from maskrcnn_jax.models.fpn import FPN
from maskrcnn_jax.models.layers import NUM_GROUPS, BatchNorm, Conv, ConvNorm, FrozenBatchNorm, GroupNorm, Linear
from maskrcnn_jax.models.mask_head import MaskHead
from maskrcnn_jax.models.mobilenet import ConvNormActivation, MobileNetV3, SqueezeExcitation
from maskrcnn_jax.models.resnet import Block, ResNet
from maskrcnn_jax.models.rpn import RPNHead

OUTPUT_LAYER = "output_"  # begins the names of operators that give scores and offsets


def array(parameter: Any) -> np.ndarray:
    """Return a parameter as float32, also one in a wider or narrower dtype."""
    return np.asarray(parameter[...], np.float32)


def relu(x: Value) -> Value:
    """Return the positive part."""
    return x.graph.op("Relu", x)


def sigmoid(x: Value) -> Value:
    """Return the logistic function."""
    return x.graph.op("Sigmoid", x)


def conv(
    x: Value, kernel: np.ndarray, bias: np.ndarray, *, stride: int = 1, padding: int | None = None, groups: int = 1
) -> Value:
    """Convolve.

    Args:
        x: [N, K, H, W].
        kernel: [S, S, K / groups, C].
        bias: [C].
        stride: of both axes.
        padding: zeros on each side; (S - 1) / 2 if not given.
        groups: of channels.
    """
    size = len(kernel)
    padding = (size - 1) // 2 if padding is None else padding
    return x.graph.op(
        "Conv",
        *(x, kernel.transpose(3, 2, 0, 1), bias),
        kernel_shape=[size, size],
        strides=[stride, stride],
        pads=[padding] * 4,
        group=groups,
    )


def conv_norm(layer: ConvNorm | Conv, x: Value) -> Value:
    """Convolve and normalise."""
    convolution, norm = (layer.conv, layer.norm) if isinstance(layer, ConvNorm) else (layer, None)
    kernel = array(convolution.kernel)
    bias = np.zeros(kernel.shape[-1], np.float32) if convolution.bias is None else array(convolution.bias)
    if isinstance(norm, BatchNorm | FrozenBatchNorm):
        # In float64: the products are rounded once.
        mean, var, scale, offset = (array(p).astype(np.float64) for p in (norm.mean, norm.var, norm.scale, norm.bias))
        factor = scale / np.sqrt(var + norm.eps)
        kernel, bias = (kernel * factor).astype(np.float32), ((bias - mean) * factor + offset).astype(np.float32)
    x = conv(x, kernel, bias, stride=convolution.stride, groups=kernel.shape[-1] if convolution.depthwise else 1)
    return group_norm(norm, x) if isinstance(norm, GroupNorm) else x


def group_norm(norm: GroupNorm, x: Value) -> Value:
    """Normalise groups of channels, each as a channel of an instance norm."""
    graph = x.graph
    scale, bias = array(norm.scale), array(norm.bias)
    ones, zeros = np.ones(NUM_GROUPS, np.float32), np.zeros(NUM_GROUPS, np.float32)
    groups = np.array([NUM_GROUPS, len(scale) // NUM_GROUPS])
    # No -1 in the shape: there may be no RoI.
    shape = graph.concat([graph.length(x, 0), groups, graph.op("Shape", x, start=2)], 0)
    grouped = graph.op("InstanceNormalization", graph.op("Reshape", x, shape), ones, zeros, epsilon=norm.eps)
    x = graph.op("Reshape", grouped, graph.op("Shape", x))
    return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


# Backbones


def backbone(network: Any, x: Value) -> list[Value]:
    """Return the maps of a backbone, finest first.

    Raises:
        UserError: for a backbone of the user's own.
    """
    for kind, stem, layer in _BACKBONES:
        if isinstance(network, kind):
            stages: Any = network.stages  # type: ignore[attr-defined]  # all of these have them
            x, maps = stem(network, x), []
            for stage in stages:
                for block in stage:
                    x = layer(block, x)
                maps.append(x)
            return maps
    raise UserError(
        f"a backbone of your own, {type(network).__name__}, cannot be exported as ONNX; export it as StableHLO, into "
        "a file that ends in .mrcnn"
    )


def _resnet_stem(network: ResNet, x: Value) -> Value:
    x = relu(conv_norm(network.stem, x))
    return x.graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)


def _resnet_block(block: Block, x: Value) -> Value:
    identity = x if block.shortcut is None else conv_norm(block.shortcut, x)
    for i, convolution in enumerate(block.convs):
        x = conv_norm(convolution, x if i == 0 else relu(x))
    return relu(x + identity)


def _mobilenet_stem(network: MobileNetV3, x: Value) -> Value:
    for layer in network.stem:
        x = _mobilenet_layer(layer, x)
    return x


def _mobilenet_layer(layer: Any, x: Value) -> Value:
    if isinstance(layer, ConvNormActivation):
        y = conv_norm(layer, x)
        return x.graph.op("HardSwish", y) if layer.activation is jax.nn.hard_swish else relu(y)
    y = x if layer.expand is None else _mobilenet_layer(layer.expand, x)
    y = _mobilenet_layer(layer.depthwise, y)
    y = y if layer.squeeze is None else _squeeze(layer.squeeze, y)
    y = conv_norm(layer.project, y)
    return x + y if layer.has_shortcut else y


def _squeeze(layer: SqueezeExcitation, x: Value) -> Value:
    means = x.graph.op("GlobalAveragePool", x)
    scale = conv_norm(layer.fc2, relu(conv_norm(layer.fc1, means)))
    return x * x.graph.op("HardSigmoid", scale, alpha=1 / 6, beta=0.5)


def _convnext_stem(network: ConvNeXt, x: Value) -> Value:
    return _layer_norm(network.stem.norm, _patches(network.stem.conv, x))


def _convnext_layer(layer: Downsample | ConvNeXtBlock, x: Value) -> Value:
    if isinstance(layer, Downsample):
        return _patches(layer.conv, _layer_norm(layer.norm, x))
    graph, scale = x.graph, array(layer.layer_scale)
    y = graph.transpose(conv_norm(layer.depthwise, x), 0, 2, 3, 1)
    y = _layer_norm_last(layer.norm, y)
    y = graph.op("MatMul", y, array(layer.expand.kernel)) + array(layer.expand.bias)
    y = y * 0.5 * (graph.op("Erf", y / float(np.sqrt(2))) + 1.0)  # GELU, in the form that runtimes recognise
    y = graph.op("MatMul", y, array(layer.project.kernel) * scale) + array(layer.project.bias) * scale
    return x + graph.transpose(y, 0, 3, 1, 2)


def _patches(layer: PatchConv, x: Value) -> Value:
    kernel = array(layer.kernel)
    return conv(x, kernel, array(layer.bias), stride=len(kernel), padding=0)


def _layer_norm(layer: LayerNorm, x: Value) -> Value:
    graph = x.graph
    return graph.transpose(_layer_norm_last(layer, graph.transpose(x, 0, 2, 3, 1)), 0, 3, 1, 2)


def _layer_norm_last(layer: LayerNorm, x: Value) -> Value:
    return x.graph.op("LayerNormalization", x, array(layer.scale), array(layer.bias), axis=-1, epsilon=NORM_EPS)


_BACKBONES: tuple[tuple[type, Callable, Callable], ...] = (
    (ResNet, _resnet_stem, _resnet_block),
    (MobileNetV3, _mobilenet_stem, _mobilenet_layer),
    (ConvNeXt, _convnext_stem, _convnext_layer),
)


# Pyramid and heads


def pyramid(fpn: FPN, maps: list[Value]) -> list[Value]:
    """Return the levels of the pyramid, finest first; sides of images are multiples of 32, so that maps double."""
    graph = maps[0].graph
    merged = conv_norm(fpn.inner[-1], maps[-1])
    levels = [conv_norm(fpn.layer[-1], merged)]
    for lateral, layer, x in reversed(list(zip(fpn.inner, fpn.layer, maps, strict=True))[:-1]):
        doubled = graph.op(
            "Resize",
            *(merged, np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        merged = conv_norm(lateral, x) + doubled
        levels.insert(0, conv_norm(layer, merged))
    return [*levels, graph.op("MaxPool", levels[-1], kernel_shape=[1, 1], strides=[2, 2])]


def rpn_outputs(head: RPNHead, level: Value) -> Value:
    """Return [B, h, w, 5 * A]: A objectness logits of each cell, then A offsets of four numbers."""
    x = level
    for convolution in head.convs:
        x = relu(conv_norm(convolution, x))
    layers = head.cls_logits, head.bbox_pred
    kernel, bias = (
        np.concatenate([array(getattr(layer, name)) for layer in layers], axis=-1) for name in ("kernel", "bias")
    )
    with x.graph.named(OUTPUT_LAYER):
        outputs = conv(x, kernel, bias)
    return x.graph.transpose(outputs, 0, 2, 3, 1)


def box_outputs(head: BoxHead, pooled: Value) -> tuple[Value, Value]:
    """Return class logits [R, C + 1] and offsets [R, 4 * (C + 1)], or [R, 4], of pooled features [R, K, 7, 7]."""
    x = pooled
    for convolution in head.convs:
        x = relu(conv_norm(convolution, x))
    x = x.graph.op("Flatten", x)
    layers, side = [*head.fcs, head.cls_score, head.bbox_pred], 7
    # The layers that read the pooled cells expect channels last.
    channels = array(layers[0].kernel).shape[0] // side**2

    def linear(layer: Linear, x: Value, channels_first: bool) -> Value:
        kernel = array(layer.kernel)
        if channels_first:
            kernel = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(len(kernel), -1)
        return x.graph.op("Gemm", x, kernel, array(layer.bias))

    for i, layer in enumerate(head.fcs):
        x = relu(linear(layer, x, channels_first=i == 0))
    first = not head.fcs
    with x.graph.named(OUTPUT_LAYER):
        return linear(head.cls_score, x, first), linear(head.bbox_pred, x, first)


def mask_logits(head: MaskHead, pooled: Value, labels: Value) -> Value:
    """Return the mask logits [R, M, M] of pooled features [R, K, 14, 14], each for its label [R] only."""
    graph, x = pooled.graph, pooled
    for convolution in head.convs:
        x = relu(conv_norm(convolution, x))
    # Channels last, as runtimes keep them, so that what follows is products without copies.
    x, side = graph.transpose(x, 0, 2, 3, 1), 14
    if head.has_deconv:
        kernel = array(head.deconv.kernel)  # [K, 2, 2, K2]; each cell gives a 2x2 block of its own
        x = graph.op("MatMul", graph.reshape(x, -1, len(kernel)), kernel.reshape(len(kernel), -1))
        x = graph.reshape(relu(x + np.tile(array(head.deconv_bias), 4)), -1, 4 * side * side, kernel.shape[-1])
    else:
        x = graph.reshape(x, -1, side * side, array(head.logits_kernel).shape[1])
    filters = graph.unsqueeze(graph.op("Gather", array(head.logits_kernel), labels), 2)  # [R, K2, 1]
    bias = graph.unsqueeze(graph.op("Gather", array(head.logits_bias), labels), 1, 2)
    logits = graph.op("MatMul", x, filters)
    if head.has_deconv:
        blocks = graph.transpose(graph.reshape(logits, -1, side, side, 2, 2), 0, 1, 3, 2, 4)
        return graph.reshape(blocks, -1, 2 * side, 2 * side) + bias
    return graph.reshape(logits, -1, side, side) + bias
