"""What the documents show is so."""

import doctest
import re

from maskrcnn_jax import ops
from tests.documents import blocks


def test_the_examples_of_every_operation_give_what_they_say(quick_compilation):
    text = "\n".join(text for language, text in blocks("ops.md") if language == "python")
    missing = [name for name in ops.__all__ if not re.search(rf"ops\.{name}\b", text)]
    assert not missing, f"docs/ops.md shows no {missing}"
    examples = doctest.DocTestParser().get_doctest(text, {}, "ops.md", "docs/ops.md", 0)
    said = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples, out=said.append)
    assert result.attempted > 30
    assert result.failed == 0, "".join(said)
