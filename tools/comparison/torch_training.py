"""Trains torchvision's Mask R-CNN with torch alone, from the options of ours.

The data pipeline is torchvision's: pycocotools' masks, transforms v2, and the resizing inside the model. Its rules are
those of torchvision's reference training: crowds and boxes without an area are left out, and incomplete batches are
dropped. Images without objects stay, as here.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import OptimOptions, Options
from tools.torchvision_reference import build_reference, import_torchvision, load_reference

_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.LayerNorm)
Curve = list[dict[str, float]]  # of each logged step: its number, "loss" and the loss terms


class TorchImages(Dataset):
    """Images [3, h, w] in 0..1 and targets, as torchvision's detectors take them."""

    def __init__(self, dataset: CocoDataset, rows: np.ndarray, hflip: float):
        """Read the annotations.

        Args:
            dataset: names the files and the labels of the categories.
            rows: of its images, [n] int.
            hflip: probability of a horizontal flip.
        """
        import_torchvision()
        from torchvision.transforms import v2

        with contextlib.redirect_stdout(io.StringIO()):
            self._coco = COCO(str(dataset.annotation_path))
        self._dataset, self._rows = dataset, rows
        self._labels = dict(zip(dataset.categories.ids, dataset.categories.labels, strict=True))
        steps = [
            v2.ToImage(),
            v2.RandomHorizontalFlip(hflip),
            v2.ToDtype(torch.float32, scale=True),
            v2.ToPureTensor(),
        ]
        self._transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        from torchvision.tv_tensors import BoundingBoxes, Mask

        row = int(self._rows[i])
        image = Image.open(self._dataset.image_path(row)).convert("RGB")
        found = self._coco.imgToAnns[int(self._dataset.image_ids[row])]
        found = [annotation for annotation in found if not annotation.get("iscrowd", 0)]
        boxes = torch.tensor([annotation["bbox"] for annotation in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=image.width)
        boxes[:, 1::2].clamp_(min=0, max=image.height)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        found = [annotation for annotation, keep in zip(found, kept.tolist(), strict=True) if keep]
        masks = np.zeros((len(found), image.height, image.width), np.uint8)
        for mask, annotation in zip(masks, found, strict=True):
            mask[:] = self._coco.annToMask(annotation)
        labels = [self._labels[annotation["category_id"]] for annotation in found]
        return self._transform(
            image,
            {
                "boxes": BoundingBoxes(boxes[kept], format="XYXY", canvas_size=(image.height, image.width)),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "masks": Mask(masks),
            },
        )


def make_torch_optimizer(model: torch.nn.Module, optim: OptimOptions) -> torch.optim.Optimizer:
    """Build torch's optimizer: one group of parameters with weight decay, and one without."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": optim.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decayed = optim.decay_norms if isinstance(module, _NORMS) else name != "bias" or optim.decay_biases
            if parameter.requires_grad:
                groups[0 if decayed else 1]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if optim.kind == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.b1, optim.b2))


def make_torch_schedule(
    optimizer: torch.optim.Optimizer, optim: OptimOptions, num_steps: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build torch's schedule: LinearLR, then CosineAnnealingLR, MultiStepLR or ConstantLR."""
    schedules = torch.optim.lr_scheduler
    warmup_steps = min(optim.warmup_steps, num_steps // 10)
    after: torch.optim.lr_scheduler.LRScheduler
    if optim.schedule == "cosine":
        end = optim.lr * optim.final_lr_fraction
        after = schedules.CosineAnnealingLR(optimizer, num_steps - warmup_steps, eta_min=end)
    elif optim.schedule == "multistep":
        unit = steps_per_epoch if optim.milestone_unit == "epochs" else 1
        milestones = [int(milestone) * unit - warmup_steps for milestone in optim.milestones]
        after = schedules.MultiStepLR(optimizer, milestones, gamma=optim.gamma)
    else:
        after = schedules.ConstantLR(optimizer, factor=1.0)
    if not warmup_steps:
        return after
    linear = schedules.LinearLR(optimizer, start_factor=optim.warmup_factor, total_iters=warmup_steps)
    return schedules.SequentialLR(optimizer, [linear, after], milestones=[warmup_steps])


def train_torchvision(
    options: Options,
    dataset: CocoDataset,
    rows: np.ndarray,
    initial: Mapping[str, np.ndarray],
    num_steps: int,
    steps_per_epoch: int,
) -> tuple[dict[str, np.ndarray], Curve]:
    """Train torchvision's model.

    Args:
        options: of the run.
        dataset: to train on.
        rows: of the images of the dataset that take part.
        initial: state dict to start from.
        num_steps: of the training.
        steps_per_epoch: for milestones in epochs; incomplete batches count.

    Returns:
        The state dict after training, and the curve: means over the steps since the point before.

    Raises:
        UserError: if the loss is not finite.
    """
    torch.manual_seed(options.seed)  # of flips and samples
    data, optim = options.data, options.optim
    images = TorchImages(dataset, rows, data.hflip)
    if len(images) < options.batch_size:
        raise UserError(f"batch_size {options.batch_size} is larger than the {len(images)} training images; lower it")
    loader = DataLoader(
        images,
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=data.workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(options.seed),
    )
    model = build_reference(
        options.model, dataset.categories.num_classes, min_size=data.short_side, max_size=data.long_side
    )
    load_reference(model, initial)
    model.train()
    optimizer = make_torch_optimizer(model, optim)
    schedule = make_torch_schedule(optimizer, optim, num_steps, steps_per_epoch)
    curve, since = [], []
    progress = tqdm(range(1, num_steps + 1), desc="torchvision", unit="step", leave=False)
    for step, (batch, targets) in zip(progress, _epochs(loader), strict=False):
        terms = model(list(batch), list(targets))
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        schedule.step()
        since.append({"loss": loss.item()} | {name: term.item() for name, term in terms.items()})
        if not np.isfinite(since[-1]["loss"]):
            raise UserError(f"torchvision's loss at step {step} is not finite; lower optim.lr")
        if step == num_steps or (options.log_every and step % options.log_every == 0):
            curve.append({"step": step} | {name: float(np.mean([row[name] for row in since])) for name in since[0]})
            since.clear()
            progress.set_postfix_str(f"loss {curve[-1]['loss']:.3f}")
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}, curve


def _collate(samples: Sequence[tuple]) -> tuple:
    return tuple(zip(*samples, strict=True))  # images differ in size, so that they cannot be stacked


def _epochs(loader: DataLoader) -> Iterator[tuple]:
    while True:
        yield from loader
