"""The table of findings."""

import json
import re

import pytest

from maskrcnn_jax.data.findings import Collector, Kind, Mend, Severity
from tests.checking.dataset_faults import FAULTS

# Kinds without a way to damage a training split in tests/checking/dataset_faults.py; other tests produce them.
PRODUCED_ELSEWHERE = {
    Kind.UNREADABLE,
    Kind.NOTHING_USABLE,
    Kind.IGNORED,
    Kind.ZERO_ID,
    Kind.NO_EVALUATION,
    Kind.UNLEARNED_CATEGORY,
}


def test_every_kind_is_produced_by_a_test():
    assert set(Kind) - set(FAULTS.values()) == PRODUCED_ELSEWHERE


def test_every_mend_is_that_of_a_kind():
    assert {kind.mend for kind in Kind} == {*Mend, None}


@pytest.mark.parametrize("kind", Kind)
def test_a_row_makes_a_sentence_for_one_entry_and_for_many(kind):
    names = set(re.findall(r"{(\w+)}", kind.sentence)) - {"count"}
    for count in (1, 2):
        sentence = kind.tell(count, **{name: f"<{name}>" for name in names})
        assert set(re.findall(r"<(\w+)>", sentence)) == names
        assert not set("{}|") & set(sentence)
        assert sentence.endswith(kind.remedy)


def test_a_sentence_agrees_with_the_number_of_entries():
    sentences = [Kind.OUTSIDE_BOX.finding(rows).sentence.partition(" dropped")[0] for rows in ([4], [4, 7])]
    assert sentences == ["1 annotation is", "2 annotations are"]


def test_some_problems_are_errors_depending_on_the_use():
    assert Severity.ERROR.is_error() and not Severity.WARNING.is_error(evaluated=True)
    assert Kind.SAME_ID.severity.is_error(evaluated=True) and not Kind.SAME_ID.severity.is_error()
    assert Kind.BROKEN.severity.is_error() and not Kind.BROKEN.severity.is_error(skip_broken=True)


def test_a_kind_is_its_identifier_in_json():
    stored = json.loads(json.dumps({Kind.FLAT_BOX: [3]}))
    assert stored == {Kind.FLAT_BOX: [3]}
    assert Kind(next(iter(stored))).mend is Mend.BOX_FROM_MASK


def test_collected_findings_have_the_first_sentence_and_the_rows_of_all():
    collector = Collector()
    for place in (5, 2, 9):
        collector(Kind.NESTING.finding([place], name=place, path="a.json"))
    collector(Kind.MISSING_FILE.finding([1], total=3, folder="images", names="1.jpg"))
    nesting, missing = collector.findings()
    assert (nesting.kind, nesting.rows.tolist()) == (Kind.NESTING, [5, 2, 9])
    assert nesting.sentence == Kind.NESTING.tell(name=5, path="a.json")
    assert missing.rows.tolist() == [1]
