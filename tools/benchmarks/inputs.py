"""What both sides work on: settings, images, objects and the model's options. Nothing here needs torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskrcnn_jax.config import load_config
from maskrcnn_jax.data.loader import mask_side
from maskrcnn_jax.data.run_lengths import cut_out
from maskrcnn_jax.data.shapes import draw_image
from maskrcnn_jax.data.transforms import pack_masks
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.media import list_images
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.ops.boxes import box_iou
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.structures import Batch, GroundTruth
from maskrcnn_jax.weights.convert import load_weights

STRIDE = 32  # padded sides are multiples of it, on both sides

# Options with which everything takes seconds, for trying the tool and for its tests.
NARROW = {
    "backbone": "resnet18",
    "stem_channels": 8,
    "stage_channels": 32,
    "bottleneck_channels": 8,
    "fpn_channels": 16,
    "mask_channels": 16,
    "box_fc_channels": (32, 32),
    "anchor_sizes": (16, 32, 64, 96, 128),
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 100,
    "box_batch_size_per_image": 32,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says; zero or empty means the subject's own."""

    against: bool = False  # whether torchvision is measured too
    images: str = ""  # folder; empty draws synthetic shapes
    coco_dir: str = ""
    num_images: int = 0
    height: int = 0  # of the resized images, before padding
    width: int = 0
    batch_size: int = 0
    rounds: int = 0
    dtype: str = ""
    seed: int = 0
    num_classes: int = 91
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # changes to the model's

    def having(self, **defaults) -> "Settings":
        """Return settings in which what is not said has these values."""
        return dataclasses.replace(self, **{name: getattr(self, name) or value for name, value in defaults.items()})

    @property
    def model_options(self) -> ModelOptions:
        """Options of the model, without the dtype."""
        config = load_config("torchvision_r50_fpn").model
        # The epsilon of 0 of the published weights would divide by the variance of a dead channel.
        return ModelOptions(**(config.to_dict() | {"norm_eps": 1e-5} | dict(self.options)))

    def describe(self) -> dict:
        """Return what a row says about its inputs."""
        sides = (self.height, self.width)
        return {
            "image": "x".join(map(str, sides)),
            "padded": "x".join(str(-(-side // STRIDE) * STRIDE) for side in sides),
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "images": "photographs" if self.images else "synthetic shapes",
        }


class Objects(NamedTuple):
    """The annotated objects of one image, in pixels of the resized image."""

    boxes: np.ndarray  # [n, 4] float32
    labels: np.ndarray  # [n] int32
    masks: np.ndarray  # [n, height, width] uint8


def on_gpu() -> bool:
    """Return whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


def default_dtype() -> str:
    """Return the dtype that each kind of device is used with."""
    return "bfloat16" if on_gpu() else "float32"


def read_photos(settings: Settings, count: int) -> list[np.ndarray]:
    """Return images [height, width, 3] uint8 RGB, of --images or drawn, stretched to the wanted size."""
    if settings.images:
        paths = list_images(settings.images)
        found = [cv2.imread(str(paths[i % len(paths)]), cv2.IMREAD_COLOR) for i in range(count)]
        if any(image is None for image in found):
            raise UserError(f"--images={settings.images} holds files that cannot be read; give another folder")
        found = [cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in found]
    else:
        found = [draw_image(np.random.default_rng([settings.seed, i]), 256)[0] for i in range(count)]
    return [cv2.resize(image, (settings.width, settings.height)) for image in found]


def pad_images(photos: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return images [B, H, W, 3] float32 in 0..255, zero in the padding, and their sizes [B, 2] inside it."""
    height, width = photos[0].shape[:2]
    images = np.zeros((len(photos), -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE, 3), np.float32)
    images[:, :height, :width] = photos
    return images, np.full((len(photos), 2), (height, width), np.int32)


def make_model(settings: Settings, arrays: Mapping[str, np.ndarray] | None = None, **changes) -> MaskRCNN:
    """Build our model with torchvision's state dict, or with its own initial values."""
    options = dataclasses.replace(settings.model_options, dtype=settings.dtype, **changes)
    model = MaskRCNN(settings.num_classes, options, rngs=nnx.Rngs(settings.seed))
    if arrays is not None:
        load_weights(model, arrays, source="torchvision's model")
    return model


def draw_objects(settings: Settings, boxes: np.ndarray, rng: np.random.Generator) -> Objects:
    """Draw an ellipse with a random label into each of the boxes [n, 4]."""
    y, x = np.mgrid[: settings.height, : settings.width].astype(np.float32) + 0.5
    masks = []
    for x1, y1, x2, y2 in boxes:
        masks.append(((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 < 1)
    labels = rng.integers(1, settings.num_classes, len(boxes)).astype(np.int32)
    return Objects(boxes.astype(np.float32), labels, np.stack(masks).astype(np.uint8))


def random_objects(settings: Settings, count: int, rng: np.random.Generator) -> Objects:
    """Draw objects of 8 to 60 % of the image's sides, anywhere in it."""
    size = np.array([settings.width, settings.height])
    sides = size * rng.uniform(0.08, 0.6, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * (size - sides)
    return draw_objects(settings, np.concatenate([corner, corner + sides], axis=1), rng)


def objects_that_fill_the_quota(settings: Settings, proposals: np.ndarray, wanted: int, rng) -> Objects:
    """Pick objects among an image's proposals [N, 4], few, so that ``wanted`` proposals overlap one by half.

    Trained networks propose many boxes around each object; one with random weights has to be met half-way.
    """
    proposals = proposals[(proposals[:, 2:] - proposals[:, :2]).min(axis=1) >= 4]
    overlap = np.asarray(box_iou(jnp.asarray(proposals), jnp.asarray(proposals))) >= 0.5
    covered, picked = np.zeros(len(proposals), bool), []
    while covered.sum() < min(wanted, len(proposals)):
        best = int(np.argmax((overlap & ~covered).sum(axis=1)))
        picked.append(best)
        covered |= overlap[best]
    return draw_objects(settings, proposals[picked], rng)


def make_batch(photos: Sequence[np.ndarray], objects: Sequence[Objects]) -> Batch:
    """Return the training batch of numpy arrays that our loader would make."""
    images, sizes = pad_images(photos)
    count = -(-max(len(o.labels) for o in objects) // 8) * 8
    side = mask_side(640, count)  # COCO's images have 640 pixels
    packed = [
        pack_masks([cut_out(mask) for mask in o.masks], photo.shape[:2], photo.shape[:2], side)
        for photo, o in zip(photos, objects, strict=True)
    ]

    def padded(arrays):
        return np.stack([np.pad(a, [(0, count - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays])

    gt = GroundTruth(
        boxes=padded([o.boxes for o in objects]),
        labels=padded([o.labels for o in objects]),
        masks=padded([masks for masks, *_ in packed]),
        mask_windows=padded([windows for _, windows, _ in packed]),
        mask_sizes=np.array([size for *_, size in packed], np.int32),
        valid=padded([np.ones(len(o.labels), bool) for o in objects]),
    )
    rows = np.arange(len(photos), dtype=np.int32)
    return Batch(images, sizes, sizes, rows, np.ones(len(photos), bool), gt)
