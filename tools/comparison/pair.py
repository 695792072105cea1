"""The two models that are compared, and how their inputs and arrays translate into each other."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import cv2
import jax
import numpy as np
import torch
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.media import list_images
from maskrcnn_jax.models.normalize import IMAGE_MEAN, IMAGE_STD
from maskrcnn_jax.models.unfilled import make_unfilled
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.weights.convert import load_weights
from maskrcnn_jax.weights.torchvision import entries


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


class Pair:
    """A model of torchvision and one of ours with the same weights, and what ours compiles to."""

    def __init__(self, reference: torch.nn.Module, options: ModelOptions, num_classes: int, dtype: str):
        self.reference, self.dtype = reference, dtype
        self.model = make_unfilled(num_classes, dataclasses.replace(options, dtype=dtype))
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
