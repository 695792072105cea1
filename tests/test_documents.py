"""The documents agree with the code: commands, examples, links, tables and the map of files."""

import doctest
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import maskrcnn_jax as mr
from maskrcnn_jax import ops
from maskrcnn_jax.commands.app import parse
from maskrcnn_jax.config import config_names, to_options
from maskrcnn_jax.weights.published import PUBLISHED
from tests.children import PATIENCE
from tests.documents import CONFIGS, DOCUMENTS, PROGRAMS, ROOT, blocks, commands
from tools import options_page

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_examples_of_every_operation_give_what_they_say():
    text = "\n".join(text for language, text in blocks("ops.md") if language == "python")
    missing = [name for name in ops.__all__ if not re.search(rf"ops\.{name}\b", text)]
    assert not missing, f"docs/ops.md shows no {missing}"
    examples = doctest.DocTestParser().get_doctest(text, {}, "ops.md", "docs/ops.md", 0)
    said = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples, out=said.append)
    assert result.attempted > 30
    assert result.failed == 0, "".join(said)


# Commands


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_can_be_parsed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (own_config,) = [text for language, text in blocks("options.md") if language == "py"]
    Path("my_config.py").write_text(own_config)
    for words in commands(path):
        _check(words)


def test_commands_are_found_wherever_they_stand():
    found = [words for path in DOCUMENTS for words in commands(path)]
    assert {words[0] for words in found} == set(PROGRAMS)
    cluster = [words[1] for words in commands(ROOT / "docs" / "cluster.md") if words[0] == "maskrcnn-jax"]
    assert sorted(cluster) == ["build-tfds", "eval", "predict"] + 5 * ["train"], "3 blocks, Slurm, Kubernetes, TPU VMs"
    assert all(commands(path) for path in CONFIGS), "a config names no command"


@pytest.mark.parametrize(
    "line",
    [
        "maskrcnn-jax train --config=r50_fpn --workdir=x --config.optim.rate=1",
        "maskrcnn-jax train --config=r50_fpn --workdir=x --config.model.norm=layer",
        "maskrcnn-jax train --config=r49_fpn --workdir=x",
        "maskrcnn-jax train --config=own_dataset --workdir=x",
        "maskrcnn-jax eval --report_to=x",
        "maskrcnn-jax fly --workdir=x",
        "python tools/benchmark.py train --speed=1",
        "python tools/gone.py",
        "python -m maskrcnn_jax.gone",
        "make coffee",
        'pip install ".[gpu]"',
    ],
)
def test_a_command_that_does_not_exist_is_found(line, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"```\n{line}\n```\n")
    (words,) = commands(document)
    with pytest.raises((AssertionError, mr.UserError, ImportError)):
        _check(words)


def _check(words: list[str]) -> None:
    """Fail if a command names a file, a target, an extra or an option that does not exist."""
    program, *arguments = words
    if program == "maskrcnn-jax":
        _check_command(arguments[0], arguments[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"^\.\[([\w,]+)\]$", arguments[-1])
        assert not asked or set(asked[0].split(",")) <= set(extras), words
    elif arguments[0] == "-c":
        compile(arguments[1], "command", "exec")
    elif arguments[0] == "-m":
        spec = importlib.util.find_spec(arguments[1])
        assert spec is not None, words
        if arguments[1].startswith("maskrcnn_jax"):
            _check_options(Path(spec.origin), arguments[2:])
    elif arguments[0] in ("train.py", "eval.py", "predict.py"):
        _check_command(arguments[0].removesuffix(".py"), arguments[1:])
    else:
        # run_exported.py is copied beside the model.
        file = ROOT / ("tools/run_exported.py" if arguments[0] == "run_exported.py" else arguments[0])
        assert file.is_file(), words
        _check_options(file, arguments[1:])


def _check_command(name: str, arguments: list[str]) -> None:
    command = import_module(f"maskrcnn_jax.commands.{name.replace('-', '_')}")
    # Variables of the shell stand for paths and numbers.
    options = parse(command, [re.sub(r"\$\w+", "0", argument) for argument in arguments])
    if hasattr(getattr(options, "config", None), "to_dict"):
        config = to_options(options.config)
        starts = name != "train" or options.weights or not config.optim.frozen_stages
        assert starts, f"{arguments} would freeze stages with random values; it lacks --weights"


def _check_options(file: Path, arguments: list[str]) -> None:
    source = file.read_text()
    for option in re.findall(r"^--(\w+)", "\n".join(arguments), re.MULTILINE):
        assert re.search(rf"\"(--)?{option}\"", source), f"{file.name} has no option --{option}"


# Pages


def test_the_page_of_options_is_current():
    assert options_page.PAGE.read_text() == options_page.render(), "run python tools/options_page.py"


def test_the_page_of_options_names_every_config_and_published_weights():
    page = options_page.PAGE.read_text()
    names = [*config_names(), *PUBLISHED]
    assert [name for name in names if not re.search(rf"`{name}[`:]", page)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(path):
    targets = re.findall(r"\]\((?!http)([^)#]+)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    assert [target for target in targets if not (path.parent / target).is_file()] == []


def test_the_map_names_every_file_of_the_package():
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page[page.index("## Map") : page.index("### Where does a line belong?")]
    folders = re.findall(r"^([\w/]+)/ .*\n((?:  .*\n)+)", tree, re.MULTILINE)
    named = {f"{folder}/{name}" for folder, lines in folders for name in re.findall(r"\b([\w]+\.py)\b", lines)}
    package = ROOT / "maskrcnn_jax"
    files = {str(file.relative_to(package)) for file in package.rglob("*.py") if file.name != "__init__.py"}
    inside = {file for file in files if "/" in file}
    assert {name for name in named if not (package / name).is_file()} == set()
    assert inside - named == set()
    assert [file for file in files - inside if file not in tree] == []


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mr.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == mr.__version__


# Examples


@pytest.mark.slow
def test_the_python_of_the_documents_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as for a user
    guide = [text for language, text in blocks("python.md") if language == "python"]
    (readme,) = [text for language, text in blocks(ROOT / "README.md") if language == "python"]
    readme = re.sub(r'"torchvision:\w+"', '"runs/second"', readme)
    readme = readme.replace("photo.jpg", "data/shapes_small/val/000000000001.jpg")
    script = tmp_path / "guide.py"
    script.write_text("\n".join([f"import sys\nsys.path.insert(0, {str(ROOT)!r})", *guide, readme]))
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "box AP " in done.stdout
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2


def test_the_notebook_has_no_stored_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
def test_the_notebook_runs(optimized, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert "box AP" in json.dumps(notebook)
    assert json.loads((tmp_path / "runs" / "quickstart" / "metrics.json").read_text())["bbox_AP50"] > 0.1
