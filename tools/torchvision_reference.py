"""torchvision as a reference: imported also where its compiled operators do not load, and built to measure.

A torchvision wheel that was built for CUDA fails to import beside a CPU-only torch ("operator torchvision::nms does
not exist"). Then the missing operators are declared, and the two that Mask R-CNN needs get bodies in plain torch,
transcribed from torchvision's CPU kernels. On a normal install nothing is replaced.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.library import Library

from maskrcnn_jax.models.backbone import MOBILENET
from maskrcnn_jax.models.convnext import ARCHITECTURES as CONVNEXTS
from maskrcnn_jax.models.layers import NUM_GROUPS
from maskrcnn_jax.models.resnet import ARCHITECTURES
from maskrcnn_jax.options import ModelOptions

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width,"
    " int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, int pooled_width,"
    " int batch_size, int channels, int height, int width, int sampling_ratio, bool aligned) -> Tensor",
)
_libraries = []  # torch forgets the declarations of a library that is collected
torch_fallback = {}  # torchvision's own code in plain torch, for the test of the stand-ins


def compiled_operators_load() -> bool:
    """Return whether the installed torchvision brings operators that this torch can load."""
    spec = importlib.util.find_spec("torchvision")
    for path in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(str(path))
            return True
        except OSError:
            continue
    return False


def import_torchvision():
    """Return the torchvision module, with stand-ins for the compiled operators where they are missing."""
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    if compiled_operators_load():
        import torchvision

        torch_fallback["roi_align"] = sys.modules["torchvision.ops.roi_align"]._roi_align.__wrapped__
        return torchvision

    library = Library("torchvision", "DEF")
    _libraries.append(library)
    for schema in _SCHEMAS:
        library.define(schema)
    library.impl("nms", greedy_nms, "CompositeExplicitAutograd")
    import torchvision

    sys.modules["torchvision.ops.boxes"]._assert_has_ops = lambda: None
    # torchvision's own fallback clamps every sample to the map, where its kernels give 0 beyond [-1, size]; it also
    # needs a C++ compiler, and gigabytes for adaptive sampling.
    module = sys.modules["torchvision.ops.roi_align"]
    torch_fallback["roi_align"] = module._roi_align.__wrapped__  # without the compilation around it
    module._roi_align = roi_align
    return torchvision


def uses_stand_ins() -> bool:
    """Return whether operators of torchvision have bodies in plain torch."""
    return bool(_libraries)


@functools.cache  # torch takes one body only
def declare_roi_align() -> None:
    """Give the operator roi_align its body in plain torch too, so that torch's ONNX exporter finds it by name."""
    _libraries[0].impl("roi_align", roi_align, "CompositeExplicitAutograd")


