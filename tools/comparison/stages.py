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

SAME_BOX = 0.05  # pixels between a proposal and its counterpart
# Proposals may change sides of a threshold of overlap by rounding.
PROPOSALS_MOVED = {"float64": 0.0, "float32": 0.005}


@torch.no_grad()
def compare_stages(result: Comparison, pair: Pair, batches: list[list[np.ndarray]]) -> None:
    """Feed every stage with torchvision's own intermediate result; then compare layer by layer from the image on."""
    reference, model, tolerance = pair.reference.eval(), pair.model, pair.tolerances.stage
    section = "stages, each fed with torchvision's intermediate result"
    normalize = pair.compiled(MaskRCNN.normalize)
    backbone = pair.compiled(lambda m, x: m.backbone(x))
    fpn = pair.compiled(lambda m, x: m.fpn(x))
    rpn = pair.compiled(lambda m, x: m.rpn(x))
    propose = pair.compiled(
        lambda m, o, d, x, images, sizes: m.propose(o, d, m.anchors(x, images.shape[1:3]), sizes, train=False)
    )
    pools = {
        size: pair.compiled(lambda m, x, boxes, images, size=size: m.pool(x, boxes, images.shape[1:3], size))
        for size in (BOX_POOL_SIZE, MASK_POOL_SIZE)
    }
    box_head = pair.compiled(lambda m, pooled: m.box_head(pooled))
    select = pair.compiled(lambda m, *outputs: m.select(*outputs))
    mask_head = pair.compiled(lambda m, pooled, labels: m.mask_head(pooled, labels))
    layers = pair.compiled(_layers)

    for batch in tqdm(batches, desc="stages", unit="batch", leave=False):
        image_list, _ = reference.transform(to_torch(batch, pair.dtype))
        images, sizes = our_images(image_list)
        result.add(section, "normalised image", normalize(images, sizes), channels_last(image_list.tensors), tolerance)
        resized = [resize_image(image, tuple(size), "float32") for image, size in zip(batch, sizes, strict=True)]
        for i, (height, width) in enumerate(sizes):
            # OpenCV interpolates with weights of its own precision.
            result.add(
                section, "resized image, grey levels", resized[i], images[i, :height, :width], 0.05, absolute=True
            )

        with _LayerOutputs(reference) as captured:
            body = reference.backbone.body(image_list.tensors)
        maps = [channels_last(level) for level in body.values()]
        for level, (ours, wanted) in enumerate(zip(backbone(channels_last(image_list.tensors)), maps, strict=True)):
            result.add(section, f"backbone C{level + 2}", ours, wanted, tolerance)
        pyramid = reference.backbone.fpn(body)
        levels = [channels_last(level) for level in pyramid.values()]
        for level, (ours, wanted) in enumerate(zip(fpn(maps), levels, strict=True)):
            result.add(section, f"FPN P{level + 2}", ours, wanted, tolerance)

        objectness, deltas = reference.rpn.head(list(pyramid.values()))
        scores = [channels_last(level).reshape(len(batch), -1) for level in objectness]
        offsets = [channels_last(level).reshape(len(batch), -1, 4) for level in deltas]
        for level, (ours, wanted) in enumerate(zip(rpn(levels)[0], scores, strict=True)):
            result.add(section, f"RPN objectness P{level + 2}", ours, wanted, tolerance)
        for level, (ours, wanted) in enumerate(zip(rpn(levels)[1], offsets, strict=True)):
            result.add(section, f"RPN offsets P{level + 2}", ours, wanted, tolerance)
        anchors = reference.rpn.anchor_generator(image_list, list(pyramid.values()))
        ours = np.concatenate(model.anchors(levels, images.shape[1:3]))
        result.add(section, "anchors", ours, anchors[0], 0.0)

        proposals, _ = reference.rpn(image_list, pyramid)
        found = propose(scores, offsets, levels, images, sizes)
        for i, wanted in enumerate(proposals):
            compare_sets(result, section, found.boxes[i][found.valid[i]], wanted.numpy(), pair)

        count = max(map(len, proposals))
        boxes, valid = (
            pad([p.numpy() for p in proposals], count),
            pad([np.ones(len(p), bool) for p in proposals], count),
        )
        pooled = reference.roi_heads.box_roi_pool(pyramid, proposals, image_list.image_sizes)
        ours = pools[BOX_POOL_SIZE](levels[:4], boxes, images)
        result.add(section, "RoIAlign 7x7", ours[valid], channels_last(pooled), tolerance)
        logits, offsets = reference.roi_heads.box_predictor(reference.roi_heads.box_head(pooled))
        ours = box_head(channels_last(pooled))
        result.add(section, "class logits", ours[0], logits, tolerance)
        result.add(section, "box offsets", ours[1].reshape(len(logits), -1), offsets, tolerance)

        per_image = [len(p) for p in proposals]
        wanted = reference.roi_heads.postprocess_detections(logits, offsets, proposals, image_list.image_sizes)
        found = select(
            pad([part.numpy() for part in logits.split(per_image)], count),
            pad([part.reshape(len(part), -1, 4).numpy() for part in offsets.split(per_image)], count),
            Proposals(boxes, np.zeros(valid.shape, boxes.dtype), valid),
            sizes,
        )
        for i in range(len(batch)):
            kept = found[3][i]
            result.add(section, "detections: number", kept.sum(), len(wanted[0][i]), 0.0)
            if kept.sum() == len(wanted[0][i]):
                result.add(section, "detections: boxes", found[0][i][kept], wanted[0][i], tolerance)
                result.add(section, "detections: scores", found[1][i][kept], wanted[1][i], tolerance)
                result.add(section, "detections: labels", found[2][i][kept], wanted[2][i], 0.0)

        pooled = reference.roi_heads.mask_roi_pool(pyramid, wanted[0], image_list.image_sizes)
        count = max(map(len, wanted[0]))
        boxes = pad([b.numpy() for b in wanted[0]], count)
        valid = pad([np.ones(len(b), bool) for b in wanted[0]], count)
        ours = pools[MASK_POOL_SIZE](levels[:4], boxes, images)
        result.add(section, "RoIAlign 14x14", ours[valid], channels_last(pooled), tolerance)
        logits = reference.roi_heads.mask_predictor(reference.roi_heads.mask_head(pooled))
        labels = torch.cat(wanted[2])
        ours = mask_head(channels_last(pooled), labels.numpy().astype(np.int32))
        result.add(section, "mask logits", ours, logits[torch.arange(len(labels)), labels], tolerance)

        for (name, ours), wanted in zip(
            layers(images, sizes).items(),
            [*map(channels_last, captured), *levels, *scores],
            strict=True,
        ):
            result.add("layers, from the image on", name, ours, wanted, tolerance)


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
