"""What a pickle says, read as data: values, and bounds on what it may make."""

import contextlib
import pickle
import sys

import pytest

from momentum_fix import unpickling
from momentum_fix.unpickling import Refused

ORDERED = b"ccollections\nOrderedDict\nq\x01"  # named once, and then called
PIECES = {  # what a pickle can make, and how many bytes that is said to take
    "text": (b"X\x64\x00\x00\x00" + b"a" * 100, sys.getsizeof("a" * 100)),
    "a tuple": (b"(t", 96),
    "a tuple of one": (b"N\x85", 96),
    "a list": (b"]", 96),
    "a dictionary": (b"}", 96),
    "an ordered dictionary": (b"h\x01)R", 96),
    "an ordered dictionary of one": (b"h\x01h\x02R", 96 + 32),
    "a name": (b"ca\nb\n", 192),
    "a small number": (b"K\xff", 0),
    "a number": (b"M\x00\x01", 48),
    "a negative number": (b"J\xff\xff\xff\xff", 48),
    "a fraction": (b"G" + bytes(8), 48),
    "a long number": (b"\x8a\x08" + bytes(8), 56),
}


@pytest.mark.parametrize(("piece", "cost"), PIECES.values(), ids=PIECES)
def test_what_a_pickle_makes_in_memory_is_counted(piece, cost, monkeypatch):
    header = b"\x80\x02" + ORDERED + b"](K\x07K\x09\x86e\x85q\x02"  # the argument is ([(7, 9)],)
    for budget, refused in [(50 * cost, False), (50 * cost - 1, True)][: 1 + bool(cost)]:
        monkeypatch.setattr(unpickling, "_BUDGET", 192 + 96 + 96 + 96 + budget)
        with pytest.raises(Refused, match="holds more than") if refused else contextlib.nullcontext():
            assert unpickling.unpickle(header + piece * 50 + b"N.")[0] is None


def test_numbers_and_texts_are_what_they_were():
    values = [0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, -(2**40), 2**200, 1.5, -0.25, "a", "\ud800", "\xe4" * 300]
    for protocol in (2, 3):
        assert unpickling.unpickle(pickle.dumps(values, protocol))[0] == values


def test_names_and_depth_have_an_end():
    assert (
        unpickling.unpickle(b"\x80\x02c" + b"a" * 199 + b"\n" + b"b" * 190 + b"\n.")[0] == "a" * 199 + "." + "b" * 190
    )
    for module, name in ((399, 399), (500, 1), (1, 500)):
        with pytest.raises(ValueError, match="not found"):
            unpickling.unpickle(b"\x80\x02c" + b"a" * module + b"\n" + b"b" * name + b"\n.")
    assert unpickling.unpickle(b"(" * 10_000 + b"N.")[0] is None
    with pytest.raises(Refused, match="holds more than"):
        unpickling.unpickle(b"(" * 10_001 + b"N.")
