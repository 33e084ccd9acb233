"""What a pickle says, read as data: values, and bounds on what it may make."""

import contextlib
import pickle
import sys
from fractions import Fraction

import pytest

from momentum_fix.files import unpickling
from momentum_fix.files.unpickling import RefusedError

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
    "a name of two texts": (b"X\1\0\0\0aX\1\0\0\0b\x93", 192 + 2 * sys.getsizeof("a")),
    "a small number": (b"K\xff", 0),
    "a number": (b"M\x00\x01", 48),
    "a negative number": (b"J\xff\xff\xff\xff", 48),
    "a fraction": (b"G" + bytes(8), 48),
    "a long number": (b"\x8a\x08" + bytes(8), 56),
}


@pytest.mark.parametrize(("piece", "cost"), PIECES.values(), ids=PIECES)
def test_what_a_pickle_makes_in_memory_is_counted(piece, cost):
    header = b"\x80\x02" + ORDERED + b"](K\x07K\x09\x86e\x85q\x02"  # the argument is ([(7, 9)],)
    for budget, refused in [(50 * cost, False), (50 * cost - 1, True)][: 1 + bool(cost)]:
        with pytest.raises(RefusedError, match="holds more than") if refused else contextlib.nullcontext():
            data = header + piece * 50 + b"N."
            assert unpickling.unpickle(data, budget=192 + 96 + 96 + 96 + budget)[0] is None


def test_numbers_and_texts_are_what_they_were():
    values = [0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, -(2**40), 2**200, 1.5, -0.25, "a", "\ud800", "\xe4" * 300]
    for protocol in (2, 3, 4, 5):
        assert unpickling.unpickle(pickle.dumps(values, protocol))[0] == values


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_named_twice_is_one_thing_whatever_the_protocol(protocol):
    shared, sequence = ["x"] * 2, ("a", "b", "c", "d")
    value = [shared, sequence, shared, sequence, Fraction, Fraction, "y" * 300, "y" * 300]
    read = unpickling.unpickle(pickle.dumps(value, protocol))[0]
    assert read == [*value[:4], "fractions.Fraction", "fractions.Fraction", *value[6:]]
    assert read[0] is read[2]
    assert isinstance(read[4], unpickling.Name)


def test_sets_and_bytes_are_read_as_what_is_like_them():
    assert unpickling.unpickle(pickle.dumps([{7}, frozenset({8}), b"\xff", b"\xff" * 300], 4))[0] == [
        [7],
        (8,),
        "\\xff",
        "\\xff" * 300,
    ]


def test_texts_of_python_2_may_be_any_bytes():
    for text in (b"U\x02", b"T\x02\0\0\0"):
        assert unpickling.unpickle(b"\x80\x02" + text + b"\xc3\xa4.")[0] == "ä"
        assert unpickling.unpickle(b"\x80\x02" + text + b"a\xff.")[0] == "a\\xff"
    with pytest.raises(UnicodeDecodeError):
        unpickling.unpickle(b"\x80\x02X\x02\0\0\0a\xff.")


def test_a_name_is_made_of_two_texts():
    for two in (b"K\1X\1\0\0\0b", b"X\1\0\0\0aK\1", b"X\x91\1\0\0" + b"a" * 401 + b"X\1\0\0\0b"):
        with pytest.raises(RefusedError, match="is damaged"):
            unpickling.unpickle(two + b"\x93.")


def test_a_class_with_its_source_is_its_name_and_no_storage():
    module = b"(X\6\0\0\0moduleca\nb\nX\1\0\0\0fX\1\0\0\0stQ"
    tree, _, objects, storages = unpickling.unpickle(b"](" + module + b")\x81(X\1\0\0\0sK\1tQe.")
    assert (tree, objects, storages) == (["a.b", ("s", 1)], True, [("s", 1)])


@pytest.mark.parametrize(
    ("operations", "said"),
    [
        (b"K\1K\2a", "it fills what is no container"),
        (b"}K\2a", "it fills what is no container"),
        (b"}(K\2e", "it fills what is no container"),
        (b"]K\1K\2s", "it fills what is no container"),
        (b"](K\1K\2u", "it fills what is no container"),
        (b"])R", "it calls what is no function"),
        (b"ca\nb\n]R", "it calls what is no function"),
        (b"K\1X\1\0\0\0b\x93", "a name is no text"),
        (b"P1\n", "holds objects but no running statistics"),
        (b"\x92", "holds objects but no running statistics"),
    ],
)
def test_what_is_wrong_with_a_pickle_is_said(operations, said):
    with pytest.raises(RefusedError, match=said):
        unpickling.unpickle(b"\x80\x02" + operations + b".")


def test_what_an_object_would_hold_is_passed_over():
    for operations in (b"K\1a", b"(K\1e", b"K\1K\2s", b"(K\1K\2u"):
        assert unpickling.unpickle(b"ca\nb\n" + operations + b".")[0] == "a.b"


def test_a_tensor_with_a_type_of_its_own_has_its_shape_and_type():
    arguments = b"(X\1\0\0\0sK\7K\1\x85K\2\x85\x89Nctorch\nuint4\nNt"
    made = unpickling.unpickle(b"ctorch._utils\n_rebuild_tensor_v3\n" + arguments + b"R.")[0]
    assert made == unpickling.Tensor("s", 7, (1,), "torch.uint4")


def test_the_pickles_of_a_file_share_their_steps():
    steps = iter(range(7))
    assert unpickling.unpickle(b"NNN.", steps=steps)[1] == 4
    with pytest.raises(RefusedError, match="holds more than"):
        unpickling.unpickle(b"NNN.", steps=steps)
    assert unpickling.unpickle(b"NNN.NN.", at=4)[1] == 7


def test_a_tensor_that_is_the_negative_of_what_is_stored_is_not_taken_for_it():
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(X\1\0\0\0sK\0))\x89N"
    assert unpickling.unpickle(made + b"}tR.")[0] == unpickling.Tensor("s", 0, ())
    assert unpickling.unpickle(made + b"tR.")[0] == unpickling.Tensor("s", 0, ())
    assert unpickling.unpickle(made + b"}X\3\0\0\0neg\x88stR.")[0] == "torch._utils._rebuild_tensor_v2"


def test_names_and_depth_have_an_end():
    assert (
        unpickling.unpickle(b"\x80\x02c" + b"a" * 199 + b"\n" + b"b" * 190 + b"\n.")[0] == "a" * 199 + "." + "b" * 190
    )
    for module, name in ((399, 399), (500, 1), (1, 500)):
        with pytest.raises(ValueError, match="not found"):
            unpickling.unpickle(b"\x80\x02c" + b"a" * module + b"\n" + b"b" * name + b"\n.")
    assert unpickling.unpickle(b"(" * 10_000 + b"N.")[0] is None
    with pytest.raises(RefusedError, match="holds more than"):
        unpickling.unpickle(b"(" * 10_001 + b"N.")
