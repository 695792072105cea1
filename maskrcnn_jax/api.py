"""Loading a model by the folder of its run, the file of its weights or their name, ready to predict."""

import importlib
import os
import pkgutil
from pathlib import Path

from ml_collections import ConfigDict

from maskrcnn_jax import configs
from maskrcnn_jax.configs import base
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.models.mask_rcnn import MaskRCNN, make_unfilled
from maskrcnn_jax.training.checkpoint import load_config, restore_model
from maskrcnn_jax.weights.convert import load_weights
from maskrcnn_jax.weights.files import read_arrays
from maskrcnn_jax.weights.published import closest_names, find_published, is_name, resolve


def load(
    source: str | os.PathLike,
    *,
    config: ConfigDict | str | os.PathLike | None = None,
    checkpoint: str | int = "latest",
    categories: Categories | str | os.PathLike | None = None,
) -> Predictor:
    """Load a model for prediction.

    Args:
      source: the folder of a run (train.py's --workdir); or the name of published weights, such as
        "torchvision:maskrcnn_resnet50_fpn_v2" (weights/published.py lists them), which are downloaded once; or a file
        of weights, .pth, .safetensors or .pkl.
      config: what the weights of a file belong to: the folder of a run, the name of a file in configs/, such as
        "torchvision_r50_fpn_v2", or a config. Runs and published weights have their own.
      checkpoint: of a run: "latest", "best" (by mask AP) or a step.
      categories: what the labels of the weights mean, or a categories.json; by default those of ``config`` where it
        is the folder of a run, else COCO's.

    Raises:
      UserError: when one of these does not exist or they do not fit each other.
    """
    source = os.fspath(source)
    if Path(source).is_dir():
        if categories is not None:
            raise UserError(f"categories are of weights; the run in {source} has its own")
        named = {"workdir": source}
    elif Path(source).suffix or is_name(source):
        named = {"weights": source}
        if categories is None and isinstance(config, str | os.PathLike) and Path(config).is_dir():
            categories = Path(config) / "categories.json"
    else:
        raise UserError(
            f"{source} is neither the folder of a run nor a file of weights nor the name of published ones; those are "
            f"{', '.join(closest_names(source))}"
        )
    config = find_config(**named, config=config)
    network, categories = load_network(config, **named, checkpoint=str(checkpoint), categories=categories)
    return Predictor(network, categories, config)


def find_config(
    *,
    workdir: str | None = None,
    weights: str | None = None,
    config: ConfigDict | str | os.PathLike | None = None,
) -> ConfigDict:
    """Return the config of a model: the given one, that of the run, or that of published weights.

    Args:
      workdir: folder of a run.
      weights: a file or name, where there is no run.
      config: as :func:`load` takes it.

    Raises:
      UserError: when there is none.
    """
    if isinstance(config, ConfigDict):
        return config
    if config is not None:
        return load_config(config, base.get_config()) if Path(config).is_dir() else _config_by_name(os.fspath(config))
    if workdir is not None:
        return load_config(workdir, base.get_config())
    if weights is not None and is_name(weights) and (name := find_published(weights).config):
        return _config_by_name(name)
    raise UserError(f"the weights {weights} need the config that they belong to, such as torchvision_r50_fpn")


def load_network(
    config: ConfigDict,
    *,
    workdir: str | None = None,
    weights: str | None = None,
    checkpoint: str = "latest",
    categories: Categories | str | os.PathLike | None = None,
) -> tuple[MaskRCNN, Categories]:
    """Load a network: of a run of train.py, or with weights from elsewhere.

    Args:
      config: as :func:`find_config` returns it.
      workdir: folder of a run.
      weights: a file or name, where there is no run.
      checkpoint: as :func:`load` takes it.
      categories: as :func:`load` takes them, for weights.

    Returns:
      The network in evaluation mode, and what its labels mean.

    Raises:
      UserError: when the config, the weights and the categories do not fit each other.
    """
    if workdir is not None:
        return restore_model(workdir, config.model, which=checkpoint)
    if categories is None:
        categories = Categories.coco(config.data.contiguous_labels)
    elif not isinstance(categories, Categories):
        categories = Categories.load(categories)
    network = make_unfilled(categories.num_classes, **config.model)
    load_weights(network, read_arrays(resolve(weights)), source=weights)
    network.eval()
    return network, categories


def _config_by_name(name: str) -> ConfigDict:
    """Return the config of a file in configs/, such as "shapes" or "paper:table=1,row=3"."""
    module, _, argument = name.partition(":")
    known = sorted(info.name for info in pkgutil.iter_modules(configs.__path__))
    if module not in known:
        raise UserError(f"there is no config {module!r}; give the folder of a run or one of {', '.join(known)}")
    get_config = importlib.import_module(f"maskrcnn_jax.configs.{module}").get_config
    return get_config(argument) if argument else get_config()
