"""The fenced blocks of the documents, for tests that run them as they stand."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[tuple[str, str]]:
    """Return the (language, text) of each fenced block of a document in docs/, in their order."""
    return _BLOCK.findall((ROOT / "docs" / name).read_text(encoding="utf-8"))
