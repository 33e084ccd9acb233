"""audit: counters in models and files tell how often layers were updated."""

import argparse
import contextlib
import copy
import json
import math
import os
import pickle
import pty
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from momentum_fix import (
    UnreadableError,
    audit,
    calibrate,
    correct,
    corrected_momentum,
    effective_momentum,
    restore,
    update_once,
)
from momentum_fix._tables import printable, show
from momentum_fix.files.verdict import LayerAudit
from twins import batches, non_reentrant, plainly, train


def network():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh()),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.Tanh()),
    )


def step(model, x, ckpt):
    ckpt(model[1], model[0](x.requires_grad_())).sum().backward()


def trained(ckpt=non_reentrant, steps=5):
    return train(network(), step, batches(steps, 4, 3, 4, 4), ckpt)


def counters(**counts):
    """Make a state dict with a norm layer for each count."""
    state = {}
    for name, count in counts.items():
        state[f"{name}.running_mean"] = torch.zeros(4)
        state[f"{name}.num_batches_tracked"] = count if isinstance(count, torch.Tensor) else torch.tensor(count)
    return state


def found(source, **options):
    return {row.layer: row.passes for row in audit(source, **options).rows}


def save_sharded(state, directory):
    """Save a state dict as two safetensors files and their index."""
    names = list(state)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-{i}.safetensors"
        save_file({name: state[name] for name in part}, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def save_whole(state, directory):
    torch.save(state, directory / "model.pth")
    return directory / "model.pth"


def save_legacy(state, directory):
    torch.save(state, directory / "model.bin", _use_new_zipfile_serialization=False)
    return directory / "model.bin"


def save_safetensors(state, directory):
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})  # as transformers does
    return directory / "model.safetensors"


SAVERS = [save_whole, save_legacy, save_safetensors, save_sharded]


def test_a_model_that_was_checkpointed_is_told_from_one_that_was_not():
    recomputed, plain = trained(non_reentrant), trained(plainly)
    assert found(recomputed) == found(recomputed, steps=5) == {"0.1": 1, "1.1": 2, "1.2": None}
    assert found(plain) == {"0.1": 1, "1.1": 1, "1.2": None}
    assert [row.layer for row in audit(recomputed).repeated] == ["1.1"]
    assert audit(plain).repeated == ()


def test_the_numbers_follow_from_the_passes():
    _, row, uncounted = audit(trained(), momentum=0.5).rows
    assert (row.batches, row.steps, row.inferred) == (10, 5, True)
    assert row.effective_momentum == effective_momentum(0.1, 2)  # a model's own momentum counts
    assert row.corrected == corrected_momentum(0.1, 2)
    assert row.variance_ratio == pytest.approx((0.19 / 1.81) / (0.1 / 1.9))
    assert uncounted.note == "counter is 0: never updated, or a layer that does not count (InstanceNorm)"
    known = {"source": "", "state_dict": "", "layer": "1.2", "batches": None, "steps": 5, "inferred": True}
    assert uncounted == LayerAudit(**known, note=uncounted.note)
    _, row, uncounted = audit(trained().state_dict(), steps=5, momentum=0.5).rows
    assert (row.inferred, row.effective_momentum, row.corrected) == (False, 0.75, corrected_momentum(0.5, 2))
    assert (uncounted.steps, uncounted.inferred) == (5, False)


# A model's momentum says whether it is corrected for its updates per step.


def corrections(model, **options):
    """Tell how the momenta of a model's layers compare with their updates, and what the verdict says first."""
    result = audit(model, **options)
    return {row.layer: row.correction for row in result.rows if row.passes}, result.verdict.partition(":")[0]


def test_a_corrected_model_is_corrected_already_and_its_momentum_amounts_to_the_intended_one():
    model = train(correct(network(), passes={"1.1": 2}), step, batches(5, 4, 3, 4, 4), non_reentrant)
    _, row, _ = (result := audit(model)).rows
    assert (row.passes, row.correction) == (2, "corrected already")
    assert row.effective_momentum == pytest.approx(0.1, rel=1e-15)
    assert row.variance_ratio == pytest.approx(1)
    assert row.corrected == corrected_momentum(0.1, 2)
    assert row.note == "corrected already: for 2 updates per step"
    assert str(result).startswith("Corrected already: 1 of 2 layers. Their momentum makes up for the updates per step.")
    assert "cause" not in str(result)
    assert corrections(trained()) == ({"0.1": "", "1.1": ""}, "Updated more than once per step")


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize(
    ("passes", "correction"), [(2, "corrected already"), (3, "corrected too much"), (5, "corrected too much")]
)
def test_a_momentum_that_is_corrected_for_more_updates_is_corrected_too_much(passes, correction, steps):
    model = train(correct(network(), passes={"1.1": passes}), step, batches(5, 4, 3, 4, 4), non_reentrant)
    assert corrections(model, steps=steps) == ({"0.1": "", "1.1": correction}, correction.capitalize())


def test_a_momentum_that_is_corrected_for_fewer_updates_is_not_corrected_enough():
    model = train(correct(network(), passes={"1.1": 2}), step, batches(5, 4, 3, 4, 4), non_reentrant)
    model[1][1].num_batches_tracked += 5
    assert corrections(model) == ({"0.1": "", "1.1": "not corrected enough"}, "Not corrected enough")
    assert "Possible causes" in str(audit(model))