def greedy_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return the indices that greedy suppression keeps, best first; as nms_kernel.cpp."""
    order = torch.sort(scores, stable=True, descending=True).indices
    # In numpy, whose calls on so few numbers cost a fraction of torch's: a slow reference would flatter our timings.
    boxes = boxes.detach()
    boxes = boxes.float() if boxes.dtype == torch.bfloat16 else boxes  # which numpy does not have
    x1, y1, x2, y2 = boxes[order].T.contiguous().numpy()
    areas = (x2 - x1) * (y2 - y1)
    alive = np.ones(len(areas), bool)
    with np.errstate(divide="ignore", invalid="ignore"):  # empty boxes
        for i in range(len(areas)):
            if alive[i]:
                width = np.minimum(x2[i], x2[i + 1 :]) - np.maximum(x1[i], x1[i + 1 :])
                height = np.minimum(y2[i], y2[i + 1 :]) - np.maximum(y1[i], y1[i + 1 :])
                intersection = np.maximum(width, 0) * np.maximum(height, 0)
                overlap = intersection / (areas[i] + areas[i + 1 :] - intersection)
                alive[i + 1 :] &= ~(overlap > np.float64(iou_threshold))  # in float64, as the kernel
    return order[torch.from_numpy(alive)]


ROI_CHUNK = 64  # RoIs pooled at once, which bounds the memory


def roi_align(features, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    """Pool rois [K, 5] from features [N, C, H, W]; as roi_align_kernel.cpp, differentiable."""
    if not len(rois):
        return features.new_zeros((0, features.shape[1], pooled_height, pooled_width))
    table = features.permute(0, 2, 3, 1).flatten(0, 2)  # [N * H * W, C]
    pooled = []
    # With adaptive sampling every RoI has a number of samples of its own.
    for chunk in rois.split(ROI_CHUNK if sampling_ratio > 0 else 1):
        x1, y1, x2, y2 = (chunk[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)).unbind(1)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = width.clamp(min=1.0), height.clamp(min=1.0)
        rows = _axis(y1, height, pooled_height, sampling_ratio, features.shape[2])
        columns = _axis(x1, width, pooled_width, sampling_ratio, features.shape[3])
        first = chunk[:, 0].long()[:, None, None] * (features.shape[2] * features.shape[3])
        total = 0
        for y_index, y_weight in rows[:2]:
            for x_index, x_weight in columns[:2]:
                index = first + y_index[:, :, None] * features.shape[3] + x_index[:, None]
                weight = (y_weight[:, :, None] * x_weight[:, None]).unsqueeze(-1)
                total = total + table.index_select(0, index.flatten()).reshape(*index.shape, -1) * weight
        bins = total.reshape(len(chunk), pooled_height, rows[2], pooled_width, columns[2], -1).sum((2, 4))
        pooled.append(bins / max(rows[2] * columns[2], 1))
    return torch.cat(pooled).permute(0, 3, 1, 2).to(features.dtype)


def _axis(start, length, num_bins, sampling_ratio, size):
    """Return (low cells [K, S], weights), (high cells, weights) of all samples along one axis, and samples per bin."""
    bin_size = length / num_bins
    count = sampling_ratio if sampling_ratio > 0 else int(torch.ceil(bin_size))
    bins = torch.arange(num_bins, dtype=start.dtype)[None, :, None]
    samples = torch.arange(count, dtype=start.dtype)
    start, bin_size = start[:, None, None], bin_size[:, None, None]
    points = (start + bins * bin_size + (samples + 0.5) * bin_size / count).flatten(1)
    inside = (points >= -1) & (points <= size)
    points = points.clamp(min=0)
    low = points.floor().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    high_weight = torch.where(low >= size - 1, 0, points - low)
    return (
        (low.long(), torch.where(inside, 1 - high_weight, 0)),
        (high.long(), torch.where(inside, high_weight, 0)),
        count,
    )


# Options that torchvision's MaskRCNN takes under the names that ours has.
_SAME_NAMES = (
    "rpn_pre_nms_top_n_train",
    "rpn_pre_nms_top_n_test",
    "rpn_post_nms_top_n_train",
    "rpn_post_nms_top_n_test",
    "rpn_nms_thresh",
    "rpn_fg_iou_thresh",
    "rpn_bg_iou_thresh",
    "rpn_batch_size_per_image",
    "rpn_positive_fraction",
    "box_score_thresh",
    "box_nms_thresh",
    "box_detections_per_img",
    "box_batch_size_per_image",
    "box_positive_fraction",
)


def build_reference(
    options: ModelOptions, num_classes: int, *, min_size: int = 800, max_size: int = 1333, dtype: str = "float32"
) -> torch.nn.Module:
    """Build torchvision's MaskRCNN with the options of ours.

    Args:
        options: of our model; widths may be smaller than torchvision's.
        num_classes: background included.
        min_size: of the shorter side after resizing, pixels.
        max_size: of the longer one.
        dtype: of the parameters.

    Returns:
        A model with torchvision's initial values, in training mode.
    """
    import_torchvision()
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.poolers import _setup_scales

    build = _build_convnext if options.backbone in CONVNEXTS else _build_resnet
    body, layers, channels = _build_mobilenet(options) if options.backbone == MOBILENET else build(options)
    fpn, mask = options.fpn_channels, options.mask_channels
    norm = _norm_layer(options.head_norm)
    backbone = BackboneWithFPN(
        body,
        {layer: str(i) for i, layer in enumerate(layers)},
        channels,
        fpn,
        norm_layer=norm,
    )
    anchors = AnchorGenerator(
        tuple(tuple(size * scale for scale in options.anchor_scales) for size in options.anchor_sizes),
        (tuple(options.aspect_ratios),) * 5,
    )
    convs, fcs = tuple(options.box_conv_channels), tuple(options.box_fc_channels)
    box_head = FastRCNNConvFCHead((fpn, 7, 7), convs, fcs, norm) if convs else TwoMLPHead(fpn * 49, fcs[0])
    names = ["0", "1", "2", "3"]
    model = MaskRCNN(
        backbone,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(fpn, anchors.num_anchors_per_location()[0], options.rpn_conv_depth),
        box_roi_pool=MultiScaleRoIAlign(names, 7, options.roi_sampling_ratio),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(fcs[-1], num_classes),
        box_fg_iou_thresh=options.box_fg_iou_thresh,
        box_bg_iou_thresh=options.box_fg_iou_thresh,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, options.roi_sampling_ratio),
        mask_head=MaskRCNNHeads(fpn, [mask] * 4, 1, norm),
        mask_predictor=MaskRCNNPredictor(mask, mask, num_classes),
        **{name: getattr(options, name) for name in _SAME_NAMES},
    )
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        # torchvision guesses them from the first batch it sees, wrongly where that is but a few cells high.
        levels = [torch.empty(1, 1, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32)]
        pool.scales, pool.map_levels = _setup_scales(levels, [(256, 256)], pool.canonical_scale, pool.canonical_level)
    return model.to(getattr(torch, dtype))


def load_reference(reference: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Load a state dict of numpy arrays, every one of which must have its place."""
    reference.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, strict=True)


