"""The study measures what it says: a replay is what torch would have done, and the page says what the data say."""

import copy
import json
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from statsmodels.stats.power import TTestPower
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
import study_page  # noqa: E402
from momentum_fix import corrected_momentum  # noqa: E402
from study import Condition, Record, Variant, passes  # noqa: E402
from study_tasks import TASKS  # noqa: E402

STEPS = 16


def small_net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5), nn.BatchNorm1d(5))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator) * (1 + i % 3) + i % 2 for i in range(STEPS)]


def recorded():
    """Give the record of a network that does not learn, as the study's runs make it."""
    torch.manual_seed(0)
    net = small_net()
    record = Record(net, STEPS)
    for x in batches():
        net(x)
        record.add()
    return record


def really(updates, momentum):
    """Give the buffers after torch itself has updated them with these batches, one after the other."""
    torch.manual_seed(0)
    net = small_net()
    record = Record(net, 1)
    for layer in record.layers:
        layer.momentum = momentum
    for x in updates:
        net(x)
    return record._read()


ORDERS = {
    "1 pass": (passes(1), lambda x: x),
    "2 passes": (passes(2), lambda x: [b for b in x for _ in range(2)]),
    "5 passes, m = 0.3": (passes(5, 0.3), lambda x: [b for b in x for _ in range(5)]),
    "A B B A": (Variant(0.1, "ABBA"), lambda x: [x[i + j] for i in range(0, STEPS, 2) for j in (0, 1, 1, 0)]),
    "A B A B, root": (
        Variant(corrected_momentum(0.1), "ABAB"),
        lambda x: [x[i + j] for i in range(0, STEPS, 2) for j in (0, 1, 0, 1)],
    ),
    "8 in flight": (
        Variant(0.1, 2 * study.PIPELINE),
        lambda x: [x[i + j % 8] for i in range(0, STEPS, 8) for j in range(16)],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_replayed_variant_is_what_torch_does_when_it_really_makes_these_updates(name):
    variant, order = ORDERS[name]
    replayed = recorded().replay(variant, [1, 1])
    torch.testing.assert_close(replayed, really(order(batches()), variant.momentum), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", list(ORDERS)[1:])
def test_a_replayed_variant_is_not_what_torch_does_with_one_pass(name):
    replayed = recorded().replay(ORDERS[name][0], [1, 1])
    assert (replayed - really(batches(), 0.1)).abs().max() > 1e-4


def test_nested_passes_are_replayed_layer_by_layer():
    replayed = recorded().replay(study.VARIANTS["nested"], [2, 5])
    twice, five_times = (really([b for b in batches() for _ in range(k)], 0.1) for k in (2, 5))
    torch.testing.assert_close(replayed, torch.cat([twice[:8], five_times[8:]]), rtol=1e-12, atol=1e-14)


def test_a_full_pass_is_torchs_update_bn():
    torch.manual_seed(0)
    net = small_net()
    x = torch.cat(batches())
    found = study.full_pass(net, x, batch=6)
    torch.optim.swa_utils.update_bn(x.split(6), net)
    torch.testing.assert_close(found, Record(net, 1)._read(), rtol=1e-12, atol=1e-14)


def test_the_path_of_the_weights_does_not_depend_on_the_momentum():
    ends = []
    for momentum in (1.0, 0.1):
        torch.manual_seed(0)
        net = small_net()
        for layer in (net[1], net[4]):
            layer.momentum = momentum
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for x in batches():
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        ends.append([p.clone() for p in net.parameters()] + [net[1].running_mean.clone()])
    *weights, statistics = zip(*ends, strict=True)
    assert all(torch.equal(*pair) for pair in weights)
    assert not torch.equal(*statistics)


def test_an_order_whose_group_is_not_finished_is_refused():
    with pytest.raises(ValueError, match="steps is 9, but must be a multiple of 2"):
        study.step_weights("ABBA", 0.1, 9)


def test_the_theory_is_the_papers():
    one, two = (study.theory(passes(k)) for k in (1, 2))
    assert one.variance == pytest.approx(0.1 / 1.9)
    assert one.age == pytest.approx(9)
    assert two.variance / one.variance == pytest.approx(1.99, abs=0.005)


def test_the_nested_passes_are_those_that_calibrate_counts():
    assert study.nested_passes() == [2, 3, 4, 5, 5, 4, 3, 2]
    assert study.nested_for(4) == [2, 3, 4, 5]


@pytest.mark.parametrize("name", TASKS)
def test_the_data_need_no_network(name, monkeypatch):
    torch.set_default_dtype(torch.float32)

    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    task = TASKS[name]
    data = task.load(0)
    output = task.network()(data.x[:2])
    assert 0 <= task.error(output, data.y[:2]) <= 100
    assert len(data.held_x) > data.validation > 0


def test_every_task_holds_out_what_it_does_not_train_on():
    torch.set_default_dtype(torch.float32)
    data = TASKS["digits"].load(3)
    trained = {x.numpy().tobytes() for x in data.x}
    shared = sum(x.numpy().tobytes() in trained for x in data.held_x)
    assert shared < 5  # the digits themselves contain a few twins


def test_one_run_carries_every_variant_and_repeats_to_the_last_digit():
    torch.set_default_dtype(torch.float32)
    task = study.small(TASKS["digits"])
    first, second = (study.one_run(Condition("digits", 2, "annealed", "change"), 0, task) for _ in range(2))
    assert first["outcomes"] == second["outcomes"]
    assert set(first["outcomes"]) == {*study.VARIANTS, study.PRECISE}
    assert first["outcomes"][study.PRECISE]["final distance"] == 0
    assert first["outcomes"]["k = 1"]["final loss"] != first["outcomes"]["k = 5"]["final loss"]


def test_runs_keep_a_class_together_and_shuffling_does_not():
    torch.set_default_dtype(torch.float32)
    data = TASKS["mnist"].load(0)

    def stays(order):
        classes = data.key[study.example_order(data, order, 1, torch.Generator().manual_seed(0))]
        return float((classes[1:] == classes[:-1]).double().mean())

    assert stays("runs") > 0.9
    assert stays("shuffled") < 0.2


FAKE = {"steps": 8, "seconds": 60.0, "outcomes": {"k = 1": {"final error": 1.23456}}}


def pretend(folder, runs):
    folder.mkdir(exist_ok=True)
    for condition, seed in runs:
        study.run_file(folder, condition, seed).write_text(json.dumps(FAKE))


def test_a_stopped_study_goes_on_with_what_is_missing(tmp_path):
    *there, missing = sorted(study.plan(True), key=lambda run: run[0].task == "digits")
    pretend(tmp_path, there)
    assert study.run_all(tmp_path, True, workers=1) == 1
    assert json.loads(study.run_file(tmp_path, *missing).read_text()) != FAKE
    assert all(json.loads(study.run_file(tmp_path, *run).read_text()) == FAKE for run in there)
    assert study.run_all(tmp_path, True, workers=1) == 0


def test_a_seed_counts_when_all_its_runs_are_there(tmp_path):
    runs = study.plan(True)
    pretend(tmp_path, runs)
    both = study.assemble(tmp_path, True)
    study.run_file(tmp_path, *runs[-1]).unlink()
    one = study.assemble(tmp_path, True)
    assert [next(iter(found["conditions"].values()))["seeds"] for found in (both, one)] == [[0, 1], [0]]
    assert {len(cell["seeds"]) for cell in one["conditions"].values()} == {1}
    assert both["minutes"] == len(runs)


DATA = study_page.load()


def test_the_data_file_is_written_as_it_is_read_and_stays_small():
    text = study_page.DATA.read_text(encoding="utf-8")
    assert study.dump(DATA) == text
    assert len(text) < 2e6


def test_the_data_are_those_of_the_planned_conditions():
    planned = {str(condition) for condition, _ in study.plan(False)}
    assert set(DATA["conditions"]) == planned
    counts = {len(cell["seeds"]) for cell in DATA["conditions"].values()}
    assert len(counts) == 1
    for cell in DATA["conditions"].values():
        lengths = {len(values) for outcomes in cell["variants"].values() for values in outcomes.values()}
        assert lengths == counts


def test_the_page_says_what_the_data_say():
    assert (ROOT / "docs" / "study.md").read_text(encoding="utf-8") == study_page.page(DATA)


def test_other_data_would_give_another_page():
    other = copy.deepcopy(DATA)
    variant = other["conditions"]["digits, batch 2, annealed, shuffled"]["variants"]["k = 5"]
    for what in ("final error", "final loss"):
        variant[what] = [value + 20 * (1 + i % 2) for i, value in enumerate(variant[what])]
    assert study_page.to_decide_from(other) != study_page.to_decide_from(DATA)
    assert study_page.sentences(other) != study_page.sentences(DATA)


def test_the_page_opens_with_the_answer():
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert all(sentence in text.split("\n## ")[0] for sentence in study_page.sentences(DATA))


@pytest.mark.parametrize("document", study_page.QUOTES, ids=lambda path: path.name)
def test_readme_and_paper_say_the_answer_too(document):
    text = document.read_text(encoding="utf-8")
    said = study_page.sentences(DATA) if document.name == "paper.md" else [study_page.brief(DATA)]
    assert all(sentence in " ".join(text.split()) for sentence in said)
    assert study_page.quoting(text, DATA) == text


def test_every_figure_stands_on_the_page_and_in_its_folder():
    named = re.findall(r"!\[[^]]+\]\((study-\w+\.png)\)", (ROOT / "docs" / "study.md").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(f"study-{name}.png" for name in study_page.FIGURES)
    assert all((ROOT / "docs" / name).exists() for name in named)


def test_the_power_in_the_design_is_statsmodels():
    (stated,) = re.findall(r"mean difference of ([\d.]+) of its standard deviation", study.__doc__)
    seeds = {task.seeds for task in TASKS.values()}
    assert [float(stated)] == [round(TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8), 2) for n in seeds]


def test_holms_correction_is_made_over_all_planned_comparisons():
    found = study_page.primary(DATA)
    assert len(found) == 2 * 2 * len(TASKS)
    raw = [
        study_page.paired(*(cell["variants"][n]["final error"] for n in (test.name, "k = 1")))[1]
        for test in found
        for cell in [DATA["conditions"][str(test.condition)]]
    ]
    assert min(test.p for test in found) == pytest.approx(min(1, len(found) * min(raw)))


def shifted(two, five):
    """Give a condition in which k = 2 and k = 5 change the error by these amounts, a little more or less by seed."""
    noise = [0.01, -0.01, 0.02, -0.02, 0.01, -0.01, 0.0, 0.0]
    errors = {"k = 1": [5.0] * 8, "k = 2": [5 + two + n for n in noise], "k = 5": [5 + five + n for n in noise]}
    return {"variants": {name: {"final error": values} for name, values in errors.items()}}


@pytest.mark.parametrize(
    ("two", "five", "said"),
    [
        (0.5, 1, "correct it"),
        (0, 1, "correct it from k = 5 on"),
        (0, 0, "do not bother"),
        (0, -1, "better as it is"),
    ],
)
def test_the_advice_follows_the_rule(two, five, said):
    assert study_page.advice(shifted(two, five)) == said


def test_an_interval_that_is_wide_is_not_told_apart():
    cell = shifted(0, 0)
    cell["variants"]["k = 5"]["final error"] = [3.0, 7.0] * 4
    assert study_page.advice(cell) == "not told apart"


def test_percent_is_the_ratio_of_geometric_means():
    losses = [0.1, 0.2, 0.4]
    cell = {"variants": {"k = 1": {"final loss": losses}, "k = 5": {"final loss": [2 * loss for loss in losses]}}}
    found = study_page.percent([cell], "k = 5")
    assert found == pytest.approx((100, 100, 100))
    assert study_page.percent([cell, shifted_loss(cell)], "k = 5").mean == pytest.approx(100 * (2**0.5 - 1))


def shifted_loss(cell):
    """Give a condition in which nothing changes."""
    return {"variants": dict.fromkeys(("k = 1", "k = 5"), cell["variants"]["k = 1"])}


def test_what_the_page_says_in_words_is_so_in_the_data():
    def after(task):
        cell = DATA["conditions"][f"{task}, batch 2, annealed, change"]
        return study_page.difference(cell, "k = 5", "8 after error").sign()

    assert [after(task) for task in ("digits", "vowels", "brain")] == [-1, 1, 1]
    found = study_page.at_all_times(DATA)
    early = [effect.difference.sign() for time, m, effect in found if (time, m) == ("early", 0.1)]
    slow = [effect.difference.sign() for time, m, effect in found if (time, m) == ("final", 0.01)]
    assert early.count(-1) > 10 * max(1, early.count(1))
    assert slow.count(-1) > 10 * max(1, slow.count(1))
    moving = [cell for _, cell in study_page.cells(DATA, schedule="constant", batch=8)]
    assert study_page.percent(moving, "k = 2").sign() == -1
    far_out = {name: (predicted, lost) for name, predicted, _, lost in study_page.theory_rows(DATA)}["k = 5, m = 0.3"]
    assert study_page.statistics.median(far_out[1]) > far_out[0]
    outlier = study_page.theory(study.VARIANTS["k = 1, m = 0.01"])
    assert outlier.age == pytest.approx(99, abs=0.1)
