"""Every cell of the table of recipes and methods is as asserted, and the document is that table."""

import pytest
import torch

import conformance as table
from conformance import METHODS, ROWS, Row, by_update_once, nothing, outcome
from recipes import one
from twins import non_reentrant, reentrant

OLDER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", ROWS)
def test_each_method_does_with_this_way_of_recomputing_what_the_table_says(name):
    found, asserted = table.row_outcomes(name), table.asserted()[name]
    if OLDER and name.startswith("compiled with the checkpoint"):
        del found["only in backward"], asserted["only in backward"]  # which Dynamo refuses to compile there
    assert found == asserted


def test_the_document_is_the_table():
    assert table.DOCUMENT.read_text(encoding="utf-8") == table.document(table.asserted())


def test_every_exception_of_a_method_names_a_row_and_no_row_is_named_twice():
    for method in METHODS.values():
        rows = [table.matching(name) for names in method.but.values() for name in names]
        assert all(rows)
        assert len(set().union(*rows)) == sum(map(len, rows))
        assert method.mostly not in method.but


def test_update_once_is_exact_wherever_its_docstring_does_not_say_otherwise():
    inexact = [name for name, found in METHODS["`update_once`"].outcomes().items() if found != "exact"]
    assert inexact == [
        "converted to SyncBatchNorm midway",
        "a new batch in a backward hook",
        "saved tensors read by hand",
    ]


def test_nothing_is_inexact_wherever_a_layer_is_updated_more_than_once():
    cumulative = {"momentum=None", "momentum=None, siamese inputs"}
    right = {name for name, found in METHODS["nothing"].outcomes().items() if found in ("exact", "equal")}
    assert right - cumulative == {name for name, row in ROWS.items() if row.passes == 1}


def test_the_words_of_the_table_are_explained_in_the_document():
    used = {word for cells in table.asserted().values() for cell in cells.values() for word in cell.split()}
    assert used == set(table.OUTCOMES)


def test_a_method_that_changes_the_gradients_is_found_out():
    def changes_the_path(net, row, data):
        with torch.no_grad():
            net.c[0].weight += 1
        return nothing(net, row, data)

    assert outcome(ROWS["one checkpoint"], changes_the_path) == "other gradients"


def test_a_method_that_raises_is_refused():
    def raises(net, row, data):
        raise ZeroDivisionError

    assert outcome(ROWS["one checkpoint"], raises) == "refused"


@NEEDS_GPU
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.wrap])
def test_update_once_does_the_same_on_a_gpu(name):
    assert outcome(ROWS[name], by_update_once, "cuda") == METHODS["`update_once`"].outcomes()[name]


@NEEDS_GPU
@pytest.mark.parametrize("ckpt", [reentrant, non_reentrant])
def test_update_once_is_exact_under_autocast_and_channels_last_on_a_gpu(ckpt):
    def step(net, x, ckpt):
        with torch.autocast("cuda", torch.float16):
            loss = ckpt(net, x.to(memory_format=torch.channels_last).requires_grad_()).float().sum()
        loss.backward()

    row = Row(step, ckpt, 2)
    assert outcome(row, nothing, "cuda") == "wrong"
    assert outcome(row, by_update_once, "cuda") == "exact"


def test_the_simplest_row_tells_the_methods_apart():
    row = Row(one, non_reentrant, 2)
    assert outcome(row, nothing) == "wrong"
    assert outcome(row, by_update_once) == "exact"
