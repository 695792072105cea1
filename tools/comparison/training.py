"""Losses, gradients and optimizer steps, with what torchvision's samplers drew injected into ours."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
import torch
from flax import nnx
from tqdm import tqdm

from maskrcnn_jax.data.transforms import pack_masks
from maskrcnn_jax.ops.matching import Sample
from maskrcnn_jax.structures import Batch, GroundTruth, RoISamples
from maskrcnn_jax.training.optimizer import make_optimizer
from tools.comparison.pair import Pair, our_images, pad, to_torch
from tools.comparison.report import Comparison

# The gradient of a bias whose effect a following norm removes is zero but for rounding. Gradients are measured against
# this share of all of them at least.
VANISHING = 1e-6


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
        floor = VANISHING * float(sum(np.sum(np.square(array)) for array in ours.values())) ** 0.5
        for name, parameter in pair.reference.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # By norm: in float32 a few ReLUs flip at zero, and each changes some entries by a part of their value.
            result.add("gradients", name, ours[name], wanted, pair.tolerances.gradient, by_norm=True, floor=floor)
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

        @jax.jit
        def update(params, opt_state, gradients, optimizer=optimizer):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        theirs = make_torch(pair.reference.parameters())
        for step in tqdm(range(num_steps), desc=section, unit="step", leave=False):
            theirs.zero_grad()
            losses, drawn = reference_losses(pair, images, targets, seed + step)
            sum(losses.values()).backward()
            theirs.step()
            _, variables, gradients = gradient(params, variables, ours, drawn)
            params, opt_state = update(params, opt_state, gradients)
        tolerance = pair.tolerances.step
        after = pair.torch_layout(params) | pair.torch_layout(variables)
        for name, wanted in pair.reference.state_dict().items():
            result.add(section, name, after[name], wanted, tolerance)
        named = dict(pair.reference.named_parameters())
        for ours_name, their_name in states.items():
            state = pair.torch_layout(optax.tree.get(opt_state, ours_name))
            largest = max(np.abs(array).max() for array in state.values())
            floor = largest * (VANISHING**2 if ours_name == "nu" else VANISHING)
            for name, parameter in named.items():
                if their_name in theirs.state[parameter]:
                    wanted = theirs.state[parameter][their_name]
                    result.add(section, f"{their_name} of {name}", state[name], wanted, tolerance, floor=floor)
    pair.reference.load_state_dict(start)
