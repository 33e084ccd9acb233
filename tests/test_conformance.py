"""Every cell of the table of recipes and methods is as asserted, and the document is that table."""

from pathlib import Path

import pytest
import torch
from conformance import METHODS, ROWS, Row, by_update_once, markdown, nothing, one, outcome, row_outcomes

from twins import non_reentrant, reentrant

DOCUMENT = Path(__file__).parent.parent / "docs" / "conformance.md"
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", ROWS)
def test_each_method_does_with_this_way_of_recomputing_what_the_table_says(name):
    assert row_outcomes(name) == ROWS[name].outcomes()


def test_the_document_is_the_table():
    assert DOCUMENT.read_text(encoding="utf-8") == markdown({name: row.outcomes() for name, row in ROWS.items()})


def test_update_once_is_exact_wherever_its_docstring_does_not_say_otherwise():
    inexact = [name for name, row in ROWS.items() if row.outcomes()["`update_once`"] != "exact"]
    assert inexact == [
        "converted to SyncBatchNorm midway",
        "a new batch in a backward hook",
        "saved tensors read by hand",
    ]


def test_nothing_is_inexact_wherever_a_layer_is_updated_more_than_once():
    cumulative = {"momentum=None", "momentum=None, siamese inputs"}
    right = {name for name, row in ROWS.items() if row.outcomes()["nothing"] in ("exact", "equal")}
    assert right - cumulative == {name for name, row in ROWS.items() if row.passes == 1}


def test_an_outcome_can_be_any_of_those_in_the_table():
    assert {cell.split()[0] for row in ROWS.values() for cell in row.outcomes().values()} == {
        "exact",
        "equal",
        "decay",
        "wrong",
        "fails",
    }


def test_a_method_that_changes_the_gradients_is_found_out():
    def changes_the_path(net, row, data):
        with torch.no_grad():
            net.c[0].weight += 1
        return nothing(net, row, data)

    assert outcome(ROWS["one checkpoint"], changes_the_path) == "other gradients"


@NEEDS_GPU
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.wrap])
def test_update_once_does_the_same_on_a_gpu(name):
    assert outcome(ROWS[name], by_update_once, "cuda") == ROWS[name].outcomes()["`update_once`"]


@NEEDS_GPU
@pytest.mark.parametrize("ckpt", [reentrant, non_reentrant])
def test_update_once_is_exact_under_autocast_and_channels_last_on_a_gpu(ckpt):
    def step(net, x, ckpt):
        with torch.autocast("cuda", torch.float16):
            loss = ckpt(net, x.to(memory_format=torch.channels_last).requires_grad_()).float().sum()
        loss.backward()

    row = Row(step, ckpt, 2, " ".join("E" * len(METHODS)))
    assert outcome(row, nothing, "cuda") == "wrong"
    assert outcome(row, by_update_once, "cuda") == "exact"


def test_the_simplest_row_tells_the_methods_apart():
    row = Row(one, non_reentrant, 2, "W Q Q E E E W")
    assert outcome(row, nothing) == "wrong"
    assert outcome(row, by_update_once) == "exact"