def test_a_layer_that_is_corrected_though_it_was_not_recomputed_is_corrected_too_much():
    model = train(correct(network()), step, batches(5, 4, 3, 4, 4), non_reentrant)
    assert corrections(model)[0] == {"0.1": "corrected too much", "1.1": "corrected already"}
    assert re.match(r"Corrected too much: 1 of 2 .* Corrected already: 1 of 2 .* inferred", audit(model).verdict)
    assert re.match(r"Corrected too much: 1 of 2 .* Corrected already: 1 of 2", audit(model, steps=5).verdict)
    row = audit(model).rows[0]
    assert (row.corrected, row.cells()[-1]) == (0.1, "corrected too much: for 2 updates per step")
    assert row.cells()[3:6] == ("0.0513167", "0.50", "0.1")


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_calibrated_model_is_corrected_already_though_the_step_that_calibrated_counted_once(steps):
    model = network()
    with calibrate(model):
        train(model, step, batches(1, 4, 3, 4, 4), non_reentrant)
    train(model, step, batches(steps, 4, 3, 4, 4), non_reentrant)
    assert audit(model).rows[1].batches == 2 * steps + 1
    for given in (None, steps + 1):
        assert corrections(model, steps=given) == ({"0.1": "", "1.1": "corrected already"}, "Corrected already")


def test_all_batches_of_a_calibrated_block_may_have_counted_once():
    model = network()
    for count in (2, 3):  # once more, later
        with calibrate(model):
            train(model, step, batches(count, 4, 3, 4, 4), non_reentrant)
    train(model, step, batches(5, 4, 3, 4, 4), non_reentrant)
    again = copy.deepcopy(model)
    assert audit(again).rows[1].batches == 15
    for given in (None, 10):
        assert corrections(again, steps=given) == ({"0.1": "", "1.1": "corrected already"}, "Corrected already")
    again[1][1].num_batches_tracked -= 5  # as if no recomputation had been counted at all
    assert corrections(again, steps=10)[0]["1.1"] == "corrected too much"
    again[1][1].momentum = 0.1  # as somebody has set since
    assert found(again, steps=10)["1.1"] == 1
    assert audit(again).rows[1].correction == ""
    again[0][1].num_batches_tracked.fill_(12)
    assert audit(again).rows[1].steps == 10  # the lowest count, and not what it would be with those that were lacking
    model[1][1].num_batches_tracked.fill_(20)  # as if it had been set back after these blocks
    assert corrections(model, steps=10)[0]["1.1"] == "corrected already"
    model[1][1].num_batches_tracked.fill_(18)  # 23 updates
    assert corrections(model, steps=10)[0]["1.1"] == "not corrected enough"
    restore(model)
    model[1][1].num_batches_tracked.fill_(15)
    assert corrections(correct(model, {"1.1": 2}), steps=10)[0]["1.1"] == "corrected too much"


@pytest.mark.parametrize("mean", [Fraction(3, 2), Fraction(4, 3), Fraction(7, 2), Fraction(19, 10)])
def test_a_momentum_may_be_corrected_for_a_mean_number_of_updates(mean):
    model = correct(network(), {"1.1": mean})
    model[0][1].num_batches_tracked.fill_(60)
    model[1][1].num_batches_tracked.fill_(int(60 * mean))
    for given in (None, 60):
        assert corrections(model, steps=given) == ({"0.1": "", "1.1": "corrected already"}, "Corrected already")
    assert audit(model).rows[1].note == f"corrected already: for {float(mean):.6g} updates per step"
    for other, correction in ((mean + 1, "corrected too much"), (mean - Fraction(1, 10), "not corrected enough")):
        correct(model, {"1.1": other})
        assert corrections(model, steps=60)[0]["1.1"] == correction


@pytest.mark.parametrize("calibrated", [False, True])
def test_where_all_layers_are_recomputed_their_momenta_tell_the_number_of_steps(calibrated):
    def whole(model, x, ckpt):
        ckpt(model, x.requires_grad_()).sum().backward()

    model = network() if calibrated else correct(network())
    if calibrated:
        with calibrate(model):
            train(model, whole, batches(1, 4, 3, 4, 4), non_reentrant)
    train(model, whole, batches(5, 4, 3, 4, 4), non_reentrant)
    assert {row.steps for row in audit(model).rows} == {5 + calibrated}
    assert corrections(model) == ({"0.1": "corrected already", "1.1": "corrected already"}, "Corrected already")
    assert corrections(train(network(), whole, batches(5, 4, 3, 4, 4), non_reentrant))[1] == "Nothing found"


def test_a_root_that_was_written_by_hand_counts_as_corrected():
    model = network()
    model[1][1].momentum = 1 - 0.9**0.5
    train(model, step, batches(5, 4, 3, 4, 4), non_reentrant)
    assert corrections(model)[0] == {"0.1": "", "1.1": "corrected already"}


def test_a_model_that_is_updated_once_is_clean():
    model = network()
    with update_once(model):
        train(model, step, batches(5, 4, 3, 4, 4), non_reentrant)
    assert audit(model, steps=5).verdict.startswith("Clean")


