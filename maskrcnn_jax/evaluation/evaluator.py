"""Evaluate a model on a split of a COCO-format dataset: detect, score, and draw some of the result."""

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import numpy as np
from flax import nnx
from pycocotools.coco import COCO

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.dataset import load_dataset
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.data.loader import Loader, make_loader
from maskrcnn_jax.data.plan import training_subset
from maskrcnn_jax.distributed import gather, is_first
from maskrcnn_jax.evaluation.accuracy import measure_losses
from maskrcnn_jax.evaluation.augmented import detect_augmented
from maskrcnn_jax.evaluation.coco_metrics import evaluate, ground_truth, write_files
from maskrcnn_jax.inference.detect import Detect, make_detect, run_detection
from maskrcnn_jax.inference.draw import draw_instances, grid, shrink, side_by_side
from maskrcnn_jax.inference.views import Augmentation
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import as_path
from maskrcnn_jax.writing import replace_file

_log = logging.getLogger(__name__)

NUM_PICTURES = 12  # images drawn after an evaluation
DRAWN_SIDE = 2000  # pixels of the longer side of a picture, ground truth and predictions together
DRAWN_SCORE = 0.5  # detections below are left out of the pictures


class Evaluation(NamedTuple):
    """What an evaluation found."""

    metrics: dict  # as coco_metrics.evaluate returns them
    results: list[dict]  # COCO results
    picture: np.ndarray  # [h, w, 3] uint8, ground truth beside predictions


class _Split(NamedTuple):
    """Images to evaluate on, and what their results are called."""

    prefix: str  # of the metrics
    dataset: CocoDataset
    truth: COCO
    rows: np.ndarray  # [n] of the dataset


