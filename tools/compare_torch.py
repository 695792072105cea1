"""Compare this project with torchvision: every stage, loss, gradient, optimizer step and detection.

    python tools/compare_torch.py --model=maskrcnn_resnet50_fpn --images=DIR [--weights=FILE] [--dtype=float64]

Both sides get the same weights (seeded random ones if none are given) and the same images. Prints a table, writes it
as --json and --html, and exits with status 1 if something is further away than its tolerance.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only what lies beside it

import cv2
import jax
import numpy as np
import optax
import torch
from absl import flags
from flax import nnx
from tqdm import tqdm

from configs import torchvision_r50_fpn, torchvision_r50_fpn_v2
from maskrcnn_jax.cli import run_app
from maskrcnn_jax.data.transforms import pack_masks, resize_image
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.files import list_images
from maskrcnn_jax.evaluation.inference import unpad
from maskrcnn_jax.evaluation.paste import paste_mask
from maskrcnn_jax.models.mask_rcnn import BOX_POOL_SIZE, IMAGE_MEAN, IMAGE_STD, MASK_POOL_SIZE, MaskRCNN
from maskrcnn_jax.models.postprocess import select_detections
from maskrcnn_jax.ops.matching import Sample
from maskrcnn_jax.structures import Batch, GroundTruth, Proposals, RoISamples
from maskrcnn_jax.training.optimizer import make_optimizer
from maskrcnn_jax.weights.convert import load_weights
from maskrcnn_jax.weights.download import resolve
from maskrcnn_jax.weights.files import read_arrays
from maskrcnn_jax.weights.torchvision import entries, modern_names
from tools.comparison import Comparison
from tools.torchvision_reference import build_reference, randomise

CONFIGS = {"maskrcnn_resnet50_fpn": torchvision_r50_fpn, "maskrcnn_resnet50_fpn_v2": torchvision_r50_fpn_v2}
NUM_CLASSES = 91


class Tolerances(NamedTuple):
    """Largest differences, relative to the largest absolute value of the array, that pass."""

    stage: float
    loss: float
    gradient: float
    step: float | None


# float64 proves that the formulas are the same. In float32 rounding is left, which the network amplifies, and training
# amplifies without bound: steps are compared in float64 only.
TOLERANCES = {
    "float64": Tolerances(stage=1e-9, loss=1e-9, gradient=1e-9, step=1e-8),
    "float32": Tolerances(stage=1e-4, loss=1e-5, gradient=1e-3, step=None),
}


class DetectionLimits(NamedTuple):
    """How far final detections may be apart, in any dtype."""

    pixels: float
    score: float
    mask_iou: float


DETECTIONS = DetectionLimits(0.05, 1e-4, 0.995)
DETECTIONS_FROM_FILES = DetectionLimits(0.05, 1e-3, 0.97)
# Proposals may change sides of a threshold of overlap by rounding.
PROPOSALS_MOVED = {"float64": 0.0, "float32": 0.005}


class Pair:
    """A model of torchvision and one of ours with the same weights, and what ours compiles to."""

    def __init__(self, reference: torch.nn.Module, options: dict, num_classes: int, dtype: str):
        self.reference, self.dtype = reference, dtype
        self.model = MaskRCNN(num_classes, **(options | {"dtype": dtype}), rngs=nnx.Rngs(0))
        arrays = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
        load_weights(self.model, arrays, source="torchvision's model")
        self.entries = entries(self.model)
        self.tolerances = TOLERANCES[dtype]

    def compiled(self, function: Callable) -> Callable:
        """Compile function(model, *arrays) in evaluation mode; its results are numpy arrays."""
        self.model.eval()
        graphdef, state = nnx.split(self.model)
        run = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
        return lambda *args: jax.device_get(run(state, *args))

    def torch_layout(self, state: nnx.State) -> dict[str, np.ndarray]:
        """Return arrays in the structure of the model's parameters by torchvision's names and in its layouts."""
        arrays = dict(nnx.to_flat_state(state))
        return {
            entry.key: entry.layout.write(np.asarray(arrays[entry.path][...]))
            for entry in self.entries
            if entry.path in arrays
        }


# What goes in


def read_images(folder: str, count: int) -> list[np.ndarray]:
    """Read the first images of a folder as [h, w, 3] uint8 RGB."""
    images = [cv2.imread(str(path), cv2.IMREAD_COLOR) for path in list_images(folder)[:count]]
    if any(image is None for image in images):
        raise UserError(f"--images={folder} holds files that cannot be read; remove them or give another folder")
    return [cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in images]


def make_targets(images: list[np.ndarray], num_classes: int, seed: int, dtype: str) -> list[dict]:
    """Draw objects for images: ellipses in random boxes, in torchvision's format."""
    rng = np.random.default_rng(seed)
    targets = []
    for image in images:
        height, width = image.shape[:2]
        count = int(rng.integers(3, 8))
        sides = np.stack([width, height]) * rng.uniform(0.08, 0.6, (count, 2))
        corner = rng.uniform(0, 1, (count, 2)) * (np.stack([width, height]) - sides)
        boxes = np.concatenate([corner, corner + sides], axis=1)
        y, x = np.mgrid[:height, :width] + 0.5
        masks = [
            ((x - (b[0] + b[2]) / 2) / (b[2] - b[0]) * 2) ** 2 + ((y - (b[1] + b[3]) / 2) / (b[3] - b[1]) * 2) ** 2 < 1
            for b in boxes
        ]
        targets.append(
            {
                "boxes": torch.tensor(boxes.astype(np.float32)).to(getattr(torch, dtype)),
                "labels": torch.tensor(rng.integers(1, num_classes, count)),
                "masks": torch.tensor(np.stack(masks).astype(np.uint8)),
            }
        )
    return targets