def test_what_was_off_for_some_steps_of_many_is_corrected_already():
    model = correct(network(), passes={"1.1": 2})
    for batches_counted, correction in ((1981, "corrected already"), (2019, "corrected already")):
        model[0][1].num_batches_tracked.fill_(1000)
        model[1][1].num_batches_tracked.fill_(batches_counted)
        assert corrections(model)[0]["1.1"] == correction
    for batches_counted, correction in ((1979, "corrected too much"), (2021, "not corrected enough")):
        model[1][1].num_batches_tracked.fill_(batches_counted)
        assert corrections(model)[0]["1.1"] == correction


def test_a_momentum_of_a_type_of_its_own_is_read():
    model = trained()
    model[1][1].momentum = torch.tensor(0.5, dtype=torch.float64)
    _, row, _ = audit(model).rows
    assert (row.effective_momentum, row.corrected) == (0.75, corrected_momentum(0.5, 2))
    model[1][1].momentum = None
    assert audit(model).rows[1].effective_momentum is None


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_a_momentum_that_passes_cannot_change_gives_no_ratio_or_one(momentum):
    _, row = (result := audit(counters(a=5, b=10), momentum=momentum)).rows
    assert row.effective_momentum == row.corrected == momentum
    assert row.variance_ratio == (1.0 if momentum else None)
    number, ratio = {None: ("-", "-"), 0.0: ("0", "-"), 1.0: ("1", "1.00")}[momentum]
    assert str(result).splitlines()[-1].split() == ["b", "10", "2", number, ratio, number]


@pytest.mark.parametrize("save", SAVERS)
def test_every_format_gives_what_the_state_dict_gives(save, tmp_path):
    state = trained().state_dict()
    file = save(state, tmp_path)
    rows = audit(file).rows
    assert {row.source for row in rows} == {str(file)}
    assert sorted((row.layer, row.batches, row.passes) for row in rows if row.passes) == [("0.1", 5, 1), ("1.1", 10, 2)]
    assert found(tmp_path) == found(str(file)) == found(file)


def test_steps_and_momentum_count_for_models_state_dicts_files_and_directories(tmp_path):
    model = trained()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for source, used in (
        (model, 0.1),
        (model.state_dict(), 0.5),
        (tmp_path / "model.pt", 0.5),
        (tmp_path, 0.5),
    ):
        once, twice, _ = audit(source, steps=10, momentum=0.5).rows
        assert (once.passes, twice.passes) == (Fraction(1, 2), 1)
        assert (once.steps, once.inferred, twice.inferred) == (10, False, False)
        assert twice.effective_momentum == twice.corrected == used
        assert once.effective_momentum is once.corrected is None
        assert str(audit(source, steps=10)).startswith("Clean: none of 2 layers")


def test_a_whole_training_checkpoint_is_searched_and_each_state_dict_is_judged_by_itself(tmp_path):
    checkpoint = {
        "epoch": 3,
        "model": counters(a=5, b=10),
        "optimizer": {"state": [{"step": 5}], "lr": 0.1},
        "extra": [counters(a=7, b=7)],
    }
    checkpoint["itself"] = checkpoint
    assert found(checkpoint) == {"model/a": 1, "model/b": 2, "extra/0/a": 1, "extra/0/b": 1}
    del checkpoint["itself"]
    torch.save(checkpoint, tmp_path / "run.ckpt")
    assert found(tmp_path / "run.ckpt") == found(checkpoint)


def test_models_in_a_loaded_checkpoint_are_read_with_their_own_momenta():
    plain, corrected = trained(), train(correct(network()), step, batches(5, 4, 3, 4, 4), non_reentrant)
    loaded = {"epoch": 3, "model": plain, "ema": None, "optimizer": {"lr": 0.1}, "others": [nn.Tanh(), corrected]}
    loaded["again"] = plain  # once is enough
    result = audit({**loaded, "weights": plain.state_dict()}, momentum=0.5)
    assert {row.layer: row.passes for row in result.rows if row.passes} == {
        **{"model/0.1": 1, "model/1.1": 2, "others/1/0.1": 1, "others/1/1.1": 2, "weights/0.1": 1, "weights/1.1": 2},
    }
    rows = {row.layer: row for row in result.rows}
    assert [rows[f"{way}1.1"].effective_momentum for way in ("model/", "weights/")] == [effective_momentum(0.1), 0.75]
    assert rows["others/1/1.1"].correction == "corrected already"
    assert "Possible causes of the extra updates in model/" in str(result)
    assert "in others/1/" not in str(result)
    assert audit({"epoch": 3, "model": plain}).verdict == audit(plain).verdict
    assert found({"model": nn.ModuleList(), "net": nn.BatchNorm1d(2)}) == {"net/": None}


def test_arrays_of_numpy_are_read():
    state = {name: value.numpy() for name, value in counters(a=5, b=10).items()}
    state["c.num_batches_tracked"] = numpy.int64(15)
    state["d.num_batches_tracked"] = numpy.zeros((2, 3))
    assert found(state) == {"a": 1, "b": 2, "c": 3, "d": None}
    assert audit(state).rows[3].note == "counter has shape (2, 3)"


def test_deep_and_repeated_containers_are_walked_once():
    tree = counters(a=5, b=10)
    for _ in range(3000):
        tree = [tree, tree]
    assert list(found({"tree": tree}).values()) == [1, 2]


class Thing:
    """Something with an item, which is no tensor."""

    def item(self):
        return 5


