"""The documents as tests read them: their fenced blocks, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CONFIGS = sorted(ROOT.glob("configs/*.py"))
PROGRAMS = ("maskrcnn-jax", "python", "pip", "make")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str | Path) -> list[tuple[str, str]]:
    """Return the (language, text) of each fenced block of a document in docs/, or of another path, in their order."""
    return _BLOCK.findall((ROOT / "docs" / name).read_text(encoding="utf-8"))


def commands(path: Path) -> list[list[str]]:
    """Return the words of each command of a document, or of the docstring of a Python file."""
    if path.suffix == ".py":
        texts = [path.read_text(encoding="utf-8").split('"""')[1].replace("\\\\\n", "\\\n")]
    else:
        found = blocks(path)
        texts = [text for language, text in found if language in ("", "bash")]
        texts += [" ".join(item.split()) for language, text in found if language == "yaml" for item in _strings(text)]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if _mentions_program(line) for words in _programs(_split(line))]


def _split(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def _mentions_program(line: str) -> bool:
    return re.search(rf"(^|[\s/\"'])({'|'.join(PROGRAMS)}) ", line) is not None


def _programs(words: list[str]) -> Iterator[list[str]]:
    """Yield each call of a program in the words of a line, and in quoted commands among them."""
    call = []
    for word in [*words, "&&"]:
        if word in ("&&", ";"):
            if call:
                yield call
            call = []
        elif call:
            call.append(word)
        elif Path(word).name in PROGRAMS:
            call = [Path(word).name]
        elif _mentions_program(word):
            yield from _programs(_split(word.partition("=")[2] or word))


def _strings(text: str) -> Iterator[str]:
    """Yield every string in a YAML text."""

    def walk(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from walk(child)

    for document in yaml.safe_load_all(text):
        yield from walk(document)
