"""Every cell of the tables of kinds of state and tools is as asserted, and the document is these tables."""

import pytest
import torch

import states as table
from states import COMPILED_KINDS, KINDS, ONLY_WRITTEN, READ, UNHARMED, in_a_word, run, wrong
from twins import plainly


@pytest.mark.parametrize("kind", KINDS)
def test_each_tool_does_with_this_kind_of_state_what_the_table_says(kind):
    assert table.outcomes(kind) == table.asserted()[kind]


@pytest.mark.parametrize("kind", COMPILED_KINDS)
def test_each_tool_does_with_this_kind_of_state_in_compiled_code_what_the_table_says(kind):
    found, asserted = table.outcomes_of_compiled(kind), table.asserted_of_compiled()[kind]
    if not torch.__version__.startswith("2.13."):  # the table's: with 2.15 doing nothing is wrong in other ways
        for column in [column for column in asserted if column.endswith("nothing")]:
            del found[column], asserted[column]
    assert found == asserted


def test_the_document_is_the_tables():
    document = table.document(table.asserted(), table.asserted_of_compiled())
    assert table.DOCUMENT.read_text(encoding="utf-8") == document


def test_plain_checkpointing_is_right_in_no_cell_where_a_state_moves():
    found = table.asserted()
    assert {kind for kind in KINDS if "gradients" in found[kind]["nothing"]} == set(READ)
    assert {kind for kind in KINDS if found[kind]["nothing"] == "state"} == set(ONLY_WRITTEN)
    assert {kind for kind in KINDS if found[kind]["nothing"] == "exact"} == set(UNHARMED)


def test_each_word_of_the_table_is_explained_in_the_document():
    words = {
        word
        for rows in (table.asserted(), table.asserted_of_compiled())
        for row in rows.values()
        for cell in row.values()
        for word in cell.split(" and ")
    }
    assert words == set(table.OUTCOMES)


def test_what_is_wrong_is_told_apart():
    truth, net = (run("step counter", table.WAYS[0], plainly, count=1) for _ in range(2))
    assert wrong(net, truth) == set()
    net.a[0].weight.grad += 1e-14
    assert in_a_word(wrong(net, truth)) == "equal"
    net.a[1].steps += 1
    assert in_a_word(wrong(net, truth)) == "state"
    net.a[0].weight.grad += 1
    assert in_a_word(wrong(net, truth)) == "state and gradients"
    net.a[0].weight.grad = None
    net.a[1].steps -= 1
    assert in_a_word(wrong(net, truth)) == "gradients"