@pytest.mark.parametrize(
    ("counter", "note"),
    [
        (torch.tensor(-3), "counter is -3, which no training can have counted"),
        (torch.tensor(2**62), "counter is 4611686018427387904, which no training can have counted"),
        (torch.tensor(99.5), "counter is 99.5, not a whole number"),
        (torch.tensor(float("nan")), "counter is nan, not a whole number"),
        (torch.tensor(float("inf")), "counter is inf, not a whole number"),
        (torch.tensor(True), "counter is of type bool, not a whole number"),
        (torch.tensor([1, 2]), "counter has shape (2,)"),
        (torch.tensor(5, device="meta"), "counter has no value"),
        (torch.tensor(5j), "counter is of type complex, not a whole number"),
        (torch.eye(2).to_sparse(), "counter has shape (2, 2)"),
        (torch.zeros(0), "counter has shape (0,)"),
        (torch.empty(1, dtype=torch.uint4), "counter is of type torch.uint4, not a whole number"),
        (Thing(), "counter is of type Thing, not a whole number"),
    ],
)
def test_a_counter_that_cannot_be_one_is_named_and_the_others_are_read(counter, note):
    first, second, third = audit({"bad.num_batches_tracked": counter, **counters(a=5, b=15)}).rows
    assert (first.passes, first.note) == (None, note)
    assert (second.passes, third.passes) == (1, 3)


def test_counters_that_are_missing_plain_or_of_another_type_are_told_apart():
    state = {**counters(a=torch.tensor([4.0], dtype=torch.float16), b=8), "old.running_var": torch.ones(2)}
    state["text.num_batches_tracked"] = "many"
    state["huge.num_batches_tracked"] = 10**5000
    state["plain.num_batches_tracked"] = 12
    rows = {row.layer: row for row in audit(state).rows}
    assert {name: row.passes for name, row in rows.items()} == {
        "a": 1,
        "b": 2,
        "old": None,
        "text": None,
        "huge": None,
        "plain": 3,
    }
    assert rows["old"].note == "no counter"
    assert rows["text"].note == "counter is of type str, not a whole number"
    assert rows["huge"].note == "counter is a number of more than 30 digits, which no training can have counted"


def test_updates_per_step_need_not_be_whole_and_may_be_fewer_than_one():
    result = audit(counters(a=50, b=100, c=150), steps=100)
    rows = {row.layer: row for row in result.rows}
    assert {name: row.passes for name, row in rows.items()} == {"a": Fraction(1, 2), "b": 1, "c": Fraction(3, 2)}
    assert rows["a"].note == "updated in fewer steps than were given"
    for row in (rows["a"], rows["c"]):  # no recomputation alone makes these, so there is no momentum for them
        assert row.corrected is row.effective_momentum is row.variance_ratio is None
    assert str(result).splitlines()[-1].split() == ["c", "150", "1.5", "-", "-", "-"]


def test_numbers_are_those_of_the_formula_where_updates_per_step_are_small_and_nearly_whole():
    rows = audit(counters(**{f"a{count}": count for count in range(1, 99)})).rows
    numbers = [(row.effective_momentum, row.corrected) for row in rows]
    assert numbers[:16] == [(effective_momentum(0.1, k), corrected_momentum(0.1, k)) for k in range(1, 17)]
    assert set(numbers[16:]) == {(None, None)}
    for count, passes in ((1979, None), (1981, 2), (2019, 2), (2021, None)):
        _, row = audit(counters(a=1000, b=count)).rows
        assert row.effective_momentum == (None if passes is None else effective_momentum(0.1, passes))


def test_the_verdict_says_what_was_found_and_what_was_inferred():
    said = (
        "Updated more than once per step: 1 of 2 layers. The counters do not say why; `diagnose` around one training "
    )
    said += "step can."
    assert str(audit(counters(a=5, b=10))).startswith(
        f"{said} The steps are inferred from the counters; pass `steps` to be sure.\n"
    )
    assert str(audit(counters(a=5, b=10), steps=5)).startswith(f"{said}\n")
    assert str(audit(counters(a=5, b=5))).startswith("Nothing found: none of 2 layers has counted more than another of")
    assert str(audit(counters(a=5, b=5), steps=5)).startswith("Clean: none of 2 layers")
    assert str(audit({})) == "Nothing to judge: no layer with running statistics has counted a batch."
    assert str(audit(nn.Linear(1, 1))) == str(audit({}))


def test_the_table_reads_well():
    state = {**counters(a=5, bb=10), "c.num_batches_tracked": None}
    assert str(audit(state, steps=5)).splitlines()[-5:] == [
        "",
        "layer  batches  per step  if recomputed: effective momentum  variance ratio  corrected momentum  note",
        "a      5        1         -                                  -               -",
        "bb     10       2         0.19                               1.99            0.0513167",
        "c      -        -         -                                  -               -                   no counter",
    ]
    assert "(the model)  5 " in str(audit({"num_batches_tracked": torch.tensor(5)}))


# What may have caused more updates, said of each state dict. test_causes.py has the words.


def causes(result):
    """Give the headings of the causes that are printed."""
    return [line for line in str(result).splitlines() if line.startswith("Possible causes")]


