"""Train, evaluate and load models from Python; the commands call the same functions."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.dataset import load_whole
from maskrcnn_jax.data.held_out import record_held_out
from maskrcnn_jax.distributed import gather, is_first
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import format_table
from maskrcnn_jax.evaluation.evaluator import Evaluation, Evaluator
from maskrcnn_jax.inference.detect import with_options
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.inference.runtimes import load_onnx
from maskrcnn_jax.inference.views import Augmentation
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.models.unfilled import make_unfilled
from maskrcnn_jax.ops.precision import bfloat16_is_faster
from maskrcnn_jax.options import ModelOptions, Options
from maskrcnn_jax.paths import absolute, as_path, expand
from maskrcnn_jax.run_folder import SPLIT_FILE, has_checkpoint, load_model, load_options, locked
from maskrcnn_jax.training import loop
from maskrcnn_jax.weights.convert import load_weights
from maskrcnn_jax.weights.files import read_arrays
from maskrcnn_jax.weights.published import closest_names, find_published, is_name, resolve

_log = logging.getLogger(__name__)

# A config, its options, the name or path of a configuration file, or the folder of a run.
Config: TypeAlias = ConfigDict | Options | str | os.PathLike


def load(
    source: str | os.PathLike,
    *,
    config: Config | None = None,
    checkpoint: str | int = "latest",
    categories: Categories | str | os.PathLike | None = None,
    runtime: str | None = None,
    bf16: bool = False,
) -> Predictor:
    """Load a model for prediction.

    Args:
        source: The folder of a run; the name of published weights, such as "torchvision:maskrcnn_resnet50_fpn_v2",
            which are downloaded once; a file of weights, .pth, .safetensors or .pkl; or an exported file, .onnx.
        config: What the weights of a file belong to: the folder of a run, the name or path of a configuration file,
            such as "torchvision_r50_fpn_v2", or a config. Runs and published weights have their own.
        checkpoint: Of a run: "latest", "best" (by the option ``best_metric``) or a step.
        categories: What the labels of the weights mean, or a categories.json. Defaults to those of ``config`` if it is
            the folder of a run, else to COCO's.
        runtime: Of an .onnx file: "openvino" or "onnxruntime"; the first of them that is installed if not given.
        bf16: Compute in bfloat16: in OpenVINO, for an .onnx file, or in JAX, unless the processor is slower with it;
            a warning says when it is float32 all the same.

    Raises:
        UserError: if one of these does not exist or they do not fit each other.
    """
    source = expand(source)
    ending = as_path(source).suffix.lower()
    if ending == ".mrcnn":
        raise UserError(
            f"{source} is for programs without this package, see tools/run_exported.py; load the run or the weights "
            "that it is from, or export it as .onnx"
        )
    if ending == ".onnx":
        if config is not None or categories is not None or checkpoint != "latest":
            raise UserError(f"{source} has its own config and categories, and no checkpoints; leave them out")
        return load_onnx(source, runtime=runtime, bf16=bf16)
    if runtime is not None:
        raise UserError(f"{source} runs in JAX; runtimes are for .onnx files, which maskrcnn-jax export writes")
    if as_path(source).is_dir():
        if categories is not None:
            raise UserError(f"categories are for weights; the run in {source} has its own")
        options = _in_bfloat16(load_options(source) if config is None else find_options(config), bf16)
        network, categories = load_model(source, options, checkpoint=str(checkpoint))
        return Predictor(network, categories, options)
    if not as_path(source).suffix and not is_name(source):
        raise UserError(
            f"{source} is neither the folder of a run, a file of weights nor the name of published weights; those are "
            f"{', '.join(closest_names(source))}"
        )
    if checkpoint != "latest":
        raise UserError(f"{source} has no checkpoints, as runs have; leave checkpoint out")
    published = find_published(source).config if is_name(source) else None
    if config is None and published is None:
        raise UserError(f"the weights {source} need the config that they belong to, such as torchvision_r50_fpn")
    if categories is None and isinstance(config, str | os.PathLike) and as_path(config).is_dir():
        categories = as_path(config) / "categories.json"
    options = _in_bfloat16(find_options(published if config is None else config), bf16)
    return Predictor(*_load_weights(source, options, categories), options)


def _in_bfloat16(options: Options, wanted: bool) -> Options:
    """Return the options with which a network computes in bfloat16, if that is wanted and faster."""
    if wanted and not bfloat16_is_faster():
        _log.warning("bfloat16 is slower than float32 on this processor; the model computes in float32")
    elif wanted:
        return dataclasses.replace(options, model=dataclasses.replace(options.model, dtype="bfloat16"))
    return options


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
    profile_steps: int = 0,
) -> None:
    """Train a model, resuming from the newest checkpoint in ``workdir`` if there is one.

    Afterwards ``load(workdir)`` returns the trained model. Progress is logged under the name "maskrcnn_jax".

    Args:
        config: A config, or the name or path of a configuration file.
        workdir: Folder for checkpoints, metrics and pictures; created if it does not exist.
        weights: What a new run starts from: a file of weights, of a whole model or of a backbone, or the name of
            published weights.
        profile_steps: Trace so many steps, from the third of this start on, and write the trace of ``jax.profiler``
            into ``workdir/profile``.

    Raises:
        UserError: if the config, the data and the folder do not fit each other, or a loss is not finite.
    """
    workdir, options = as_path(workdir), find_options(config)
    with locked(absolute(workdir)) if is_first() else contextlib.nullcontext():
        _train(_hold_out(options, workdir), workdir, weights, profile_steps)


def _train(options: Options, workdir: Path, weights: str | os.PathLike | None, profile_steps: int) -> None:
    def make_evaluate(categories):
        evaluator = Evaluator(options, categories)

        def evaluate(model):
            evaluation = evaluator(model)
            evaluator.write(workdir, evaluation)
            _log.info("\n%s", format_table(evaluation.metrics))
            return evaluation

        return evaluate

    initialize = functools.partial(_initialize, source=expand(weights)) if weights else None
    loop.train(options, workdir, make_evaluate=make_evaluate, initialize=initialize, profile_steps=profile_steps)


def _hold_out(options: Options, workdir: Path) -> Options:
    """Return options that name the file of the images held out for evaluation, which a new run writes."""
    data = options.data
    if data.val_group and not data.val_share:
        _log.warning("data.val_group %r has no effect without data.val_share", data.val_group)
    if not data.val_share or data.split_file:
        return options
    path, is_started = workdir / SPLIT_FILE, has_checkpoint(workdir)
    if is_started:
        before = load_options(workdir).data
        if (before.val_share, before.val_group) != (data.val_share, data.val_group):
            raise UserError(
                f"{workdir} was started with data.val_share {before.val_share} and data.val_group "
                f"{before.val_group!r}; resume it with these, or use another workdir"
            )
    if not is_started or not path.is_file():
        dataset = load_whole(data, data.train_split)
        if is_first():
            record_held_out(path, dataset, share=data.val_share, group=data.val_group, seed=options.seed)
    gather(None)  # the other processes read what the first has written
    return dataclasses.replace(options, data=dataclasses.replace(data, split_file=str(path)))


def _initialize(model: MaskRCNN, source: str) -> None:
    """Fill a new model with weights from elsewhere."""
    _log.info("%s", load_weights(model, read_arrays(resolve(source)), source=source, partial=True))


def evaluate(
    model: Predictor,
    dataset: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    max_detections: int | None = None,
    tta: str | int | Iterable[str | int] | None = None,
    output: str | os.PathLike | None = None,
) -> Evaluation:
    """Compute COCO's box and mask AP of a model.

    Args:
        model: As ``load`` returns it.
        dataset: Folder of a dataset in COCO's layout. Defaults to the dataset that the model was trained on.
        split: Of the dataset. Defaults to the split that the options of the model name.
        limit: Evaluate only the first so many images; 0 means all. Defaults to all images of a dataset or split named
            here, else to ``data.eval_limit`` of the options of the model.
        max_detections: Detections of an image, other than ``model.box_detections_per_img`` of the model. Above 100,
            all metrics count as many, and a recall such as ``bbox_AR300`` is added.
        tta: Test-time augmentation, as ``Predictor.predict`` takes it. The metrics then have those without it, too,
            such as ``without_tta_bbox_AP``.
        output: Folder for ``metrics.json``, ``detections.json`` and ``predictions.jpg``, if wanted.

    Returns:
        ``metrics``, a dict such as ``{"bbox_AP": 0.38, ...}``; ``results``, COCO results; ``picture``, ground truth
        beside predictions.

    Raises:
        UserError: if the dataset cannot be read or has categories that the model does not know.
    """
    options = evaluation_options(
        model.options, coco_dir=dataset, split=split, limit=limit, max_detections=max_detections
    )
    evaluator = Evaluator(options, model.categories)
    evaluation = measure(evaluator, model, options.model, None if tta is None else Augmentation.parse(tta))
    if output is not None:
        evaluator.write(expand(output), evaluation)
    return evaluation


def evaluation_options(
    options: Options,
    *,
    coco_dir: str | os.PathLike | None = None,
    tfds_dir: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
    max_detections: int | None = None,
) -> Options:
    """Return options for evaluating on another dataset or split than those of the training, and then all of it."""
    changes: dict = {}
    if (coco_dir, tfds_dir, split) != (None, None, None):
        changes["eval_limit"] = 0
    if coco_dir is not None:
        changes |= {"source": "coco", "coco_dir": os.fspath(coco_dir)}
    if tfds_dir is not None:
        changes |= {"source": "tfds", "tfds_dir": os.fspath(tfds_dir)}
    if split is not None:
        changes |= {"eval_split": split, "val_share": 0.0, "split_file": ""}
    if limit is not None:
        changes["eval_limit"] = limit
    data = dataclasses.replace(options.data, **changes)
    most = options.model.box_detections_per_img if max_detections is None else max_detections
    network = dataclasses.replace(options.model, box_detections_per_img=most)
    # Training images are measured only by evaluations during training.
    return dataclasses.replace(options, data=data, model=network, eval_train_limit=0)


def measure(
    evaluator: Evaluator, model: Predictor, options: ModelOptions, augmentation: Augmentation | None
) -> Evaluation:
    """Evaluate the network of a model with these options, or an exported file, which has its own.

    Raises:
        UserError: if an exported file has others.
    """
    if augmentation is not None:
        return evaluator.evaluate_augmented(with_options(model.network, options), augmentation)
    if model.has_network:
        return evaluator(with_options(model.network, options))
    if options != model.options.model:
        raise UserError("an exported file finds as many detections as it was exported for; leave max_detections out")
    return evaluator(model.detect)


def find_options(config: Config) -> Options:
    """Return the options of a config, a configuration file or a run.

    Raises:
        UserError: if there is no such file, or an option has a value that is not allowed.
    """
    if isinstance(config, Options):
        return config
    if isinstance(config, ConfigDict):
        return to_options(config)
    config = expand(config)
    return load_options(config) if as_path(config).is_dir() else to_options(load_config(config))


def _load_weights(
    source: str, options: Options, categories: Categories | str | os.PathLike | None
) -> tuple[MaskRCNN, Categories]:
    """Return a network in evaluation mode with weights from elsewhere, and what its labels mean."""
    if categories is None:
        categories = Categories.coco(options.data.contiguous_labels)
    elif not isinstance(categories, Categories):
        categories = Categories.load(expand(categories))
    network = make_unfilled(categories.num_classes, options.model)
    load_weights(network, read_arrays(resolve(source)), source=source)
    network.eval()
    return network, categories