def _norm_layer(kind: str) -> Callable[..., torch.nn.Module] | None:
    from torchvision.ops.misc import FrozenBatchNorm2d

    group = functools.partial(torch.nn.GroupNorm, NUM_GROUPS)
    return {"none": None, "batch": torch.nn.BatchNorm2d, "frozen": FrozenBatchNorm2d, "group": group}[kind]


def _build_mobilenet(options: ModelOptions) -> tuple[torch.nn.Module, list[str], list[int]]:
    """Build a MobileNetV3-Large; return it, the layers whose outputs the pyramid takes, and their channels."""
    from torchvision.models import mobilenet_v3_large
    from torchvision.ops.misc import FrozenBatchNorm2d

    trained = functools.partial(torch.nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    norm = trained if options.norm == "batch" else functools.partial(FrozenBatchNorm2d, eps=1e-3)
    return mobilenet_v3_large(norm_layer=norm).features, ["3", "6", "12", "16"], [24, 40, 112, 960]


def _build_convnext(options: ModelOptions) -> tuple[torch.nn.Module, list[str], list[int]]:
    """Build a ConvNeXt without stochastic depth, which ours lacks; return as for MobileNet."""
    import torchvision

    network = torchvision.models.get_model(options.backbone, stochastic_depth_prob=0.0)
    return network.features, ["1", "3", "5", "7"], list(CONVNEXTS[options.backbone][1])


def _build_resnet(options: ModelOptions) -> tuple[torch.nn.Module, list[str], list[int]]:
    """Build a ResNet whose stem, stages and bottlenecks are as wide as the options say; return as for MobileNet."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    layers, bottleneck = ARCHITECTURES[options.backbone]
    block = Bottleneck if bottleneck else BasicBlock
    first = (options.stage_channels or 64 * block.expansion) // block.expansion
    stem = options.stem_channels

    class Narrow(ResNet):
        def _make_layer(self, block, planes, blocks, **stride):
            if planes == 64:  # the first stage: torchvision's stem has 64 channels whatever follows
                self.conv1 = torch.nn.Conv2d(3, stem, 7, 2, 3, bias=False)
                self.bn1 = self._norm_layer(stem)
                self.inplanes = stem
            return super()._make_layer(block, planes * first // 64, blocks, **stride)

    resnet = Narrow(
        block,
        layers,
        width_per_group=64 * options.bottleneck_channels // first if bottleneck else 64,
        norm_layer=functools.partial(_norm_layer(options.norm), eps=options.norm_eps),
    )
    outer = first * block.expansion
    return resnet, [f"layer{i + 1}" for i in range(4)], [outer * 2**i for i in range(4)]


@torch.no_grad()
def randomise(model: torch.nn.Module, images: list[torch.Tensor], seed: int) -> None:
    """Give a model seeded random weights with which it finds objects of many classes in these images.

    Under an ordinary random initialisation all RoIs score alike and nothing passes the threshold, so that comparing
    detections would prove nothing. Here every layer's outputs get a mean and a spread of their own over the image,
    channel by channel: of norms through their statistics, of other layers through their weights and biases. It has to
    be every layer. If only the last ones drew the small differences between RoIs apart, the gradient would be huge and
    amplify rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    hooks = []
    blocks = [block for i in range(4) for block in model.backbone.body[f"layer{i + 1}"]]
    branch_ends = [block.bn3 if hasattr(block, "bn3") else block.bn2 for block in blocks]
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.ConvTranspose2d)):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
            if name == "backbone.body.conv1":
                # Smooth, as trained ones are: white noise would pass on the rounding of single pixels.
                module.weight.copy_(torch.nn.functional.avg_pool2d(module.weight, 3, 1, 1))
            if module.bias is not None:
                mean, spread = _SPREADS.get(name, (_ABOVE_ZERO, 1.0))
                # Not the same for all channels, so that mixing them up shows.
                spreads = spread * torch.empty_like(module.bias).uniform_(0.5, 1.5, generator=generator)
                means = mean + 0.2 * spread * torch.empty_like(module.bias).normal_(generator=generator)
                hooks.append(module.register_forward_hook(_OutputCalibration(means, spreads)))
        elif hasattr(module, "running_mean"):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(_ABOVE_ZERO, 0.2, generator=generator)
            if module in branch_ends:
                # As in trained networks; otherwise gradients grow from block to block.
                module.weight.mul_(0.2)
                module.bias.mul_(0.2)
            hooks.append(module.register_forward_pre_hook(_calibrate_norm))
    model.eval()(images)
    for hook in hooks:
        hook.remove()