def test_causes_are_given_for_each_state_dict_with_more_updates_and_for_no_other(tmp_path):
    for given in (5, None):
        assert causes(audit(counters(a=5, b=5), steps=given)) == []
    heading = "Possible causes of the extra updates{}, and what speaks for (+) and against (-) each:"
    assert causes(audit(counters(a=5, b=10))) == [heading.format("")]
    several = {"model": counters(a=5, b=10), "ema": counters(a=5, b=5), "more": [counters(a=5, b=10)]}
    torch.save(several, tmp_path / "x.pt")
    for source in (several, tmp_path / "x.pt"):
        assert causes(audit(source)) == [heading.format(" in model/"), heading.format(" in more/0/")]
    assert len(causes(audit({str(number): counters(a=5, b=10) for number in range(9)}))) == 5


def test_causes_name_layers_without_the_way_to_them_and_one_without_a_name_as_the_model():
    text = str(audit({"model": counters(stem=5, head=10)}))
    assert "    + the first layer, stem, has none: few models recompute it\n" in text
    assert "    + all layers of head, and no others\n" in text
    assert "the first layer, (the model), has them" in str(audit({"num_batches_tracked": 10}, steps=5))


@pytest.mark.parametrize("save", SAVERS)
def test_the_first_layer_is_no_evidence_where_a_format_orders_layers_by_name(save, tmp_path):
    text = str(audit(save(counters(stem=5, body=10), tmp_path)))
    assert ("the first layer" in text) == (save in (save_whole, save_legacy))


def test_what_is_given_as_the_steps_is_told_from_what_is_inferred():
    dropped = "dropped layers count fewer batches than steps"
    assert dropped in str(audit(counters(a=5, b=10), steps=5))
    assert dropped not in str(audit(counters(a=5, b=10)))


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps):
    said = f"steps is {steps}, but must be an integer of at least 1: the batches trained on, or None to infer them"
    with pytest.raises(ValueError, match=said):
        audit({}, steps=steps)


@pytest.mark.parametrize("steps", [1.5, True, "5"])
def test_steps_that_are_no_integer_are_a_type_error(steps):
    with pytest.raises(TypeError, match=f"steps is {steps!r}, but must be an integer of at least 1"):
        audit({}, steps=steps)


def test_a_wrong_momentum_or_source_is_refused():
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        audit({}, momentum=1.5)
    with pytest.raises(TypeError, match="source is a int, but must be a model, a state dict or a path"):
        audit(3)


@pytest.mark.parametrize(("momentum", "error"), [(1.5, ValueError), (math.nan, ValueError), ("much", TypeError)])
def test_a_layer_of_a_model_with_a_wrong_momentum_is_named(momentum, error):
    model = trained()
    model[1][1].momentum = momentum
    for source, name in ((model, "1.1"), ({"net": model}, "net/1.1")):
        with pytest.raises(error, match=f"layer '{re.escape(name)}': momentum is {momentum!r}, but must"):
            audit(source)


