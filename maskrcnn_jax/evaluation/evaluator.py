"""Evaluate a model on a split of a COCO-format dataset: detect, score, and draw some of the result."""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from maskrcnn_jax.data.coco import BrokenImageError, Categories, load_index
from maskrcnn_jax.data.loader import make_loader
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_eval import evaluate, load_annotations, write_files
from maskrcnn_jax.evaluation.inference import make_detect, run_detection
from maskrcnn_jax.evaluation.visualize import draw_instances, grid, side_by_side

NUM_PICTURES = 12  # images drawn after an evaluation
DRAWN_SCORE = 0.5  # detections below are left out of the pictures


class Evaluation(NamedTuple):
    """What an evaluation found."""

    metrics: dict  # as evaluation.coco_eval.evaluate returns it
    results: list[dict]  # COCO results
    picture: np.ndarray  # [h, w, 3] uint8, ground truth beside predictions


class Evaluator:
    """A split of a dataset, ready to evaluate any number of models on."""

    def __init__(self, config: ConfigDict, categories: Categories):
        """Read the annotations.

        Args:
          config: as configs/base.py describes it; ``data.eval_split`` of ``data.coco_dir`` is evaluated, its first
            ``data.eval_limit`` images.
          categories: what the model's labels mean.

        Raises:
          UserError: when the split cannot be read or has categories that the model does not know.
        """
        self._config, self._categories = config, categories
        data = config.data
        self._index = load_index(data.coco_dir, data.eval_split, skip_broken=data.skip_broken)
        known = set(zip(categories.ids, categories.names, strict=True))
        unknown = sorted(set(zip(self._index.categories.ids, self._index.categories.names, strict=True)) - known)
        if unknown:
            raise UserError(
                f"{data.eval_split} has categories {unknown[:3]} that the model was not trained on; evaluate on a "
                "dataset with the categories of the training set"
            )
        self._coco = load_annotations(Path(data.coco_dir) / "annotations" / f"instances_{data.eval_split}.json")
        limit = data.eval_limit or len(self._index)
        self._rows = np.arange(min(limit, len(self._index)))

    def __call__(self, model: nnx.Module) -> Evaluation:
        """Detect on every image and compute COCO's metrics."""
        data = self._config.data
        loader = make_loader(
            self._index,
            batch_size=self._config.eval_batch_size,
            channels=self._config.model.in_channels,
            short_side=data.short_side,
            long_side=data.long_side,
            buckets=data.buckets,
            resize=data.resize,
            shuffle=False,
            annotations=False,
            image_indices=self._rows,
            threads=data.threads,
            workers=data.workers,
            prefetch=data.prefetch,
            skip_broken=data.skip_broken,
        )
        results = run_detection(
            make_detect(model),
            loader,
            image_ids=self._index.image_ids,
            category_ids=dict(zip(self._categories.labels, self._categories.ids, strict=True)),
            num_images=len(self._rows),
            aligned_masks=self._config.model.roi_aligned,
            workers=self._config.eval_workers,
        )
        metrics = evaluate(self._coco, results, image_ids=self._index.image_ids[self._rows].tolist())
        return Evaluation(metrics, results, self._draw(results))

    def _draw(self, results: list[dict]) -> np.ndarray:
        """Draw ground truth beside predictions for some images, evenly spread over the split."""
        names = dict(zip(self._categories.ids, self._categories.names, strict=True))
        rows = np.unique(np.linspace(0, len(self._rows) - 1, NUM_PICTURES).astype(int))
        by_image = {int(self._index.image_ids[row]): [] for row in rows}
        for result in results:
            if result["image_id"] in by_image and result["score"] >= DRAWN_SCORE:
                by_image[result["image_id"]].append(result)
        pictures = []
        for row in rows:
            try:
                image = self._index.read_image(row)
            except BrokenImageError:
                continue  # the loader has named it, and stopped unless broken images are to be skipped
            _, labels, boxes, _ = self._index.annotations(row)
            truth = draw_instances(
                image, boxes, [self._index.categories.name(label) for label in labels], None, self._index.masks(row)
            )
            found = by_image[int(self._index.image_ids[row])]
            corners = np.array([r["bbox"] for r in found], np.float32).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            predicted = draw_instances(
                image,
                corners,
                [names[r["category_id"]] for r in found],
                [r["score"] for r in found],
                [r["segmentation"] for r in found],
            )
            pictures.append(side_by_side(truth, predicted))
        return grid(pictures or [np.full((64, 64, 3), 255, np.uint8)], 2)

    def write(self, workdir: str | Path, evaluation: Evaluation) -> None:
        """Write ``metrics.json``, ``detections.json`` and ``predictions.jpg`` into a folder."""
        write_files(workdir, evaluation.metrics, evaluation.results)
        cv2.imwrite(str(Path(workdir) / "predictions.jpg"), evaluation.picture[..., ::-1])
