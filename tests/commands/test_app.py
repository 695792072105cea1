"""What all commands share: the command line, configs and their overrides, and what is printed."""

import json
import logging
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import maskrcnn_jax as mr
from maskrcnn_jax.commands import app
from maskrcnn_jax.commands import check as check_command
from maskrcnn_jax.commands import eval as eval_command
from maskrcnn_jax.commands import train as train_command
from maskrcnn_jax.commands.main import COMMANDS, main
from maskrcnn_jax.errors import UserError


def train(*arguments):
    return app.parse(train_command, ["--workdir=run", *arguments]).config


def test_a_config_is_named_or_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import maskrcnn_jax as mr\n\ndef get_config():\n    return mr.load_config('r50_fpn')\n")
    named = train("--config=r50_fpn")
    assert named == mr.load_config("r50_fpn") == train(f"--config={file}") == train("--config", "r50_fpn")
    assert train("--config=paper:table=2,row=3").optim.lr == 1e-4


def test_fields_of_the_config_are_overridden():
    config = train(
        "--config.seed=3",  # before --config, and again after it
        "--config=r50_fpn",
        "--config.optim.lr=1e-4",
        "--config.model.anchor_sizes=(8,16,32,64,128)",
        "--config.data.coco_dir=a=b",
        "--config.eval_losses",
        "--noconfig.model.mask_deconv",
        "--config.seed=4",
    )
    expected = mr.load_config("r50_fpn")
    expected.seed, expected.optim.lr, expected.model.anchor_sizes = 4, 1e-4, (8, 16, 32, 64, 128)
    expected.data.coco_dir, expected.eval_losses, expected.model.mask_deconv = "a=b", True, False
    assert config.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=r50_fpn", "--workdirr=x"], ["--workdirr", "did you mean --workdir?"]),
        (["--confg=r50_fpn"], ["--confg", "did you mean --config?"]),
        (["--config=r50_fpn", "--config.batch_sise=4"], ["batch_sise", "--config.batch_size"]),
        (["--config=r50_fpn", "--config.optim.lrr=4"], ["optim.lrr", "did you mean --config.optim.lr?"]),
        (["--config=r50_fpn", "--config.lr=4"], ["--config.lr", "did you mean --config.optim.lr?"]),
        (["--config=r50_fpn", "--config.batch_size=four"], ["batch_size", "'four'"]),
        (["--config=r50_fpn", "runs"], ["'runs'"]),
        (["--config=nowhere.py"], ["nowhere.py", "r50_fpn"]),
        (["--config=paper:table=1,row=9"], ["table=1,row=9"]),
        ([], ["--config"]),
        (["--config=r50_fpn", "--num_processes=0"], ["num_processes", "'0'"]),
    ],
)
def test_a_mistyped_option_is_one_sentence_with_the_right_one(arguments, words):
    with pytest.raises(UserError) as error:
        train(*arguments)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_fields_need_a_config_to_be_in():
    with pytest.raises(UserError, match="--config, which is missing"):
        app.parse(eval_command, ["--workdir=run", "--config.seed=3"])
    assert app.parse(eval_command, ["--workdir=run"]).config is None
    checked = app.parse(check_command, ["data", "--config.data.threads=2"])
    assert (checked.dataset, checked.config.data.threads) == ("data", 2)


def test_help_lists_the_commands_and_the_options_of_one(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in listed
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        explained = capsys.readouterr().out
        assert f"\n    maskrcnn-jax {name} " in explained, "an example"
        assert ("--tfds_dir" in explained) == (name in ("eval", "build-tfds")), "options of other commands"
        assert "grain" not in explained
    main(["--version"])
    assert capsys.readouterr().out == f"maskrcnn-jax {mr.__version__}\n"


def test_a_mistyped_command_is_one_sentence_with_the_right_one(capsys):
    with pytest.raises(SystemExit) as left:
        main(["exprot"])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "exprot" in line and line.endswith("did you mean export?")


def test_help_and_mistyped_options_do_not_wait_for_jax():
    code = """
import sys
from maskrcnn_jax.commands.main import main
main(["--help"])
try:
    main(["train", "--config=r50_fpn", "--workdr=x"])
except SystemExit:
    assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_messages_are_sentences_on_stdout_and_warnings_on_stderr(terminal, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])  # as absl adds one
    app.set_up_logging()
    app.set_up_logging()
    log = logging.getLogger("maskrcnn_jax.training.loop")
    log.info("starting at step %d", 3)
    log.warning("an image is broken")
    printed = capsys.readouterr()
    assert printed.out == "starting at step 3\n"
    assert printed.err == "warning: an image is broken\n"


def test_an_unexpected_error_keeps_its_traceback_and_a_users_is_one_line(terminal, capsys):
    def fail(error):
        def main(options):
            raise error

        return SimpleNamespace(__doc__="Fail.", add_options=lambda parser: None, main=main)

    with pytest.raises(SystemExit) as left:
        app.run_command(fail(UserError("give another")), [])
    assert left.value.code == 1
    assert capsys.readouterr().err == "error: give another\n"
    with pytest.raises(KeyError):
        app.run_command(fail(KeyError("bug")), [])


def test_paths_with_a_tilde_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = app.parse(eval_command, ["--workdir=~/run", "--report=~/page.html", "--output", "~/a/~b"])
    assert (options.workdir, options.report) == (f"{tmp_path}/run", f"{tmp_path}/page.html")
    assert options.output == f"{tmp_path}/a/~b"


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "cp1252:strict"])
def test_a_terminal_that_lacks_letters_shows_them_escaped(shapes, tmp_path, encoding):
    root = shutil.copytree(shapes, tmp_path / "caf\u00e9 \u65e5\u672c")
    for split in ("train2017", "val2017"):
        path = root / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = "\u732b \U0001f408"
        first = content["images"][0]
        (root / split / first["file_name"]).rename(root / split / "\u00e9\u65e5.jpg")
        first["file_name"] = "\u00e9\u65e5.jpg"
        path.write_text(json.dumps(content))
    (root / "train2017" / "\u00e9\u65e5.jpg").write_bytes(b"")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "maskrcnn_jax.commands.main", "check", str(root), "--config=shapes"]
    done = subprocess.run(command, capture_output=True, env=environment)
    printed = done.stdout.decode(encoding.partition(":")[0])
    assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr.decode()
    assert "\\u65e5.jpg is empty" in printed and "in 2 splits." in printed