# Mean of the inputs of ReLUs, in their standard deviations. Most are positive, so that few are so near zero that
# rounding decides on which side they are: a ReLU that flips changes the gradient by far more than the rounding itself.
_ABOVE_ZERO = 2.5
# Mean and standard deviation that the outputs of a predictor get: scores on both sides of the threshold, boxes that
# move by a part of their size, masks that fill most of their boxes.
_SPREADS = {
    "rpn.head.cls_logits": (-1.0, 2.0),
    "rpn.head.bbox_pred": (0.0, 0.3),
    "roi_heads.box_predictor.cls_score": (0.0, 1.5),
    "roi_heads.box_predictor.bbox_pred": (0.0, 0.5),
    "roi_heads.mask_predictor.mask_fcn_logits": (2.0, 1.0),
}


def _calibrate_norm(module, inputs):
    (x,) = inputs
    module.running_mean.copy_(x.mean((0, 2, 3)))
    module.running_var.copy_(x.var((0, 2, 3), correction=0))


class _OutputCalibration:
    """Changes a layer once, so that its outputs have the wanted mean and spread; the RPN's layers run once a level."""

    def __init__(self, means: torch.Tensor, spreads: torch.Tensor):
        self.means, self.spreads, self.done = means, spreads, False

    def __call__(self, module, inputs, output):
        if self.done:
            return output
        self.done = True
        axes = (0, 2, 3) if output.ndim == 4 else (0,)
        factor = self.spreads / output.std(axes, correction=0).clamp(min=1e-3)
        out_axis = 1 if isinstance(module, torch.nn.ConvTranspose2d) else 0
        shape = [1] * module.weight.ndim
        shape[out_axis] = -1
        module.weight.mul_(factor.reshape(shape))
        module.bias.copy_((module.bias - output.mean(axes)) * factor + self.means)
        return module(*inputs)
