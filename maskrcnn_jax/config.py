"""Configs: the options as a ConfigDict that files change and command lines override, and the files by name.

A configuration file is a Python file with a function ``get_config()``, which returns a ``ConfigDict``. It starts from
``default_config()`` or from another file, ``load_config("r50_fpn")``, and changes a few fields.
"""

import dataclasses
import os
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import expand


def default_config() -> ConfigDict:
    """Return the default of every option."""
    return ConfigDict(dataclasses.asdict(Options()))


def to_options(config: ConfigDict) -> Options:
    """Check a config and return its options.

    Raises:
        UserError: if an option does not exist or has a value that is not allowed; names all of them.
    """
    return _build(Options(), config.to_dict(), "")


def config_names() -> list[str]:
    """Return the names of the configuration files that come with the package."""
    return sorted(path.stem for path in _config_dir().glob("*.py"))


def find_config_file(name: str) -> Path:
    """Return the path of a configuration file.

    Args:
        name: A name such as "r50_fpn", or a path.

    Raises:
        UserError: if there is no such file.
    """
    if name in config_names():
        return _config_dir() / f"{name}.py"
    path = Path(expand(name))
    if path.suffix == ".py" and path.is_file():
        return path
    raise UserError(f"there is no config {name!r}; give the path of a file or one of {', '.join(config_names())}")


def load_config(name: str | os.PathLike) -> ConfigDict:
    """Return the config of a file.

    Args:
        name: A name or path as for :func:`find_config_file`. What follows a colon is the argument of ``get_config``,
            such as "paper:table=1,row=3".

    Raises:
        UserError: if there is no such file, or it refuses the argument.
    """
    file, _, argument = os.fspath(name).partition(":")
    get_config = runpy.run_path(str(find_config_file(file)))["get_config"]
    return get_config(argument) if argument else get_config()


def _config_dir() -> Path:
    """Return the folder of the configuration files: inside the installed package, or at the top of the repository."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def _build(defaults, values: dict, prefix: str):
    """Return options of the type of ``defaults`` with these values."""
    fields = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    unknown = [prefix + name for name in values if name not in fields]
    if unknown:
        raise UserError(f"there is no option {', '.join(unknown)}; docs/options.md lists all of them")
    parts = {
        name: _build(fields[name], value, f"{prefix}{name}.") if dataclasses.is_dataclass(fields[name]) else value
        for name, value in values.items()
    }
    return dataclasses.replace(defaults, **parts)