def to_torch(images: list[np.ndarray], dtype: str) -> list[torch.Tensor]:
    """Return [3, h, w] tensors in 0..1."""
    return [torch.tensor(image).permute(2, 0, 1).to(getattr(torch, dtype)) / 255 for image in images]


def channels_last(maps: torch.Tensor) -> np.ndarray:
    """Return [N, H, W, K] for [N, K, H, W]."""
    return maps.permute(0, 2, 3, 1).contiguous().numpy()


def our_images(image_list) -> tuple[np.ndarray, np.ndarray]:
    """Undo torchvision's normalisation: images [B, H, W, 3] in 0..255, zero in the padding, and sizes [B, 2]."""
    tensors = channels_last(image_list.tensors)
    images = np.zeros_like(tensors)
    for i, (height, width) in enumerate(image_list.image_sizes):
        inside = tensors[i, :height, :width].astype(np.float64) * np.array(IMAGE_STD) + np.array(IMAGE_MEAN)
        images[i, :height, :width] = inside * 255
    return images, np.array(image_list.image_sizes, np.int32)


def pad(arrays: list[np.ndarray], length: int) -> np.ndarray:
    """Stack arrays of different lengths, filled up with zeros."""
    return np.stack([np.pad(a, [(0, length - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays])


# (a) Stages


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
        lambda m, o, d, x, images, sizes: m.propose(o, d, m.anchors(x, images.shape[1:3]), sizes, m.rpn_selection_test)
    )
    pools = {
        size: pair.compiled(lambda m, x, boxes, images, size=size: m.pool(x, boxes, images.shape[1:3], size))
        for size in (BOX_POOL_SIZE, MASK_POOL_SIZE)
    }
    box_head = pair.compiled(lambda m, pooled: m.box_head(pooled))
    select = pair.compiled(
        lambda m, c, d, p, sizes: jax.vmap(lambda c, d, p, s: select_detections(c, d, p, s, **m.selection))(
            c, d, p, sizes
        )
    )
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
            _compare_sets(result, section, found.boxes[i][found.valid[i]], wanted.numpy(), pair.dtype)

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
    from maskrcnn_jax.models.resnet import max_pool

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


def _compare_sets(result: Comparison, section: str, ours: np.ndarray, wanted: np.ndarray, dtype: str) -> None:
    """Compare boxes in any order: which have no counterpart within 0.05 pixels, and how far the others are."""
    distance = np.abs(ours[:, None] - wanted[None]).max(axis=2)  # [N, M]
    nearest = np.concatenate([distance.min(axis=0), distance.min(axis=1)])
    moved = nearest > DETECTIONS.pixels
    result.add(
        section, "proposals: share without counterpart", moved.mean(), 0.0, PROPOSALS_MOVED[dtype], absolute=True
    )
    scale = np.abs(wanted).max()
    tolerance = TOLERANCES[dtype].stage
    result.add(section, "proposals: distance of the others", nearest[~moved].max() / scale, 0.0, tolerance)


# (b) Losses, (c) gradients, (d) steps


class Drawn(NamedTuple):
    """What torchvision's samplers drew for a batch, in our structures."""

    anchors: Sample
    rois: RoISamples


def reference_losses(pair: Pair, images: list[torch.Tensor], targets: list[dict], seed: int):
    """Return torchvision's losses of a batch and what it drew at random for them."""
    reference = pair.reference.train()
    sampler, select = reference.rpn.fg_bg_sampler, reference.roi_heads.select_training_samples
    seen = {}

    def spy(name, function):
        def call(*args):
            seen[name] = function(*args)
            return seen[name]

        return call

    def in_dtype(anchors, targets):
        # torchvision's labels of anchors are float32 always, and make the objectness loss of a float64 model float32.
        labels, boxes = assign(anchors, targets)
        return [label.to(getattr(torch, pair.dtype)) for label in labels], boxes

    assign = reference.rpn.assign_targets_to_anchors
    reference.rpn.fg_bg_sampler = spy("anchors", sampler)
    reference.rpn.assign_targets_to_anchors = in_dtype
    reference.roi_heads.select_training_samples = spy("rois", select)
    try:
        torch.manual_seed(seed)
        losses = reference(images, targets)
    finally:
        reference.rpn.fg_bg_sampler = sampler
        del reference.rpn.assign_targets_to_anchors, reference.roi_heads.select_training_samples

    size = pair.model.rpn_sampling["size"]
    positive, negative = ([torch.where(mask)[0].numpy() for mask in masks] for masks in seen["anchors"])
    index = [np.concatenate(both) for both in zip(positive, negative, strict=True)]
    anchors = Sample(
        pad(index, size).astype(np.int32),
        pad([np.arange(len(i)) < len(p) for i, p in zip(index, positive, strict=True)], size),
        pad([np.ones(len(i), bool) for i in index], size),
    )
    boxes, matched, labels, _ = ([tensor.detach().numpy() for tensor in column] for column in seen["rois"])
    order = [np.argsort(column == 0, kind="stable") for column in labels]  # foreground first
    size = pair.model.roi_sampling["size"]
    rois = RoISamples(
        *(
            pad([row[o] for row, o in zip(column, order, strict=True)], size).astype(dtype)
            for column, dtype in ((boxes, boxes[0].dtype), (labels, np.int32), (matched, np.int32))
        ),
        pad([np.ones(len(o), bool) for o in order], size),
    )
    return losses, Drawn(anchors, rois)


@torch.no_grad()
def our_batch(pair: Pair, images: list[torch.Tensor], targets: list[dict]) -> Batch:
    """Return the batch as torchvision resized it, with the masks at the resolution of their images."""
    image_list, resized = pair.reference.train().transform(images, copy.deepcopy(targets))
    pixels, sizes = our_images(image_list)
    original = np.array([image.shape[1:] for image in images], np.int32)
    side, count = -(-int(original.max()) // 8) * 8, max(len(t["labels"]) for t in targets)
    packed = [pack_masks(target["masks"].numpy(), side) for target in targets]
    gt = GroundTruth(
        boxes=pad([target["boxes"].numpy() for target in resized], count),
        labels=pad([target["labels"].numpy() for target in targets], count).astype(np.int32),
        masks=pad([masks for masks, _ in packed], count),
        mask_sizes=np.array([size for _, size in packed], np.int32),
        valid=pad([np.ones(len(target["labels"]), bool) for target in targets], count),
    )
    rows = np.arange(len(images), dtype=np.int32)
    return Batch(pixels, sizes, original, rows, np.ones(len(images), bool), gt)


def make_gradient(pair: Pair) -> Callable:
    """Compile (params, variables, batch, drawn) -> (loss terms, variables, gradients), as a training step has them."""
    pair.model.train()
    graphdef, _, _ = nnx.split(pair.model, nnx.Param, ...)

    def loss(params, variables, batch, drawn):
        model = nnx.merge(graphdef, params, variables, copy=True)
        features = model.features(batch.images, batch.sizes)
        anchors = model.anchors(features, batch.images.shape[1:3])
        matches = model.match_anchors(anchors, batch.gt)
        terms = model.rpn_losses(*model.rpn(features), anchors, matches, drawn.anchors, batch.gt)
        terms |= model.head_losses(features, drawn.rois, batch)[0]
        return sum(terms.values()), (terms, nnx.state(model, nnx.Not(nnx.Param)))

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def call(*args):
        gradients, (terms, variables) = gradient(*args)
        return terms, variables, gradients

    return call


def compare_losses_and_gradients(
    result: Comparison, pair: Pair, gradient: Callable, batches: list, targets: list, seed: int
) -> None:
    """Compare the five losses, with torchvision's samples, and the gradient of every parameter."""
    pair.model.train()
    _, params, variables = nnx.split(pair.model, nnx.Param, ...)
    # Training changes the running statistics of batch norms.
    before = copy.deepcopy(pair.reference.state_dict())
    for batch, truth in tqdm(list(zip(batches, targets, strict=True)), desc="gradients", unit="batch", leave=False):
        images = to_torch(batch, pair.dtype)
        pair.reference.zero_grad()
        losses, drawn = reference_losses(pair, images, truth, seed)
        sum(losses.values()).backward()
        terms, _, gradients = gradient(params, variables, our_batch(pair, images, truth), drawn)
        for name, wanted in losses.items():
            result.add("losses, with torchvision's samples", name, terms[name], wanted.detach(), pair.tolerances.loss)
        ours = pair.torch_layout(gradients)
        for name, parameter in pair.reference.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            result.add("gradients", name, ours[name], wanted, pair.tolerances.gradient)
        pair.reference.load_state_dict(before)


# Per kind: torch's optimizer, ours, and what each calls its state. At these rates the loss of a random network, whose
# gradient has a norm of a hundred, falls; at ten times these it jumps about and amplifies the smallest difference.
OPTIMIZERS = {
    "SGD": (
        lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=1e-4),
        {"kind": "sgd", "momentum": 0.9},
        1e-4,
        {"trace": "momentum_buffer"},
    ),
    "AdamW": (
        lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=1e-4),
        {"kind": "adamw", "momentum": 0.0},
        1e-4,
        {"mu": "exp_avg", "nu": "exp_avg_sq"},
    ),
}


def compare_steps(
    result: Comparison, pair: Pair, gradient: Callable, batch: list, targets: list, num_steps: int, seed: int
) -> None:
    """Train both sides for some steps on one batch, with torchvision's samples, and compare all that changes."""
    images = to_torch(batch, pair.dtype)
    ours = our_batch(pair, images, targets)
    start = copy.deepcopy(pair.reference.state_dict())
    for kind, (make_torch, options, rate, states) in OPTIMIZERS.items():
        section = f"{num_steps} steps of {kind}"
        pair.reference.load_state_dict(start)
        pair.model.train()
        _, params, variables = nnx.split(pair.model, nnx.Param, ...)
        common = {"weight_decay": 1e-4, "decay_norm_and_bias": True, "b1": 0.9, "b2": 0.999, "clip_norm": 0.0}
        optimizer = make_optimizer(lambda _, rate=rate: rate, **common, **options)
        opt_state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        theirs = make_torch(pair.reference.parameters())
        for step in tqdm(range(num_steps), desc=section, unit="step", leave=False):
            theirs.zero_grad()
            losses, drawn = reference_losses(pair, images, targets, seed + step)
            sum(losses.values()).backward()
            theirs.step()
            _, variables, gradients = gradient(params, variables, ours, drawn)
            updates, opt_state = update(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)
        tolerance = pair.tolerances.step
        after = pair.torch_layout(params) | pair.torch_layout(variables)
        for name, wanted in pair.reference.state_dict().items():
            result.add(section, name, after[name], wanted, tolerance)
        named = dict(pair.reference.named_parameters())
        for ours_name, their_name in states.items():
            state = pair.torch_layout(optax.tree.get(opt_state, ours_name))
            for name, parameter in named.items():
                if their_name in theirs.state[parameter]:
                    wanted = theirs.state[parameter][their_name]
                    result.add(section, f"{their_name} of {name}", state[name], wanted, tolerance)
    pair.reference.load_state_dict(start)


# (e) Detections


@torch.no_grad()
def compare_detections(result: Comparison, pair: Pair, batches: list[list[np.ndarray]]) -> None:
    """Compare final detections in the pixels of the images: from the same resized pixels on, then from the files on.

    torch resizes in float32 less exactly than OpenCV does, which a network amplifies: hence both.
    """
    reference = pair.reference.eval()
    detect = pair.compiled(MaskRCNN.detect)
    for batch in tqdm(batches, desc="detections", unit="batch", leave=False):
        tensors = to_torch(batch, pair.dtype)
        image_list, _ = reference.transform(tensors)
        images, sizes = our_images(image_list)
        original = np.array([image.shape[:2] for image in batch], np.int32)
        wanted = reference(tensors)

        def compare(section, images, limits, wanted=wanted, sizes=sizes, original=original):
            found = unpad(detect(images, sizes), sizes, original)
            for ours, theirs, size in zip(found, wanted, original, strict=True):
                _compare_instances(result, section, ours, theirs, tuple(map(int, size)), limits)

        compare("detections, from torchvision's resized pixels on", images, DETECTIONS)
        if pair.dtype == "float32":
            images = np.zeros_like(images)
            for i, (height, width) in enumerate(sizes):
                images[i, :height, :width] = resize_image(batch[i], (int(height), int(width)), "float32")
            compare("detections, from the files on", images, DETECTIONS_FROM_FILES)


def _compare_instances(result: Comparison, section: str, ours, wanted: dict, size, limits: DetectionLimits) -> None:
    scores, labels = wanted["scores"].numpy(), wanted["labels"].numpy()
    result.add(section, "number", len(ours.scores), len(scores), 0.0)
    result.add(section, "some are there", min(len(scores), 1), 1, 0.0)
    if len(ours.scores) != len(scores):
        return
    order = _order_up_to_ties(ours, wanted)
    misplaced = np.abs(ours.scores[order] - ours.scores) > limits.score
    result.add(section, "out of order, ties aside", misplaced.sum(), 0.0, 0.0, absolute=True)
    result.add(section, "labels", ours.labels[order], labels, 0.0)
    result.add(section, "boxes, pixels", ours.boxes[order], wanted["boxes"], limits.pixels, absolute=True)
    result.add(section, "scores", ours.scores[order], scores, limits.score, absolute=True)
    overlaps = []
    for i, mask in zip(order, wanted["masks"].numpy()[:, 0] >= 0.5, strict=True):
        pasted = np.zeros(size, bool)
        crop, y, x = paste_mask(ours.masks[i], ours.boxes[i], size)
        pasted[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        union = (pasted | mask).sum()
        overlaps.append((pasted & mask).sum() / union if union else 1.0)
    apart = 1 - np.array(overlaps)
    result.add(section, "1 - mask IoU", apart, np.zeros_like(apart), 1 - limits.mask_iou, absolute=True)


def _order_up_to_ties(ours, wanted: dict) -> np.ndarray:
    """Return, for each detection of the reference, ours of the same label with the nearest box, each used once."""
    boxes, labels = wanted["boxes"].numpy(), wanted["labels"].numpy()
    free = np.ones(len(ours.boxes), bool)
    order = np.arange(len(labels))
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        distance = np.abs(ours.boxes - box).max(axis=1) + np.where(free & (ours.labels == label), 0, np.inf)
        best = int(np.argmin(distance))
        order[i] = best if np.isfinite(distance[best]) else int(np.argmax(free))
        free[order[i]] = False
    return order


# All of it


def compare(
    options: dict,
    images: list[np.ndarray],
    *,
    num_classes: int = NUM_CLASSES,
    dtype: str = "float32",
    weights: str | None = None,
    batch_size: int = 2,
    min_size: int = 800,
    max_size: int = 1333,
    num_steps: int = 10,
    seed: int = 0,
) -> Comparison:
    """Compare a model of ours with torchvision's; JAX must allow float64 if that is the dtype.

    Args:
      options: keyword arguments of MaskRCNN that torchvision has too.
      images: [h, w, 3] uint8 RGB, of any sizes.
      num_classes: background included.
      dtype: "float32" or "float64".
      weights: file of torchvision's or one of its names; None draws seeded random weights.
      batch_size: images in each forward pass.
      min_size: of the shorter side after resizing, pixels.
      max_size: of the longer one.
      num_steps: of each optimizer, in float64; 0 leaves losses and gradients out too.
      seed: of weights, objects and sampling.

    Returns:
      All that was compared.
    """
    reference = build_reference(options, num_classes, min_size=min_size, max_size=max_size, dtype=dtype)
    if weights is None:
        randomise(reference, to_torch(images[:1], dtype), seed)
    else:
        arrays = modern_names(read_arrays(resolve(weights)))
        reference.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    pair = Pair(reference, options, num_classes, dtype)
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    result = Comparison()
    compare_stages(result, pair, batches)
    compare_detections(result, pair, batches)
    if num_steps:
        targets = [make_targets(batch, num_classes, seed + i, dtype) for i, batch in enumerate(batches)]
        gradient = make_gradient(pair)
        compare_losses_and_gradients(result, pair, gradient, batches, targets, seed)
        if pair.tolerances.step is not None:
            compare_steps(result, pair, gradient, batches[0], targets[0], num_steps, seed)
    return result


FLAGS = flags.FLAGS
flags.DEFINE_enum("model", "maskrcnn_resnet50_fpn", sorted(CONFIGS), "Which of torchvision's models.")
flags.DEFINE_string("images", None, "Folder of images.", required=True)
flags.DEFINE_string("weights", None, "State dict (.pth, .safetensors) or a name; seeded random weights if not given.")
flags.DEFINE_enum("dtype", "float32", sorted(TOLERANCES), "Of both sides.")
flags.DEFINE_integer("num_images", 4, "Images to compare on.", lower_bound=1)
flags.DEFINE_integer("batch_size", 2, "Images in each forward pass.", lower_bound=1)
flags.DEFINE_integer("min_size", 800, "Shorter side after resizing, pixels.", lower_bound=32)
flags.DEFINE_integer("max_size", 1333, "Longer side after resizing, pixels, at most.", lower_bound=32)
flags.DEFINE_integer("steps", 10, "Steps of SGD and AdamW (float64); 0 leaves losses and gradients out too.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Of weights, objects and sampling.")
flags.DEFINE_string("json", None, "File for all rows.")
flags.DEFINE_string("html", None, "File for a page with plots.")


def main() -> None:
    jax.config.update("jax_enable_x64", FLAGS.dtype == "float64")
    config = CONFIGS[FLAGS.model].get_config()
    options = config.model.to_dict()
    if FLAGS.weights is None:
        options["norm_eps"] = 1e-5  # the 0 of the published weights divides by the variance of a dead channel
    result = compare(
        options,
        read_images(FLAGS.images, FLAGS.num_images),
        dtype=FLAGS.dtype,
        weights=FLAGS.weights,
        batch_size=FLAGS.batch_size,
        min_size=FLAGS.min_size,
        max_size=FLAGS.max_size,
        num_steps=FLAGS.steps,
        seed=FLAGS.seed,
    )
    print(result.table())
    if FLAGS.json:
        result.write_json(FLAGS.json)
    if FLAGS.html:
        versions = f"jax {jax.__version__}, torch {torch.__version__}"
        result.write_html(FLAGS.html, f"{FLAGS.model}, {FLAGS.dtype}: maskrcnn_jax beside torchvision ({versions})")
    if not result.ok:
        sys.exit(1)


if __name__ == "__main__":
    run_app(main)
