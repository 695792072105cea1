"""Every stage fed with torchvision's own intermediate result, so that an error shows where it starts."""

import jax
import numpy as np
import torch
from flax import nnx
from tqdm import tqdm

from maskrcnn_jax.data.transforms import resize_image
from maskrcnn_jax.models.layers import max_pool
from maskrcnn_jax.models.mask_rcnn import BOX_POOL_SIZE, MASK_POOL_SIZE, MaskRCNN
from maskrcnn_jax.structures import Proposals
from tools.comparison.comparison_page import Comparison
from tools.comparison.pair import Pair, channels_last, our_images, pad, to_torch

SECTION = "stages, each fed with torchvision's intermediate result"
SAME_BOX = 0.05  # pixels between a proposal and its counterpart
# Proposals may change sides of a threshold of overlap by rounding.
PROPOSALS_MOVED = {"float64": 0.0, "float32": 0.005}


@torch.no_grad()
def compare_stages(result: Comparison, pair: Pair, batches: list[list[np.ndarray]]) -> None:
    """Feed every stage with torchvision's own intermediate result; then compare layer by layer from the image on."""
    stages = _Stages(result, pair)
    for batch in tqdm(batches, desc="stages", unit="batch", leave=False):
        stages.compare(batch)


class _Stages:
    """The compiled stages of our model, beside torchvision's."""

    def __init__(self, result: Comparison, pair: Pair):
        self._result, self._pair, self._reference = result, pair, pair.reference.eval()
        self._normalize = pair.compiled(MaskRCNN.normalize)
        self._backbone = pair.compiled(lambda m, x: m.backbone(x))
        self._fpn = pair.compiled(lambda m, x: m.fpn(x))
        self._rpn = pair.compiled(lambda m, x: m.rpn(x))
        self._propose = pair.compiled(
            lambda m, o, d, x, images, sizes: m.propose(o, d, m.anchors(x, images.shape[1:3]), sizes, train=False)
        )
        self._pools = {
            size: pair.compiled(lambda m, x, boxes, images, size=size: m.pool(x, boxes, images.shape[1:3], size))
            for size in (BOX_POOL_SIZE, MASK_POOL_SIZE)
        }
        self._box_head = pair.compiled(lambda m, pooled: m.box_head(pooled))
        self._select = pair.compiled(lambda m, *outputs: m.select(*outputs))
        self._mask_head = pair.compiled(lambda m, pooled, labels: m.mask_head(pooled, labels))
        self._layers = pair.compiled(_layers)

    def compare(self, batch: list[np.ndarray]) -> None:
        """Compare all stages on a batch of images."""
        image_list, _ = self._reference.transform(to_torch(batch, self._pair.dtype))
        images, sizes = our_images(image_list)
        self._compare_inputs(batch, images, sizes, image_list)
        with _LayerOutputs(self._reference) as captured:
            body = self._reference.backbone.body(image_list.tensors)
        pyramid = self._reference.backbone.fpn(body)
        levels = [channels_last(level) for level in pyramid.values()]
        self._compare_features(image_list, body, levels)
        scores, proposals = self._compare_proposals(images, sizes, image_list, pyramid, levels)
        boxes, labels = self._compare_boxes(images, sizes, image_list, pyramid, levels, proposals)
        self._compare_masks(images, image_list, pyramid, levels, boxes, labels)
        wanted = [*map(channels_last, captured), *levels, *scores]
        for (name, ours), theirs in zip(self._layers(images, sizes).items(), wanted, strict=True):
            self._result.add("layers, from the image on", name, ours, theirs, self._pair.tolerances.stage)

    def _add(self, name: str, ours, wanted, tolerance: float | None = None, **how) -> None:
        tolerance = self._pair.tolerances.stage if tolerance is None else tolerance
        self._result.add(SECTION, name, ours, wanted, tolerance, **how)

    def _compare_inputs(self, batch, images, sizes, image_list) -> None:
        self._add("normalised image", self._normalize(images, sizes), channels_last(image_list.tensors))
        resized = [resize_image(image, tuple(size), "float32") for image, size in zip(batch, sizes, strict=True)]
        for i, (height, width) in enumerate(sizes):
            # OpenCV interpolates with weights of its own precision.
            self._add("resized image, grey levels", resized[i], images[i, :height, :width], 0.05, absolute=True)

    def _compare_features(self, image_list, body, levels) -> None:
        maps = [channels_last(level) for level in body.values()]
        ours = self._backbone(channels_last(image_list.tensors))
        for level, (found, wanted) in enumerate(zip(ours, maps, strict=True)):
            self._add(f"backbone C{level + 2}", found, wanted)
        for level, (found, wanted) in enumerate(zip(self._fpn(maps), levels, strict=True)):
            self._add(f"FPN P{level + 2}", found, wanted)

    def _compare_proposals(self, images, sizes, image_list, pyramid, levels) -> tuple[list, list]:
        """Compare the RPN, anchors and proposals; returns torchvision's objectness of each level, and proposals."""
        rpn = self._reference.rpn
        objectness, deltas = rpn.head(list(pyramid.values()))
        scores = [channels_last(level).reshape(len(images), -1) for level in objectness]
        offsets = [channels_last(level).reshape(len(images), -1, 4) for level in deltas]
        for name, ours, theirs in zip(("objectness", "offsets"), self._rpn(levels), (scores, offsets), strict=True):
            for level, (found, wanted) in enumerate(zip(ours, theirs, strict=True)):
                self._add(f"RPN {name} P{level + 2}", found, wanted)
        anchors = np.concatenate(self._pair.model.anchors(levels, images.shape[1:3]))
        self._add("anchors", anchors, rpn.anchor_generator(image_list, list(pyramid.values()))[0], 0.0)
        found = self._propose(scores, offsets, levels, images, sizes)
        proposals, _ = rpn(image_list, pyramid)
        for i, wanted in enumerate(proposals):
            compare_sets(self._result, SECTION, found.boxes[i][found.valid[i]], wanted.numpy(), self._pair)
        return scores, proposals

    def _compare_boxes(self, images, sizes, image_list, pyramid, levels, proposals) -> tuple[list, list]:
        """Compare box pooling, box head and selection; returns torchvision's boxes and labels of each image."""
        heads = self._reference.roi_heads
        boxes, valid = _pad_boxes(proposals)
        pooled = heads.box_roi_pool(pyramid, proposals, image_list.image_sizes)
        ours = self._pools[BOX_POOL_SIZE](levels[:4], boxes, images)
        self._add("RoIAlign 7x7", ours[valid], channels_last(pooled))
        logits, offsets = heads.box_predictor(heads.box_head(pooled))
        ours = self._box_head(channels_last(pooled))
        self._add("class logits", ours[0], logits)
        self._add("box offsets", ours[1].reshape(len(logits), -1), offsets)

        per_image, count = [len(p) for p in proposals], boxes.shape[1]
        wanted = heads.postprocess_detections(logits, offsets, proposals, image_list.image_sizes)
        found = self._select(
            pad([part.numpy() for part in logits.split(per_image)], count),
            pad([part.reshape(len(part), -1, 4).numpy() for part in offsets.split(per_image)], count),
            Proposals(boxes, np.zeros(valid.shape, boxes.dtype), valid),
            sizes,
        )
        for i in range(len(images)):
            kept = found[3][i]
            self._add("detections: number", kept.sum(), len(wanted[0][i]), 0.0)
            if kept.sum() == len(wanted[0][i]):
                self._add("detections: boxes", found[0][i][kept], wanted[0][i])
                self._add("detections: scores", found[1][i][kept], wanted[1][i])
                self._add("detections: labels", found[2][i][kept], wanted[2][i], 0.0)
        return wanted[0], wanted[2]

    def _compare_masks(self, images, image_list, pyramid, levels, detected, labels) -> None:
        heads = self._reference.roi_heads
        pooled = heads.mask_roi_pool(pyramid, detected, image_list.image_sizes)
        boxes, valid = _pad_boxes(detected)
        ours = self._pools[MASK_POOL_SIZE](levels[:4], boxes, images)
        self._add("RoIAlign 14x14", ours[valid], channels_last(pooled))
        logits, labels = heads.mask_predictor(heads.mask_head(pooled)), torch.cat(labels)
        ours = self._mask_head(channels_last(pooled), labels.numpy().astype(np.int32))
        self._add("mask logits", ours, logits[torch.arange(len(labels)), labels])


