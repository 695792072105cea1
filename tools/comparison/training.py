"""Losses, gradients and optimizer steps, with what torchvision's samplers drew injected into ours."""

import copy
from collections.abc import Callable

import jax
import numpy as np
import optax
import torch
from flax import nnx
from tqdm import tqdm

from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.training.optimizer import make_optimizer
from tools.comparison.comparison_page import Comparison
from tools.comparison.pair import Pair, to_torch
from tools.comparison.sampling import Drawn, compare_sampling, our_batch, reference_losses

# The gradient of a bias whose effect a following norm removes is zero but for rounding. Gradients are measured against
# this share of all of them at least.
VANISHING = 1e-6


def make_gradient(pair: Pair) -> Callable:
    """Compile (params, variables, batch, drawn) -> (loss terms, variables, gradients), as a training step has them."""
    pair.model.train()
    graphdef, _, _ = nnx.split(pair.model, nnx.Param, ...)

    def loss(params, variables, batch, drawn: Drawn):
        model = nnx.merge(graphdef, params, variables, copy=True)
        features = model.features(batch.images, batch.sizes)
        anchors = model.anchors(features, batch.images.shape[1:3])
        matches = model.match_anchors(anchors, batch.gt)
        terms = model.rpn_losses(*model.rpn(features), anchors, matches, drawn.anchors, batch.gt)
        terms |= model.head_losses(features, drawn.rois, batch.gt, batch)[0]
        return sum(terms.values()), (terms, nnx.state(model, nnx.Not(nnx.Param)))

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def call(*args):
        gradients, (terms, variables) = gradient(*args)
        return terms, variables, gradients

    return call


def compare_losses_and_gradients(
    result: Comparison, pair: Pair, gradient: Callable, batches: list, targets: list, seed: int
) -> None:
    """Compare what is assigned and drawn, the five losses with torchvision's samples, and every gradient."""
    pair.model.train()
    _, params, variables = nnx.split(pair.model, nnx.Param, ...)
    # Training changes the running statistics of batch norms.
    before = copy.deepcopy(pair.reference.state_dict())
    for batch, truth in tqdm(list(zip(batches, targets, strict=True)), desc="gradients", unit="batch", leave=False):
        images = to_torch(batch, pair.dtype)
        pair.reference.zero_grad()
        losses, assigned = reference_losses(pair, images, truth, seed)
        sum(losses.values()).backward()
        ours = our_batch(pair, images, truth)
        compare_sampling(result, pair, assigned, ours)
        terms, _, gradients = gradient(params, variables, ours, assigned.drawn)
        gradients = pair.torch_layout(gradients)
        for name, wanted in losses.items():
            result.add("losses, with torchvision's samples", name, terms[name], wanted.detach(), pair.tolerances.loss)
        floor = VANISHING * float(sum(np.sum(np.square(array)) for array in gradients.values())) ** 0.5
        for name, parameter in pair.reference.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # By norm: in float32 a few ReLUs flip at zero, and each changes some entries by a part of their value.
            result.add("gradients", name, gradients[name], wanted, pair.tolerances.gradient, by_norm=True, floor=floor)
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
        optim = OptimOptions(decay_norms=True, decay_biases=True, clip_norm=0.0, **options)
        optimizer = make_optimizer(optim, lambda _, rate=rate: rate)
        opt_state = optimizer.init(params)

        @jax.jit
        def update(params, opt_state, gradients, optimizer=optimizer):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        theirs = make_torch(pair.reference.parameters())
        for step in tqdm(range(num_steps), desc=section, unit="step", leave=False):
            theirs.zero_grad()
            losses, assigned = reference_losses(pair, images, targets, seed + step)
            sum(losses.values()).backward()
            theirs.step()
            _, variables, gradients = gradient(params, variables, ours, assigned.drawn)
            params, opt_state = update(params, opt_state, gradients)
        tolerance = pair.tolerances.step
        after = pair.torch_layout(params) | pair.torch_layout(variables)
        # AdamW moves a parameter as far for a gradient of 1e-7 as for one of 1, whose rounding is that of the sum of
        # both: its parameters are compared as they are, those of SGD by how far they moved.
        before = start if kind == "SGD" else dict.fromkeys(start, torch.zeros(()))
        moved = {name: (wanted - before[name]).numpy() for name, wanted in pair.reference.state_dict().items()}
        floor = VANISHING * max(np.abs(moved[name]).max() for name, _ in pair.reference.named_parameters())
        for name, wanted in moved.items():
            result.add(section, name, after[name] - before[name].numpy(), wanted, tolerance, floor=floor)
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
