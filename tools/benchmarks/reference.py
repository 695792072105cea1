"""torchvision's side: its model with seeded weights, in each of the settings in which it may be fastest."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.normalize import IMAGE_MEAN, IMAGE_STD
from tools.benchmarks.inputs import Objects, Settings, on_gpu
from tools.benchmarks.timing import measure
from tools.torchvision_reference import build_reference, compiled_operators_load, import_torchvision, randomise

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Variant(NamedTuple):
    """torchvision's model in one setting."""

    name: str
    model: torch.nn.Module
    memory_format: torch.memory_format
    autocast: bool  # to bf16

    def context(self):
        """Return the context that its forward passes run in."""
        return torch.autocast(torch_device(), torch.bfloat16, enabled=self.autocast)


def torch_device() -> str:
    """Return the kind of device that JAX uses too."""
    if not on_gpu():
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("JAX computes on a GPU and torch cannot; install torch with CUDA, or set JAX_PLATFORMS=cpu")
    return "cuda"


def reference_name() -> str:
    """Say what the reference is made of."""
    return "torchvision" if compiled_operators_load() else "torchvision (NMS, RoIAlign in plain torch)"


def make_reference(settings: Settings, photos: Sequence[np.ndarray]) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """Build torchvision's model with seeded weights, on the CPU, and return it with its state dict."""
    sides = sorted((settings.height, settings.width))
    model = build_reference(settings.model_options, settings.num_classes, min_size=sides[0], max_size=sides[1])
    randomise(model, [torch.tensor(photos[0]).permute(2, 0, 1) / 255], settings.seed)
    if torch_device() == "cpu":
        _choose_threads(model, torch.rand(1, 3, settings.height, settings.width))
    return model, {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def _choose_threads(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Give torch the threads that its backbone is fastest with: all, or half, where two share a core."""
    threads = torch.get_num_threads()

    def features(count: int):
        torch.set_num_threads(count)
        with torch.inference_mode():
            return model.backbone(images)

    times = measure({count: partial(features, count) for count in {threads, -(-threads // 2)}}, rounds=3)
    torch.set_num_threads(min(times, key=lambda count: times[count].median))


def make_variants(model: torch.nn.Module, settings: Settings) -> list[Variant]:
    """Return a copy of the model for every setting that is worth trying on this device."""
    device, variants = torch_device(), []
    torch.backends.cudnn.benchmark = True
    for layout, memory_format in MEMORY_FORMATS.items():
        moved = copy.deepcopy(model).to(device).to(memory_format=memory_format)
        for autocast in {False, settings.dtype == "bfloat16"}:
            name = f"{reference_name()}, {layout}" + (", autocast" if autocast else "")
            name += f", {torch.get_num_threads()} threads" if device == "cpu" else ""
            variants.append(Variant(name, moved, memory_format, autocast))
    return variants


def image_list(images: np.ndarray, sizes: np.ndarray, variant: Variant):
    """Return torchvision's normalised input for padded images [B, H, W, 3] in 0..255."""
    import_torchvision()
    from torchvision.models.detection.image_list import ImageList

    normalized = np.zeros_like(images)
    for i, (height, width) in enumerate(sizes):
        inside = images[i, :height, :width] / 255
        normalized[i, :height, :width] = (inside - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    tensors = torch.tensor(normalized).permute(0, 3, 1, 2).to(torch_device())
    return ImageList(
        tensors.contiguous(memory_format=variant.memory_format), [tuple(map(int, size)) for size in sizes]
    )


def make_targets(objects: Sequence[Objects]) -> list[dict]:
    """Return objects in torchvision's format, as its transform would leave them."""
    device = torch_device()
    return [
        {
            "boxes": torch.tensor(o.boxes, device=device),
            "labels": torch.tensor(o.labels.astype(np.int64), device=device),
            "masks": torch.tensor(o.masks, device=device),
        }
        for o in objects
    ]


@torch.inference_mode()
def detect(variant: Variant, inputs) -> list[dict]:
    """Find objects from the normalised input on; masks are [n, 1, 28, 28] inside their boxes."""
    model = variant.model.eval()
    with variant.context():
        features = model.backbone(inputs.tensors)
        proposals, _ = model.rpn(inputs, features)
        return model.roi_heads(features, proposals, inputs.image_sizes)[0]


def propose(model: torch.nn.Module, inputs, levels, objectness, deltas) -> list[torch.Tensor]:
    """Select proposals from the RPN head's outputs, as the second half of RegionProposalNetwork.forward."""
    from torchvision.models.detection.rpn import concat_box_prediction_layers

    rpn = model.rpn
    anchors = rpn.anchor_generator(inputs, levels)
    counts = [level[0].numel() for level in objectness]
    scores, offsets = concat_box_prediction_layers(list(objectness), list(deltas))
    boxes = rpn.box_coder.decode(offsets, anchors).view(len(anchors), -1, 4)
    return rpn.filter_proposals(boxes, scores, inputs.image_sizes, counts)[0]


@torch.inference_mode()
def stages(variant: Variant, inputs) -> dict[str, Callable]:
    """Return a function for each stage of detection, which works on what the stage before it gave."""
    from torchvision.models.detection.roi_heads import maskrcnn_inference

    model, sizes = variant.model.eval(), inputs.image_sizes
    heads = model.roi_heads

    def masks():
        pooled = heads.mask_roi_pool(pyramid, boxes, sizes)
        return maskrcnn_inference(heads.mask_predictor(heads.mask_head(pooled)), labels)

    def box_outputs():
        return heads.box_predictor(heads.box_head(heads.box_roi_pool(pyramid, proposals, sizes)))

    functions = {
        "backbone": lambda: model.backbone.body(inputs.tensors),
        "FPN": lambda: model.backbone.fpn(body),
        "RPN head": lambda: model.rpn.head(levels),
        "proposals": lambda: propose(model, inputs, levels, *rpn_outputs),
        "box head with RoIAlign": box_outputs,
        "detections from the box head": lambda: heads.postprocess_detections(*box_outputs_found, proposals, sizes),
        "mask head with RoIAlign": masks,
    }

    def in_context(function):
        def call():
            with torch.inference_mode(), variant.context():
                return function()

        return call

    functions = {name: in_context(function) for name, function in functions.items()}
    body = functions["backbone"]()
    pyramid = functions["FPN"]()
    levels = list(pyramid.values())
    rpn_outputs = functions["RPN head"]()
    proposals = functions["proposals"]()
    box_outputs_found = functions["box head with RoIAlign"]()
    boxes, _, labels = functions["detections from the box head"]()
    return functions


class ReferenceTraining:
    """torchvision's training on one batch: forward, backward and the optimizer's step."""

    def __init__(self, variant: Variant, inputs, targets: list[dict], learning_rate: float):
        self.variant, self.inputs, self.targets = variant, inputs, targets
        self.model = variant.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)

    def losses(self) -> dict[str, torch.Tensor]:
        """Return the five losses."""
        self.model.train()
        with self.variant.context():
            features = self.model.backbone(self.inputs.tensors)
            proposals, terms = self.model.rpn(self.inputs, features, self.targets)
            _, head_terms = self.model.roi_heads(features, proposals, self.inputs.image_sizes, self.targets)
        return terms | head_terms

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        """Return the loss without keeping what its gradient needs."""
        return sum(self.losses().values())

    def gradient(self) -> torch.Tensor:
        """Return the loss after computing its gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum(self.losses().values())
        loss.backward()
        return loss.detach()

    def step(self) -> torch.Tensor:
        """Do one whole step."""
        loss = self.gradient()
        self.optimizer.step()
        return loss

    def num_positives(self) -> list[int]:
        """Return the foreground RoIs of each image that a step draws."""
        heads, drawn = self.model.roi_heads, []
        original = heads.select_training_samples

        def spy(*arguments):
            result = original(*arguments)
            drawn.extend(int((labels > 0).sum()) for labels in result[2])
            return result

        heads.select_training_samples = spy
        try:
            self.forward()
        finally:
            del heads.select_training_samples
        return drawn