def _pad_boxes(boxes: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes of all images as one array [B, N, 4], and which of its rows are valid [B, N]."""
    count = max(map(len, boxes))
    return pad([b.numpy() for b in boxes], count), pad([np.ones(len(b), bool) for b in boxes], count)


class _LayerOutputs:
    """Collects the outputs of torchvision's stem and of every residual block while it is open."""

    def __init__(self, reference: torch.nn.Module):
        body = reference.backbone.body
        self._modules = [body.maxpool, *(block for i in range(4) for block in body[f"layer{i + 1}"])]

    def __enter__(self) -> list[torch.Tensor]:
        outputs = []
        self._hooks = [
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for module in self._modules
        ]
        return outputs

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def _layers(model: MaskRCNN, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
    """Return what leaves every layer up to the RPN."""
    x = max_pool(nnx.relu(model.backbone.stem(model.normalize(images, sizes))))
    outputs, maps = {"0 stem": x}, []
    for i, stage in enumerate(model.backbone.stages):
        for j, block in enumerate(stage):
            x = block(x)
            outputs[f"C{i + 2} block {j}"] = x
        maps.append(x)
    levels = model.fpn(maps)
    for i, (level, objectness) in enumerate(zip(levels, model.rpn(levels)[0], strict=True)):
        outputs[f"P{i + 2}"] = level
        outputs[f"RPN objectness P{i + 2}"] = objectness
    # jit sorts the keys of a dictionary: number them in the order of the network.
    ordered = [name for name in outputs if "RPN" not in name] + [name for name in outputs if "RPN" in name]
    return {f"{i:02} {name.removeprefix('0 ')}": outputs[name] for i, name in enumerate(ordered)}


def compare_sets(result: Comparison, section: str, ours: np.ndarray, wanted: np.ndarray, pair: Pair) -> None:
    """Compare boxes in any order: which have no counterpart within 0.05 pixels, and how far the others are."""
    distance = np.abs(ours[:, None] - wanted[None]).max(axis=2)  # [N, M]
    nearest = np.concatenate([distance.min(axis=0), distance.min(axis=1)])
    moved = nearest > SAME_BOX
    result.add(
        section, "proposals: share without counterpart", moved.mean(), 0.0, PROPOSALS_MOVED[pair.dtype], absolute=True
    )
    scale, distance_left = np.abs(wanted).max(), nearest[~moved].max(initial=0)
    result.add(section, "proposals: distance of the others", distance_left / scale, 0.0, pair.tolerances.stage)
