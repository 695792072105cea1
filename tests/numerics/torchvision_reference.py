"""Import torchvision as a reference, also where its compiled operators do not load.

A torchvision wheel that was built for CUDA fails to import beside a CPU-only torch ("operator torchvision::nms does
not exist"). Then the missing operators are declared, and the two that Mask R-CNN needs get bodies in plain torch,
transcribed from torchvision's CPU kernels. On a normal install nothing is replaced.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from torch.library import Library

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


def greedy_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return the indices that greedy suppression keeps, best first; as nms_kernel.cpp."""
    order = torch.sort(scores, stable=True, descending=True).indices
    boxes = boxes[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if alive[i]:
            rest = boxes[i + 1 :]
            sides = (torch.minimum(boxes[i, 2:], rest[:, 2:]) - torch.maximum(boxes[i, :2], rest[:, :2])).clamp(min=0)
            intersection = sides[:, 0] * sides[:, 1]
            alive[i + 1 :] &= ~(intersection / (areas[i] + areas[i + 1 :] - intersection) > iou_threshold)
    return order[alive]


def roi_align(features, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    """Pool rois [K, 5] from features [N, C, H, W] one by one; as roi_align_kernel.cpp, differentiable."""
    pooled = []
    for roi in rois:
        x1, y1, x2, y2 = roi[1:] * spatial_scale - (0.5 if aligned else 0.0)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = width.clamp(min=1.0), height.clamp(min=1.0)
        rows = _axis(y1, height, pooled_height, sampling_ratio, features.shape[2])
        columns = _axis(x1, width, pooled_width, sampling_ratio, features.shape[3])
        image = features[int(roi[0])]
        total = 0
        for y_index, y_weight in rows[:2]:
            for x_index, x_weight in columns[:2]:
                total = total + image[:, y_index][:, :, x_index] * (y_weight[:, None] * x_weight[None])
        bins = total.reshape(-1, pooled_height, rows[2], pooled_width, columns[2]).sum((2, 4))
        pooled.append(bins / max(rows[2] * columns[2], 1))
    if not pooled:
        return features.new_zeros((0, features.shape[1], pooled_height, pooled_width))
    return torch.stack(pooled).to(features.dtype)


def _axis(start, length, num_bins, sampling_ratio, size):
    """Return (low cells, weights), (high cells, weights) of all samples along one axis, and samples per bin."""
    bin_size = length / num_bins
    count = sampling_ratio if sampling_ratio > 0 else int(torch.ceil(bin_size))
    bins = torch.arange(num_bins, dtype=start.dtype)[:, None]
    samples = torch.arange(count, dtype=start.dtype)[None]
    points = (start + bins * bin_size + (samples + 0.5) * bin_size / count).reshape(-1)
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
