"""What the commands share: options, logging, errors in one sentence, and the model that the user names."""

import argparse
import contextlib
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import maskrcnn_jax as mr
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path, cache_dir, expand

if TYPE_CHECKING:
    from maskrcnn_jax.inference.predictor import Predictor


def run_command(command: ModuleType, arguments: Sequence[str] | None = None, *, name: str | None = None) -> None:
    """Run a command; exit with status 1 and one line on stderr if it raises UserError.

    Args:
        command: A module with a docstring, ``add_options(parser)`` and ``main(options)``.
        arguments: Its command line. Defaults to that of this process.
        name: What the user types to call it. Defaults to the name of the script.
    """
    _print_any_text()
    try:
        options = parse(command, sys.argv[1:] if arguments is None else arguments, name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    from maskrcnn_jax.distributed import join, leave  # imports JAX

    try:
        if hasattr(options, "distributed"):
            join(options.coordinator_address, options.num_processes, options.process_id, search=options.distributed)
        set_up_logging()
        _keep_compiled_programs()
        command.main(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(1)


def _print_any_text() -> None:
    """Escape letters that the terminal cannot show, such as of a file name, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # otherwise somebody has replaced it
            stream.reconfigure(errors="backslashreplace")


_OVERRIDE = re.compile(r"--(no)?config\.")  # such as --config.optim.lr=1e-4


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(command: ModuleType, arguments: Sequence[str], name: str | None = None) -> argparse.Namespace:
    """Parse the command line of a command; its option ``config``, if it has one, becomes a ConfigDict.

    Raises:
        UserError: if there is no such option or config, or one has a value that is not allowed.
    """
    parser = _Parser(
        name,
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    known = ["--help", *re.findall(r"--\w+", parser.format_usage())]
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") and not _OVERRIDE.match(option) and option not in known:
            raise UserError(f"there is no option {option}; {_hint(option, known, parser)}")
    options, overrides = parser.parse_known_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, str):
            setattr(options, name, expand(value))
    if isinstance(getattr(options, "config", None), str):
        options.config = mr.load_config(options.config)
    unexpected = [argument for argument in overrides if not _OVERRIDE.match(argument)]
    if unexpected:
        raise UserError(f"{unexpected[0]!r} is unexpected; options are written --name=value, see {parser.prog} --help")
    if overrides and getattr(options, "config", None) is None:
        raise UserError(f"{overrides[0]} changes a field of --config, which is missing; give --config")
    for argument in overrides:
        option = re.split(r"[=\[]", argument.replace("--noconfig.", "--config."))[0]
        fields = [f"--config.{field}" for field in _field_names(options.config)]
        if option not in fields:
            raise UserError(f"there is no option {option}; {_hint(option, fields, parser)}")
    if overrides:
        options.config = _override(options.config, overrides)
    return options


def _hint(option: str, known: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Return the options that are spelt nearly as this one, or that differ only in the part of the config."""
    last_parts = [name.rpartition(".")[2].lstrip("-") for name in known]
    close = difflib.get_close_matches(option.rpartition(".")[2].lstrip("-"), last_parts)
    names = [name for name, part in zip(known, last_parts, strict=True) if part in close]
    return f"did you mean {' or '.join(names)}?" if names else f"see {parser.prog} --help"


def _field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Return the names of all fields, such as "optim.lr"."""
    names: list[str] = []
    for name, value in config.items():
        names += _field_names(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return names


def _override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
    """Return a config with the values of arguments ``--config.FIELD=VALUE``."""
    values, arguments = flags.FlagValues(), ["", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        values(arguments)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error).splitlines()[-1].removeprefix("flag ")) from None
    return values["config"].value


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which several processes of a command find each other; ``run_command`` reads them."""
    group = parser.add_argument_group("several hosts", "srun and mpirun need none of these")
    group.add_argument("--distributed", action="store_true", help="join the other workers of a Cloud TPU")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=at_least(1), metavar="N", help="number of processes in this job")
    group.add_argument("--process_id", type=at_least(0), metavar="N", help="index of this process, from 0")


def add_run_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the options that name a run and its checkpoint."""
    parser.add_argument("--workdir", required=required, metavar="DIR", help="folder of a training run")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        help="checkpoint of the run: latest, best (by best_metric of its options, mask AP by default) or a step",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model, a run or weights; ``load`` reads them."""
    add_run_options(parser)
    parser.add_argument(
        "--weights",
        metavar="FILE|NAME",
        help="instead of a run: .pth, .safetensors, .pkl, an exported .onnx, or published weights such as "
        "torchvision:maskrcnn_resnet50_fpn_v2",
    )
    parser.add_argument("--config", help="config of the weights, by name or file; published weights have their own")
    parser.add_argument(
        "--categories", metavar="FILE", help="categories.json of the weights; COCO's categories if not given"
    )


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how a model is computed; ``load`` reads them."""
    parser.add_argument(
        "--runtime", choices=("openvino", "onnxruntime"), help="what runs an .onnx file; openvino if installed"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, in JAX or openvino")


def at_least(low: int):
    """Return a type of options: whole numbers from ``low``."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low}")
        return int(text)

    return number


def comma_separated(text: str) -> list[str]:
    """Return the parts of an option such as ``train2017,val2017``."""
    return text.split(",")


def load(options: argparse.Namespace) -> "Predictor":
    """Load the model that the user named.

    Raises:
        UserError: if the options contradict each other, or there is no such model.
    """
    if (options.workdir is None) == (options.weights is None):
        raise UserError("give either --workdir, the folder of a training run, or --weights")
    if options.workdir is not None and not as_path(options.workdir).is_dir():
        raise UserError(f"--workdir={options.workdir} is not a folder; give that of a training run")
    return mr.load(
        options.workdir or options.weights,
        config=options.config,
        checkpoint=options.checkpoint,
        categories=options.categories,
        runtime=getattr(options, "runtime", None),
        bf16=getattr(options, "bf16", False),
    )


class _Terminal(logging.Handler):
    """Prints messages above the progress bars: information to stdout, warnings to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        message = self.format(record)
        if record.levelno < logging.WARNING:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
        else:
            tqdm.write(f"{record.levelname.lower()}: {message}", file=sys.stderr)


def set_up_logging() -> None:
    """Print the library's messages, hide noise of other libraries; only the first process prints information."""
    import jax

    from maskrcnn_jax.distributed import is_first

    logger = logging.getLogger("maskrcnn_jax")
    if not logger.handlers:
        logger.addHandler(_Terminal())
        logger.propagate = False  # absl adds a handler to the root logger
    # A single process does not ask JAX: that would reserve GPU memory for commands that do not use it.
    first = not jax.distributed.is_initialized() or is_first()
    logger.setLevel(logging.INFO if first else logging.WARNING)  # each process reads images of its own
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs errors that it also raises
    sys.unraisablehook = _print_unraisable


def _is_news(record: logging.LogRecord) -> bool:
    # Orbax raises the errors that it also logs, and warns of checkpoints without metrics. When a write fails, the
    # error of the first array is raised, and asyncio reports the others as well.
    return "orbax" not in Path(record.pathname).parts and "exception was never retrieved" not in record.getMessage()


def _print_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    # Once the first of many arrays has failed, nobody waits for the others.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _keep_compiled_programs() -> None:
    """Keep compiled programs between runs, unless the user has chosen a folder for them or cannot write at home."""
    import jax

    folder = cache_dir()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError):
        (folder / "xla").mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