class Evaluator:
    """A split of a dataset, and some of the training images if wanted, ready to evaluate any number of models on."""

    def __init__(self, options: Options, categories: Categories):
        """Read the annotations.

        Args:
            options: Of the run; ``data.eval_split`` is evaluated, its first ``data.eval_limit``
              images, and ``eval_train_limit`` images of the training subset.
            categories: what the model's labels mean.

        Raises:
            UserError: when the split cannot be read or has categories that the model does not know.
        """
        self._options, self._categories = options, categories
        data = options.data
        self._split = self._load(
            "", data.eval_split, lambda dataset: np.arange(len(dataset))[: data.eval_limit or None]
        )
        self._train_split = None
        if options.eval_train_limit:
            limit = min(options.eval_train_limit, data.train_limit or options.eval_train_limit)
            self._train_split = self._load(
                "train_", data.train_split, lambda dataset: training_subset(dataset, limit, options.seed)
            )

    def _load(self, prefix: str, split: str, choose: Callable[[CocoDataset], np.ndarray]) -> _Split:
        with_flat = load_dataset(self._options.data, split, keep_flat=True)
        with_flat.categories.check_known(self._categories, split)
        dataset = with_flat.without_flat()
        rows = choose(dataset)
        if len(rows) < len(dataset):
            _log.info("evaluating %d of the %d images of %s", len(rows), len(dataset), split)
        return _Split(prefix, self._relabel(dataset), ground_truth(with_flat, rows), rows)

    def _relabel(self, dataset: CocoDataset) -> CocoDataset:
        """Give a split that lists fewer categories than the training split the labels of the model."""
        known, listed = self._categories, dataset.categories
        labels = np.zeros(listed.num_classes, np.int32)  # by label of the split
        labels[list(listed.labels)] = [known.labels[known.ids.index(i)] for i in listed.ids]
        return dataclasses.replace(dataset, categories=known, labels=labels[dataset.labels])

    def __call__(self, model: nnx.Module | Detect) -> Evaluation:
        """Detect on every image and compute COCO's metrics, and of a network the losses with ``eval_losses``.

        Several processes do this together and share the images; each returns the same.
        """
        results, metrics = self._evaluate(model, self._split)
        if self._train_split:
            metrics |= self._evaluate(model, self._train_split)[1]
        return Evaluation(metrics, results, self._draw(results))

    def evaluate_augmented(self, model: MaskRCNN, augmentation: Augmentation) -> Evaluation:
        """Evaluate without and with test-time augmentation.

        Returns:
            The evaluation with it; its metrics have those without it, too, such as ``without_tta_bbox_AP``.
        """
        _, without = self._evaluate(model, self._split)
        results = detect_augmented(
            model,
            augmentation,
            options=self._options,
            categories=self._categories,
            dataset=self._split.dataset,
            rows=self._split.rows,
        )
        results, metrics = self._score(results, self._split)
        # Losses know no augmentation.
        metrics |= {name if name.startswith("eval_") else f"without_tta_{name}": without[name] for name in without}
        return Evaluation(metrics, results, self._draw(results))

    def _evaluate(self, model: nnx.Module | Detect, split: _Split) -> tuple[list[dict], dict]:
        # Devices that cannot share a batch evenly would each detect in all of its images.
        multiple = jax.local_device_count() if isinstance(model, nnx.Module) else 1
        batches = self._make_loader(split, annotations=False, multiple=multiple)
        results = run_detection(
            make_detect(model) if isinstance(model, nnx.Module) else model,
            batches,
            image_ids=split.dataset.image_ids,
            category_ids=dict(zip(self._categories.labels, self._categories.ids, strict=True)),
            num_images=batches.num_images,
            aligned_masks=self._options.model.roi_aligned,
            workers=self._options.eval_workers,
        )
        results, metrics = self._score(results, split)
        if self._options.eval_losses and isinstance(model, nnx.Module):
            measured = measure_losses(model, self._make_loader(split, annotations=True))
            # Those of training steps have the same names, without a prefix.
            metrics |= {(split.prefix or "eval_") + name: value for name, value in measured.items()}
        return results, metrics

    def _score(self, results: list[dict], split: _Split) -> tuple[list[dict], dict]:
        """Return the results of all processes, of which each has some, and COCO's metrics of them."""
        results = [result for of_process in gather(results) for result in of_process]
        metrics = evaluate(
            split.truth,
            results,
            image_ids=split.dataset.image_ids[split.rows].tolist(),
            max_detections=self._options.model.box_detections_per_img,
        )
        return results, {split.prefix + name: value for name, value in metrics.items()}

    def batches(self) -> Loader:
        """Return the images that are evaluated, in batches without annotations."""
        return self._make_loader(self._split, annotations=False)

    def _make_loader(self, split: _Split, *, annotations: bool, multiple: int = 1) -> Loader:
        """Return batches of ``eval_batch_size`` images, or of the next multiple of a number."""
        return make_loader(
            split.dataset,
            self._options.data,
            batch_size=-(-self._options.eval_batch_size // multiple) * multiple,
            channels=self._options.model.in_channels,
            train=False,
            annotations=annotations,
            image_indices=split.rows,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    @property
    def truth(self) -> COCO:
        """Annotations of the images that are evaluated."""
        return self._split.truth

    @property
    def image_dir(self) -> Path | None:
        """Where the images lie; None if they are not files."""
        return self._split.dataset.image_dir if self._options.data.source == "coco" else None

    def read_image(self, image_id: int) -> np.ndarray | None:
        """Read an image, [h, w, 3] uint8 RGB; None if it cannot be read."""
        dataset = self._split.dataset
        (row,) = np.flatnonzero(dataset.image_ids == image_id).tolist()
        try:
            return dataset.read_image(row)
        except BrokenImageError:
            return None  # the loader has named it, and stopped unless broken images are to be skipped

    def _draw(self, results: list[dict]) -> np.ndarray:
        """Draw ground truth beside predictions for some images, evenly spread over the split."""
        _, dataset, _, evaluated = self._split
        rows = np.unique(np.linspace(0, len(evaluated) - 1, NUM_PICTURES).astype(int))
        pictures = [self.draw_image(int(dataset.image_ids[row]), results) for row in rows]
        drawn = [picture for picture in pictures if picture is not None]
        return grid(drawn or [np.full((64, 64, 3), 255, np.uint8)], 2)

    def draw_image(self, image_id: int, results: list[dict]) -> np.ndarray | None:
        """Draw an image with ground truth beside one with predictions, [h, w, 3] uint8; None if it cannot be read."""
        image = self.read_image(image_id)
        if image is None:
            return None
        dataset = self._split.dataset
        (row,) = np.flatnonzero(dataset.image_ids == image_id).tolist()
        _, labels, boxes, *_ = dataset.annotations(row)
        truth = draw_instances(
            image, boxes, [dataset.categories.name(label) for label in labels], None, dataset.rles(row)
        )
        names = dict(zip(self._categories.ids, self._categories.names, strict=True))
        found = [r for r in results if r["image_id"] == image_id and r["score"] >= DRAWN_SCORE]
        corners = np.array([r["bbox"] for r in found], np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        predicted = draw_instances(
            image,
            corners,
            [names[r["category_id"]] for r in found],
            [r["score"] for r in found],
            [r["segmentation"] for r in found],
        )
        return shrink(side_by_side(truth, predicted), DRAWN_SIDE)

    def write(self, workdir: str | os.PathLike, evaluation: Evaluation) -> None:
        """Write ``metrics.json``, ``detections.json`` and ``predictions.jpg`` into a folder, by the first process."""
        if not is_first():
            return
        write_files(workdir, evaluation.metrics, evaluation.results)
        _, picture = cv2.imencode(".jpg", evaluation.picture[..., ::-1])
        replace_file(as_path(workdir) / "predictions.jpg", picture.tobytes())
