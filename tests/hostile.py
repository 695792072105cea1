"""Runs readers on broken and hostile files that hypothesis makes, and says what a reader may do with one.

The cases are the same in every run. ``FUZZ_TIMES=20 pytest tests -k hostile`` runs 20 times as many, other ones each
time.
"""

import copy
import functools
import os
import re
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskrcnn_jax.errors import UserError

# Of each test; together what a run of the suite tries.
CASES = {
    "annotations": 2500,
    "annotation text": 1800,
    "numbers": 700,
    "run lengths": 1500,
    "images": 1500,
    "yolo labels": 2500,
    "yolo yaml": 1500,
    "labelme": 2500,
    "voc xml": 1500,
    "voc trees": 1500,
    "label maps": 1500,
    "layouts": 500,
    "weights": 2000,
    "torch": 500,
    "results": 1000,
    "files of a run": 700,
}
_TIMES = int(os.environ.get("FUZZ_TIMES", "0"))
_SECONDS = 5  # of one case; what takes longer hangs, or will at twice the size
_MEMORY = 400 << 20  # bytes that one test may take; the files have a few kB

NUMBERS = (0, -1, 1, 2, 0.5, 95, 1e5, -1e5, 2**31, -(2**31), 2**32, 2**63, -(2**63) - 1, 10**30, 10**400)
NUMBERS += (1e30, 3e38, -3e38, 1e308, -1e308, 5e-324, -0.0, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "\0", "a\0b", "\ud800", "\u2028", "1.jpg", "../1.jpg", "/", "1\n2", "0" * 5000, "é", "PPPPPPP0", "PY00")
VALUES = (None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None], [[[0]]], {"": 0}, [[0, 0, 9, 0, 9, 9]])
VALUES += ({"size": [10**9, 10**9], "counts": "0"}, {"size": [0, 0], "counts": []}, {"size": [2, 2], "counts": [4]})
# A few values at hand, and what hypothesis thinks of.
values = st.one_of(
    st.sampled_from(VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.sampled_from(VALUES), st.floats()), max_size=8),
)


def hostile(name, **strategies):
    """Makes a test of a function of one case, which either returns or raises a UserError of one sentence."""

    def decorate(case):
        done = 0

        @settings(
            max_examples=CASES[name] * max(_TIMES, 1),
            derandomize=not _TIMES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(**strategies)
        def run_all(**drawn):
            nonlocal done
            done += 1
            start = time.process_time()  # other processes may be busy
            try:
                case(**drawn)
            except UserError as e:
                assert_sentence(e)
            assert time.process_time() - start < _SECONDS
            assert _peak() < before + _MEMORY

        @functools.wraps(case)
        def test():
            nonlocal before
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is taken now
            before = _peak()
            run_all()
            assert done >= CASES[name]

        before = 0
        del test.__wrapped__  # whose arguments pytest would take for fixtures
        return test

    return decorate


def assert_sentence(error):
    """Fails unless an error is one line without the name of a Python exception."""
    sentence = str(error)
    assert sentence.encode() and len(sentence.splitlines()) == 1
    found = re.search(r"\b[A-Za-z.]+(Error|Exception)\b|\berror:\s*\(-\d+", sentence)
    assert not found, sentence


def _peak():
    """Returns the most memory, in bytes, since the peak was last cleared."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) << 10


# What is done to a document: place (counted through all of its values), deed, and a value to write there.
changes = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from(["set", "set", "set", "delete", "twice", "wrap"]), values),
    min_size=1,
    max_size=3,
)


def change_document(document, changes):
    """Changes a document of lists and dicts in place, and returns it."""
    for number, deed, value in changes:
        places = list(_places(document))
        if not places:
            break
        holder, key = places[number % len(places)]
        if deed == "set":
            holder[key] = copy.deepcopy(value)  # or a later change would put it into itself
        elif deed == "delete":
            del holder[key]
        elif deed == "twice" and isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[key] = [holder[key]]
    return document


def _places(node):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        yield node, key
        if isinstance(value, list | dict):
            yield from _places(value)


# What is done to bytes: place, deed, and bytes to write there.
damages = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.sampled_from(["write", "write", "write", "insert", "cut", "remove", "repeat"]),
        st.one_of(
            st.binary(min_size=1, max_size=4),
            st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\1\0\0"]),
        ),
    ),
    max_size=4,
)


def damage_bytes(data, damages):
    """Returns bytes with damages."""
    for place, deed, written in damages:
        place %= len(data) + 1
        if deed == "write":
            data = data[:place] + written + data[place + len(written) :]
        elif deed == "insert":
            data = data[:place] + written + data[place:]
        elif deed == "cut":
            data = data[:place]
        elif deed == "remove":
            data = data[:place] + data[place + len(written) * 3 :]
        else:
            data = data[:place] + data[place // 2 :]
    return data
