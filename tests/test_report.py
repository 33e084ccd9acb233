"""The report of calibrate: a table in print, and a mapping for correct."""

import copy

import pytest
import torch
from torch import nn

from momentum_fix import calibrate, correct, corrected_momentum
from momentum_fix.norms.notes import Note
from recipes import Net, data, once_inside_once_outside
from twins import momenta, non_reentrant

NOT_ENDED = "nothing yet: the block of calibrate has not ended, or an exception has left it"


def test_a_model_without_norm_layers_has_an_empty_report():
    with pytest.warns(UserWarning, match="no layer with running statistics"), calibrate(nn.Linear(1, 1)) as report:
        pass
    assert str(report) == "no layer with running statistics has been calibrated"


def test_all_notes_that_are_true_of_a_layer_are_in_its_row_and_those_that_warn_are_warned_of():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    model = Net(Own)

    def step():
        once_inside_once_outside(model, *data(1), non_reentrant)
        model.b[1].momentum = 0.3

    with pytest.warns(UserWarning, match="only the decay|the step itself") as caught, calibrate(model) as report:
        step()
    assert report.rows[0].notes == (Note.NOT_CONSECUTIVE, Note.MAY_READ)
    assert report.rows[1].notes == (Note.SET_BY_STEP, Note.NOT_CONSECUTIVE, Note.MAY_READ)
    assert report.rows[1].note == "; ".join(note.text for note in report.rows[1].notes)
    assert report.rows[1].note in str(report)
    warned = {str(each.message).partition("; exact")[0]: str(each.message).rpartition("Layers: ")[2] for each in caught}
    assert warned == {Note.NOT_CONSECUTIVE.text: "a.1, b.1, c.1.", Note.SET_BY_STEP.text: "b.1."}


def test_it_prints_as_an_aligned_table_and_is_a_mapping_for_correct():
    model = Net()
    rebuilt = copy.deepcopy(model)
    with calibrate(model) as report:
        assert str(report) == NOT_ENDED
        non_reentrant(model.b, model.a(*data(1))).sum().backward()
    assert str(report).splitlines() == [
        "layer  class        passes  momentum  corrected  note",
        "a.1    BatchNorm2d  1       0.1       0.1",
        "b.1    BatchNorm2d  2       0.1       0.0513167",
        "c.1    BatchNorm2d  ?       0.1       0.1        left alone: did not run",
    ]
    assert report.passes == dict(report) == {"a.1": 1, "b.1": 2}
    assert (len(report), report["b.1"], "c.1" in report) == (2, 2, False)
    assert all(type(passes) is int for passes in report.values())
    assert momenta(correct(rebuilt, report)) == momenta(model)


def test_with_a_mean_of_passes_it_is_a_mapping_for_correct_too():
    model = Net()
    rebuilt = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="only the decay"), calibrate(model) as report:
        once_inside_once_outside(model, *data(1), non_reentrant)
    assert "b.1    BatchNorm2d  3/2     0.1       0.0678302  only" in str(report)
    assert momenta(correct(rebuilt, report.passes)) == momenta(model)


def test_a_notebook_shows_it_as_a_table():
    said = pytest.warns(UserWarning, match="no layer was updated in the block")
    with said, calibrate(nn.Sequential(nn.BatchNorm2d(3))) as report:
        assert report._repr_html_() == f"<table><caption>{NOT_ENDED}</caption>\n</table>"
    shown = report._repr_html_()
    assert shown.startswith("<table><caption>calibrate</caption>\n<tr><th>layer</th><th>class</th><th>passes</th>")
    assert "<tr><td>0</td><td>BatchNorm2d</td><td>?</td>" in shown
    assert repr(report) == "<Report on 1 layers, passes of 0 known>"


def test_a_shared_layer_has_one_row():
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"left": shared, "right": shared})
    with calibrate(model) as report:
        non_reentrant(lambda y: model["right"](y).square(), data(1)[0].requires_grad_()).sum().backward()
    assert [(row.name, row.passes) for row in report.rows] == [("left", 2)]


def test_a_model_that_is_one_norm_layer_works():
    layer = nn.BatchNorm1d(3)
    with calibrate(layer) as report:
        non_reentrant(lambda y: layer(y).square(), torch.randn(5, 3, requires_grad=True)).sum().backward()
    assert layer.momentum == corrected_momentum(0.1, 2)
    assert "(the model)  BatchNorm1d  2" in str(report)
