"""A loader by keyword arguments, whichever of them are options of the data."""

import dataclasses

from maskrcnn_jax.data.loader import Loader, make_loader
from maskrcnn_jax.options import DataOptions

_FIELDS = {field.name for field in dataclasses.fields(DataOptions)}


def load(index, **settings) -> Loader:
    """Build a loader, without augmentation unless asked for."""
    options = DataOptions(**{"hflip": 0.0} | {k: v for k, v in settings.items() if k in _FIELDS})
    return make_loader(index, options, **{k: v for k, v in settings.items() if k not in _FIELDS})