@pytest.mark.parametrize(("momentum", "passes"), [(5e-324, 3), (0.1, 10**322), (0.1, 10**400)])
def test_a_momentum_that_is_corrected_to_almost_nothing_is_no_error(momentum, passes):
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum))
    correct(model, passes)[0].num_batches_tracked.fill_(6)
    (row,) = audit(model, steps=2).rows
    assert (row.passes, row.correction) == (3, "")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def write_bad_files(directory):
    """Write files that cannot be read; give for each a part of the sentence that says why."""
    good = save_whole(trained().state_dict(), directory).read_bytes()
    legacy = save_legacy(trained().state_dict(), directory).read_bytes()
    safe = save_safetensors(trained().state_dict(), directory).read_bytes()
    torch.save({"x": Harmful()}, directory / "harmful.pt")
    torch.save({"x": Harmful()}, directory / "harmful_legacy.pt", _use_new_zipfile_serialization=False)
    (directory / "harmful_pickle.bin").write_bytes(pickle.dumps(Harmful()))
    torch.save(network(), directory / "whole_model.pt")
    (directory / "empty.pt").touch()
    (directory / "truncated.pt").write_bytes(good[: len(good) // 2])
    (directory / "truncated_legacy.pt").write_bytes(legacy[: len(legacy) // 2])
    (directory / "truncated.safetensors").write_bytes(safe[: len(safe) // 2])
    (directory / "foreign.bin").write_bytes(b"hello, I am no checkpoint")
    (directory / "foreign.safetensors").write_bytes(b"\xff" * 64)
    (directory / "not.index.json").write_text("[]")
    (directory / "broken.index.json").write_text("{")
    (directory / "outside.index.json").write_text(json.dumps({"weight_map": {"a.running_mean": "../model.pth"}}))
    (directory / "lost.index.json").write_text(json.dumps({"weight_map": {"a.running_mean": "lost.safetensors"}}))
    return {
        "harmful.pt": "nothing in it was executed",
        "harmful_legacy.pt": "nothing in it was executed",
        "harmful_pickle.bin": "nothing in it was executed",
        "whole_model.pt": "model.state_dict()",
        "empty.pt": "is empty",
        "truncated.pt": "is damaged or no checkpoint",
        "truncated_legacy.pt": "is damaged or no checkpoint",
        "truncated.safetensors": "is damaged or no checkpoint",
        "foreign.bin": "is damaged or no checkpoint",
        "foreign.safetensors": "is damaged or no checkpoint",
        "not.index.json": "is no index of shards",
        "broken.index.json": "is no index of shards",
        "outside.index.json": "names shards outside its own directory",
        "lost.index.json": "cannot be read (No such file",
    }


def test_each_bad_file_is_one_clear_sentence_nothing_is_executed_and_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = write_bad_files(tmp_path)
    for name, reason in bad.items():
        with pytest.raises(UnreadableError) as caught:
            audit(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    result = audit(tmp_path)
    assert {Path(file).name for file in result.errors} == set(bad)
    assert {Path(row.source).name for row in result.rows} == {"model.pth", "model.bin", "model.safetensors"}
    assert str(result).endswith("\n\n" + "\n".join(result.errors.values()))
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "harmful.pt", weights_only=False)  # the file is harmful indeed
    assert (tmp_path / "harm").exists()


def test_a_missing_file_and_a_directory_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(UnreadableError, match=r"nowhere\.pt: cannot be read \(No such file"):
        audit(tmp_path / "nowhere.pt")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UnreadableError, match=r"holds no file that ends in \.pt, \.pth.*json$"):
        audit(tmp_path)
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(UnreadableError, match=r"; its own directories are not looked into: name them$"):
        audit(tmp_path)


def test_what_is_made_anew_each_time_that_it_is_asked_for_is_found():
    class Views(Mapping):
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, key):
            value = self.inner[key]
            return Views(value) if isinstance(value, dict) else value

        def __iter__(self):
            return iter(self.inner)

        def __len__(self):
            return len(self.inner)

    tree = {f"run {i}": {"student": counters(a=10), "teacher": counters(a=20)} for i in range(6)}
    assert audit(Views(tree), steps=10) == audit(tree, steps=10)
    assert len(audit(tree).rows) == 12


def test_a_large_file_is_not_read_into_memory(tmp_path):
    state = {**counters(a=5, b=10), "weight": torch.zeros(100_000_000, dtype=torch.uint8)}
    torch.save(state, tmp_path / "large.pt")
    code = (
        "import sys; from momentum_fix import audit; import torch\n"
        "audit(sys.argv[1]) if len(sys.argv) > 2 else torch.load(sys.argv[1], weights_only=True)['weight'].sum()\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )

    def peak(*arguments):
        run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return int(run.stdout) * 1024

    large = str(tmp_path / "large.pt")
    assert peak(large) - peak(large, "audit") > 80_000_000


def test_what_trainers_save_beside_a_model_is_left_out_of_a_directory(tmp_path):
    save_whole(trained().state_dict(), tmp_path)
    for name in ("training_args.bin", "rng_state.pth", "rng_state_1.pth", "optimizer.pt", "scheduler.pt"):
        torch.save({"x": Harmful()}, tmp_path / name)
    torch.save(counters(a=5, b=10), tmp_path / "scheduler_free_resnet.pt")
    result = audit(tmp_path)
    assert result.errors == {}
    assert {Path(row.source).name for row in result.repeated} == {"model.pth", "scheduler_free_resnet.pt"}


def test_a_recompressed_checkpoint_is_refused_instead_of_misread(tmp_path):
    file = save_whole(counters(a=100), tmp_path)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "again.pt", "w", zipfile.ZIP_DEFLATED) as again:
        for entry in archive.infolist():
            again.writestr(entry.filename, archive.read(entry))
    with pytest.raises(UnreadableError, match="an entry is compressed or encrypted"):
        audit(tmp_path / "again.pt")


def test_files_and_numbers_are_read_without_torch(tmp_path):
    torch.save(counters(a=5, b=10), tmp_path / "model.pt")
    numbers = {"a.num_batches_tracked": 5, "b.num_batches_tracked": 10}
    for source in (str(tmp_path / "model.pt"), numbers, {"model": [numbers]}):
        code = f"import sys; from momentum_fix import audit; print(audit({source!r})); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("Updated more than once per step: 1 of 2")
        assert done.stdout.endswith("False\n")


def test_objects_of_other_classes_are_passed_over_and_no_module_of_theirs_is_imported(tmp_path):
    checkpoint = {"model": counters(a=5, b=10), "args": argparse.Namespace(lr=0.1), "x": Harmful()}
    torch.save(checkpoint, tmp_path / "run.pt")
    assert found(tmp_path / "run.pt") == {"model/a": 1, "model/b": 2}
    torch.save({"args": argparse.Namespace(model=counters(a=5))}, tmp_path / "run.pt")
    with pytest.raises(UnreadableError, match="no running statistics outside of them"):
        audit(tmp_path / "run.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.uint16])
@pytest.mark.parametrize("save", SAVERS[:3])
def test_counters_of_any_type_of_number_are_read(dtype, save, tmp_path):
    assert found(save(counters(a=torch.tensor(3, dtype=dtype), b=6), tmp_path)) == {"a": 1, "b": 2}


@pytest.mark.parametrize("save", [save_whole, save_legacy])
def test_a_counter_in_the_middle_of_a_storage_and_one_with_attributes_are_read(save, tmp_path):
    tagged = nn.Parameter(torch.tensor(8.0))
    plain = torch.tensor(12)
    tagged.tag = plain.tag = "x"
    state = {
        "a.num_batches_tracked": torch.arange(10)[4],
        "b.num_batches_tracked": tagged,
        "c.num_batches_tracked": plain,
    }
    assert found(save(state, tmp_path)) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("save", [save_whole, save_legacy])
def test_what_a_counter_in_a_file_is_instead_is_said(save, tmp_path):
    state = {**counters(a=5, shaped=torch.tensor([1, 2])), "plain.num_batches_tracked": -70_000}
    assert {row.layer: row.note for row in audit(save(state, tmp_path)).rows} == {
        "a": "",
        "shaped": "counter has shape (2,)",
        "plain": "counter is -70000, which no training can have counted",
    }


def test_a_file_from_a_big_endian_machine_is_read(tmp_path):
    with zipfile.ZipFile(save_whole(counters(a=300), tmp_path)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        for name, data in entries.items():
            swapped = {"byteorder": b"big", "1": data[::-1]}
            archive.writestr(name, swapped.get(name.rpartition("/")[2], data))
    assert [row.batches for row in audit(tmp_path / "big.pt").rows] == [300]


def test_files_of_more_than_four_gigabytes_are_read(tmp_path):
    good = save_whole(counters(a=5, b=10), tmp_path).read_bytes()
    with zipfile.ZipFile(tmp_path / "large.pt", "w") as archive, zipfile.ZipFile(tmp_path / "model.pth") as small:
        archive.writestr("model/data.pkl", small.read("model/data.pkl"))
        archive.fp.seek(2**32 + 100)  # a hole
        archive.start_dir = archive.fp.tell()
        for name in small.namelist():
            if "/data/" in name:
                archive.writestr(name, small.read(name))
    assert (tmp_path / "large.pt").stat().st_size > 2**32 > len(good)
    assert found(tmp_path / "large.pt") == {"a": 1, "b": 2}


def test_a_damaged_shard_or_a_missing_one_is_named(tmp_path):
    index = save_sharded(counters(a=5, b=10), tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UnreadableError, match=r"index\.json: a shard is unreadable: .*model-1.safetensors: cannot be"):
        audit(index)


def test_a_name_of_5000_characters_or_a_forbidden_path_does_not_end_the_audit(tmp_path, capsys, monkeypatch, shell):
    torch.save(counters(a=5, b=10), tmp_path / "good.pt")
    with pytest.raises(UnreadableError, match="File name too long"):
        audit("x" * 5000)
    is_dir = Path.is_dir

    def refusing(path):
        if path.name == "forbidden":
            raise PermissionError(13, "Permission denied")
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refusing)
    with pytest.raises(UnreadableError, match=r"forbidden: cannot be read \(Permission denied\)"):
        audit(tmp_path / "forbidden")
    (tmp_path / "forbidden").touch()
    assert shell("audit", tmp_path / "forbidden", tmp_path / "good.pt") == 2
    out, err = capsys.readouterr()
    assert out.startswith("Updated more than once per step: 1 of 2")
    assert err == f"{tmp_path / 'forbidden'}: cannot be read (Permission denied)\n"


def test_an_audit_has_a_short_repr_and_a_table_for_notebooks(tmp_path):
    result = audit(counters(**{"a<b>": 5, "c\x1b": 10}))
    assert repr(result) == f"<Audit: {result.verdict}>"
    html = result._repr_html_()
    assert "<td>a&lt;b&gt;</td><td>5</td>" in html
    assert "<th>corrected momentum</th>" in html
    assert "\x1b" not in html
    (tmp_path / "x.pt").touch()
    assert "x.pt: is empty</p>" in audit(tmp_path)._repr_html_()
    assert html.startswith(f"<p>{result.verdict}</p>\n<pre>Possible causes of the extra updates")
    assert "    + the first layer, a&lt;b&gt;, has none: few models recompute it\n" in html
    assert "</pre>\n<table>\n<tr><th>layer</th>" in html
    assert "<td>" + "x" * 150 + "…" in audit(counters(**{"x" * 1000: 5}))._repr_html_()


def test_names_from_a_file_cannot_write_lines_or_control_the_terminal():
    text = str(audit(counters(**{"x\n\nClean: none\x1b[2K": 5, "b": 10})))
    assert "\x1b" not in text
    assert "x\\n\\nClean: none\\x1b[2K" in text


# The shell.


def test_the_exit_status_tells_clean_found_and_unreadable(tmp_path, capsys, shell):
    clean, bad = tmp_path / "clean.pt", tmp_path / "bad.pt"
    torch.save(counters(a=5, b=5), clean)
    bad.touch()
    repeated = tmp_path / "repeated.pt"
    torch.save(counters(a=5, b=10), repeated)
    assert shell("audit", str(clean)) == 0
    assert shell("audit", str(clean), str(repeated)) == 1
    assert shell("audit", str(clean), str(bad), str(repeated)) == 2
    assert shell("audit", str(tmp_path)) == 2
    assert shell("audit", str(clean), "--steps", "2") == 1
    out, err = capsys.readouterr()
    assert err == f"{bad}: is empty\n" * 2
    assert "Updated more than once per step: 1 of 4 layers" in out
    assert shell("audit", str(bad)) == 2
    assert capsys.readouterr().out == "Nothing read: no file with norm layers could be read.\n"


def on_a_terminal(*code_and_arguments, columns=80):
    """Run Python with its output on a terminal; give what that shows."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns)}
    command = [sys.executable, *code_and_arguments]
    subprocess.run(command, stdout=end, stderr=subprocess.DEVNULL, env=environment, check=False)
    os.close(end)
    lines = []
    with open(terminal, errors="replace") as shown, contextlib.suppress(OSError):  # Linux says so that it was closed
        lines.extend(line for line in shown)
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(lines))


def test_a_terminal_gets_a_drawn_table_and_a_pipe_an_aligned_one(tmp_path, capsys, shell):
    torch.save(counters(a=5, b=10), tmp_path / "m.pt")
    assert shell("audit", tmp_path / "m.pt") == 1
    assert "\nb      10       2 " in capsys.readouterr().out
    shown = on_a_terminal("-m", "momentum_fix", "audit", str(tmp_path / "m.pt"))
    assert "Updated more than once" in shown
    assert "┃" in shown


def cells(table):
    """Put together again what a drawn table has folded: the text of each column."""
    lines = [re.split("[│┃]", line)[1:-1] for line in table.splitlines() if line[:1] in ("│", "┃")]
    return ["".join(cell.strip() for cell in column) for column in zip(*lines, strict=True)]


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("name", ["bn", "backbone.layer4.2.bn3", "module.encoder.mid_block.attentions.0.proj_in.norm"])
def test_nothing_is_ever_cut_on_a_terminal_and_no_number_is_folded_from_80_columns_on(tmp_path, columns, name):
    torch.save(
        {"state_dict": counters(**{name: 10, "a": 5}), "other": {"x.running_var": torch.ones(1)}}, tmp_path / "m.pt"
    )
    shown = on_a_terminal("-m", "momentum_fix", "audit", str(tmp_path / "m.pt"), columns=columns)
    table = shown[shown.index("┏") :].rstrip()
    layers, *_, corrected, note = cells(table)
    assert layers == f"layerstate_dict/{name}state_dict/aother/x"
    assert (corrected, note.replace(" ", "")) == ("correctedmomentum0.0513167--", "notenocounter")
    assert columns < 80 or "│ 0.0513167 │" in table
    assert max(map(len, table.splitlines())) <= columns
    assert "…" not in table


def shown(rows, columns, capsys, monkeypatch):
    """Give what `show` prints on a terminal that is so wide."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(rows)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


ROWS = [
    ("layer", "passes", "note", "empty", "set momentum"),
    ("encoder.1", "2", "left alone: did not run", "", "-"),
    ("b", "-", "", "", ""),
    ("c", "3", "twenty-five-words in it", "", "0.05"),
]


def test_a_table_is_folded_where_the_terminal_is_narrow_and_nothing_of_it_is_lost(capsys, monkeypatch):
    wide, narrow = (cells(shown(ROWS, columns, capsys, monkeypatch)) for columns in (100, 30))
    assert wide[2] == "noteleft alone: did not runtwenty-five-words in it"
    assert [column.replace(" ", "") for column in narrow] == [column.replace(" ", "") for column in wide]
    assert len(wide) == 4  # without the one that is empty


def test_a_table_is_measured_in_the_cells_of_the_terminal(capsys, monkeypatch):
    wide = [ROWS[0], ("層" * 20, "2", "", "", "0.05")]  # two places each
    assert f"│ {'層' * 20} │ 2      │" in shown(wide, 80, capsys, monkeypatch)
    folded = shown(wide, 40, capsys, monkeypatch)
    assert folded.count("層") == 20
    assert "…" not in folded


def test_only_what_does_not_print_is_escaped():
    assert printable("é\\層\n\x1b") == "é\\層\\n\\x1b"


def test_a_table_of_very_many_rows_is_not_drawn(capsys, monkeypatch):
    lines = shown([*ROWS[:1], *ROWS[2:3] * 2000], 80, capsys, monkeypatch).splitlines()
    assert lines == ["layer  passes  note  empty  set momentum", *["b      -"] * 2000]


def test_several_files_get_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch, shell):
    files = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    for file in files:
        torch.save(counters(a=5, b=5), file)
    assert shell("audit", *files) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert shell("audit", *files) == 0
    assert "auditing" in capsys.readouterr().err
    assert shell("audit", files[0]) == 0
    assert capsys.readouterr().err == ""


def test_json_is_for_programs(tmp_path, capsys, shell):
    torch.save(counters(a=5, b=10, c=0), tmp_path / "model.pt")
    assert shell("audit", str(tmp_path / "model.pt"), "--json", "--momentum", "0.5", "--steps", "5") == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["repeated"], result["errors"]) == (1, {})
    assert result["verdict"].startswith("Updated more than once per step: 1 of 2")
    assert result["layers"][2]["passes"] is None
    assert result["causes"][0].startswith("Possible causes")
    assert result["layers"][1] == {
        "source": str(tmp_path / "model.pt"),
        "state_dict": "",
        "layer": "b",
        "batches": 10,
        "steps": 5,
        "inferred": False,
        "passes": 2.0,
        "effective_momentum": 0.75,
        "variance_ratio": pytest.approx(1.8),
        "corrected": corrected_momentum(0.5, 2),
        "correction": "",
        "note": "",
    }


def test_an_empty_directory_and_wrong_numbers_are_one_line_and_status_2(tmp_path, capsys, shell):
    assert shell("audit", str(tmp_path)) == 2
    assert "holds no file that ends in" in capsys.readouterr().err
    (tmp_path / "x.pt").touch()
    assert shell("audit", tmp_path / "x.pt", "--steps", "0") == 2
    assert capsys.readouterr().err.startswith("Error: steps is 0, but must be an integer of at least 1: ")
    assert shell("audit", tmp_path / "x.pt", "--momentum", "7") == 2  # said before any file is read
    assert capsys.readouterr().err.startswith("Error: momentum is 7.0, but must")
