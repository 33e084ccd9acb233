"""The study measures what it says: one run is as good as one for each variant, and the page says what the data say."""

import ast
import copy
import json
import math
import re
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
import study_figures  # noqa: E402
import study_page  # noqa: E402
import study_results  # noqa: E402
import study_statistics  # noqa: E402
from study import Condition, Running, Variant  # noqa: E402
from study_results import FIVE, ONE, TWO  # noqa: E402
from study_statistics import bootstrap_t  # noqa: E402
from study_tasks import TASKS, Data  # noqa: E402


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5), nn.BatchNorm1d(5))


def batches(steps=12):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator) * (1 + i % 3) + i % 2 for i in range(steps)]


def trained(after_step, momentum=0.1, forward=lambda net, x: net(x)):
    """Train a small network, with something done after each step."""
    net = small_net()
    for layer in (net[1], net[4]):
        layer.momentum = momentum
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    act = after_step(net)
    for x in batches():
        optimizer.zero_grad()
        forward(net, x).square().sum().backward()
        optimizer.step()
        act()
    return net


def buffers(net):
    return torch.cat([b for layer in (net[1], net[4]) for b in (layer.running_mean, layer.running_var)])


def nothing(net):
    return lambda: None


def in_one_run():
    """Give the running statistics of every variant, from one training run."""
    made = []

    def follow(net):
        made.append(Running(net, study.VARIANTS))
        return made[0].update

    trained(follow)
    return dict(zip(study.VARIANTS, made[0].values, strict=True))


def several(k):
    """Make the forward pass update k times: by a checkpoint, and by what else is needed."""

    def forward(net, x):
        with torch.no_grad():
            for _ in range(k - 2):
                net(x)
        return checkpoint(net, x, use_reentrant=False) if k > 1 else net(x)

    return forward


@pytest.mark.parametrize("variant", study.VARIANTS, ids=str)
def test_one_run_gives_every_variant_the_statistics_of_a_run_of_its_own(variant):
    own = trained(nothing, variant.momentum, several(variant.k))
    torch.testing.assert_close(in_one_run()[variant], buffers(own), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [2, 5])
def test_a_run_of_its_own_with_other_passes_has_other_statistics(k):
    own = trained(nothing, 0.1, several(k))
    assert (in_one_run()[ONE] - buffers(own)).abs().max() > 1e-3


def own_run(k, steps=40):
    """Train the digits in float64 as the study does, but with k real updates per batch; give the last test loss."""
    task, data = TASKS["digits"], few()
    torch.manual_seed(0)
    net = task.network().double()
    order = study.stream(len(data.x), steps * 2, torch.Generator().manual_seed(0)).split(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=task.rate * 2 / 32, momentum=0.9, weight_decay=5e-4)
    for step, rows in enumerate(order):
        optimizer.param_groups[0]["lr"] = task.rate * 2 / 32 * (1 + math.cos(math.pi * step / steps)) / 2
        net.train()
        optimizer.zero_grad()
        out = several(k)(net, data.x[rows].double())
        nn.functional.cross_entropy(out, data.y[rows]).backward()
        optimizer.step()
    return study.evaluate(net, task, data.test_x.double(), data.test_y).loss


@pytest.fixture
def in_float32():
    torch.set_default_dtype(torch.float32)


def few():
    data = TASKS["digits"].load(0)
    return Data(data.x[:64], data.y[:64], data.test_x[:32], data.test_y[:32])


def test_a_training_run_scores_every_variant_as_a_run_of_its_own_does(in_float32):
    scores = study.train(Condition("digits", 2, "annealed", "float64"), 0, few(), 40)
    found = {variant: scores[str(variant)]["last"][0] for variant in (ONE, TWO, FIVE)}
    own = {variant: own_run(variant.k) for variant in found}
    assert found == pytest.approx(own, rel=2e-5)  # the scores have five digits
    assert abs(own[ONE] - own[FIVE]) > 1e-3


def test_a_run_repeats_to_the_last_digit(in_float32):
    first, second = (study.train(Condition("digits", 2, "annealed", "change"), 0, few(), 160) for _ in range(2))
    assert first == second
    assert set(first) == {*map(str, study.VARIANTS), study.FULL_PASS}
    assert set(first["k = 5, m = 0.1"]) == {"final", "last", "8 after", "24 after", "64 after"}


def test_a_full_pass_is_torchs_update_bn():
    net, x = small_net(), torch.cat(batches())
    running = Running(net, study.VARIANTS)
    found = study.full_pass(net, running, x, batch=6)
    torch.optim.swa_utils.update_bn(x.split(6), net)
    torch.testing.assert_close(found, running.read(), rtol=1e-12, atol=1e-14)
    assert (found - running.values[0]).abs().max() > 1e-3


def test_the_path_of_the_weights_does_not_depend_on_the_momentum():
    one, other = trained(nothing, 1.0), trained(nothing, 0.1)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one[1].running_mean, other[1].running_mean)


def test_final_is_the_last_three_percent_of_the_steps_and_the_longest_runs_have_enough():
    for steps in study.STEPS.values():
        last = [step for step, names in study.times(steps, None).items() if "final" in names]
        assert len(last) == study.POINTS
        assert steps - 0.03 * steps <= min(last) < max(last) == steps
    assert max(study.STEPS.values()) >= 1500


@pytest.mark.parametrize("name", TASKS)
def test_the_data_need_no_network(name, monkeypatch, in_float32):
    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    task = TASKS[name]
    data = task.load(0)
    output = task.network()(data.x[:2])
    assert 0 <= task.error(output.argmax(1), data.y[:2]) <= 100


def seen_before(data):
    """Count the test examples whose targets and inputs are those of a training example, as it is or mirrored."""
    axes = range(1, data.x[0].dim())
    mirrored = [(), *((axis,) for axis in axes), tuple(axes)]
    trained_on = {x.flip(axis).numpy().tobytes() for axis in mirrored for x in data.x}
    return sum(x.numpy().tobytes() in trained_on for x in data.test_x)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_tested_on_what_it_does_not_train_on_mirrored_or_not(name, in_float32):
    data = TASKS[name].load(3)
    assert seen_before(data) < 5  # the digits themselves contain a few twins


def test_a_test_half_that_is_the_training_half_mirrored_is_found(in_float32):
    data = TASKS["volumes"].load(3)
    assert seen_before(data._replace(test_x=data.x[:100].flip(2))) == 100


def test_seeds_draw_other_data_and_one_seed_the_same(in_float32):
    for task in TASKS.values():
        one, again, other = (task.load(seed).test_x for seed in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


def by_hand(values, resamples):
    """Compute the bootstrap-t with the standard library, from the same draws."""
    mean, root = statistics.fmean(values), len(values) ** 0.5
    found = []
    for row in study_statistics._draws(len(values), resamples).tolist():
        drawn = [values[i] for i in row]
        found.append((statistics.fmean(drawn) - mean) / (statistics.stdev(drawn) / root))
    found.sort()
    error = statistics.stdev(values) / root
    low, high = (found[math.ceil(part * resamples) - 1] for part in (0.025, 0.975))
    seen = mean / error
    tail = 1 + min(sum(t >= seen for t in found), sum(t <= seen for t in found))
    return mean, mean - high * error, mean - low * error, min(1, 2 * tail / (resamples + 1))


SKEWED = np.random.default_rng(5).exponential(size=24) - 0.6


def test_the_bootstrap_is_what_the_standard_library_computes_by_hand():
    assert bootstrap_t(SKEWED, 499) == pytest.approx(by_hand(SKEWED.tolist(), 499), rel=1e-9)
    assert bootstrap_t(SKEWED, 499)[1:3] != pytest.approx(stats.ttest_1samp(SKEWED, 0).confidence_interval(), rel=0.02)


def test_the_bootstrap_is_the_t_interval_where_that_is_right():
    values = np.random.default_rng(3).standard_normal(400) + 0.1
    test = stats.ttest_1samp(values, 0)
    assert bootstrap_t(values)[1:3] == pytest.approx(test.confidence_interval(), abs=0.01)
    assert bootstrap_t(values).p == pytest.approx(test.pvalue, rel=0.15)


@pytest.mark.parametrize("shift", np.linspace(-0.6, 0.6, 9))
def test_p_is_below_five_percent_just_where_the_interval_excludes_zero(shift):
    found = bootstrap_t(SKEWED + shift)
    assert (found.p < 0.05) == (found.sign() != 0)


def test_differences_without_spread_are_told_apart_from_zero_only_if_they_are_not_zero():
    assert bootstrap_t(np.zeros(24)) == (0, 0, 0, 1)
    assert bootstrap_t(np.full(24, 0.5)) == (0.5, 0.5, 0.5, 0)


def test_holms_correction_is_the_step_down_by_hand():
    p = [0.01, 0.04, 0.03, 0.5]
    steps = [4 * 0.01, max(4 * 0.01, 3 * 0.03), max(3 * 0.03, 2 * 0.04), 0.5]
    assert study_statistics.holm(p) == pytest.approx([steps[0], steps[2], steps[1], steps[3]])
    assert study_statistics.holm(p) != pytest.approx([4 * one for one in p])


def test_the_interval_over_tasks_has_three_degrees_of_freedom():
    means = [0.1, 0.2, 0.0, 0.3]
    half = stats.t.ppf(0.975, 3) * statistics.stdev(means) / 2
    found = study_statistics.over_tasks(means)
    assert found[:3] == pytest.approx((0.15, 0.15 - half, 0.15 + half))


def test_bootstrap_t_covers_where_the_t_interval_does_not():
    random = np.random.default_rng(0)
    normal = study_statistics.coverage(random.standard_normal(50_000), 24, 1_000)
    skewed = study_statistics.coverage(random.lognormal(size=50_000), 24, 1_000)
    assert normal.t == pytest.approx(95, abs=2)
    assert normal.bootstrap_t == pytest.approx(95, abs=2)
    assert skewed.t < 90 < skewed.bootstrap_t


def pretend(file, seeds, leave_out=()):
    """Write a data file of runs that never were, but for those left out."""
    head = {"torch": torch.__version__, "plan": study.plan_hash()}
    done = {
        (str(condition), seed): {"condition": str(condition), "seed": seed, "steps": 1, "seconds": 0, "scores": {}}
        for condition, seed in study.runs(seeds)
        if (str(condition), seed) not in leave_out
    }
    study.write(file, head, done)
    return done


def test_a_stopped_study_goes_on_with_what_is_missing(tmp_path):
    file, missing = tmp_path / "study.jsonl", ("digits, batch 8, constant", 0)
    there = pretend(file, 1, {missing})
    assert study.run_all(file, 1, small=True, workers=1) == 1
    _, now = study.read(file)
    assert now.pop(missing)["scores"]["k = 2, m = 0.1"]["final"][0] > 0
    assert now == there
    assert study.run_all(file, 1, small=True, workers=1) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["study.jsonl"]


def test_a_study_of_another_plan_is_not_gone_on_with(tmp_path, monkeypatch):
    pretend(tmp_path / "study.jsonl", 1)
    monkeypatch.setattr(study, "plan_hash", lambda: "another")
    with pytest.raises(ValueError, match=r"was begun as .* move it away"):
        study.run_all(tmp_path / "study.jsonl", 1, small=True, workers=1)


def test_runs_go_seed_after_seed_and_a_seed_counts_when_all_its_runs_are_there(tmp_path):
    order = [seed for _, seed in study.runs(3)]
    assert order == sorted(order)
    pretend(tmp_path / "study.jsonl", 3, {("mnist, batch 2, annealed", 1)})
    assert study_results.load(tmp_path / "study.jsonl").seeds == [0, 2]


def test_the_runs_do_not_import_the_page():
    def imported(name):
        tree = ast.parse((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))
        found = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        return {
            *found,
            *(alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names),
        }

    assert "study" in imported("study_page.py")
    assert "study_page" not in imported("study.py") | imported("study_tasks.py") | imported("study_results.py")


DATA = study_results.load()


def test_a_study_that_is_not_finished_is_not_published(tmp_path, monkeypatch, capsys):
    pretend(tmp_path / "study.jsonl", study.SEEDS, {("mnist, batch 2, annealed", 7)})
    monkeypatch.setattr(study_page, "DATA", tmp_path / "study.jsonl")
    monkeypatch.setattr(study_page, "write", None)
    monkeypatch.setattr(sys, "argv", ["study_page.py"])
    study_page.main()
    assert capsys.readouterr().out.startswith("23 of 24 seeds are finished")
    pretend(tmp_path / "study.jsonl", study.SEEDS)
    with pytest.raises(TypeError, match="not callable"):
        study_page.main()


@pytest.fixture(scope="module")
def page():
    torch.set_default_dtype(torch.float32)
    return study_page.page(DATA)


def test_the_data_are_those_of_the_planned_runs_and_of_the_plan():
    head, runs = study.read(study.DATA)
    assert set(runs) == {(str(condition), seed) for condition, seed in study.runs(study.SEEDS)}
    assert head["plan"] == study.plan_hash()
    assert DATA.seeds == list(range(24))
    text = study.DATA.read_text(encoding="utf-8")
    assert len(text) < 3e6
    assert text == "".join(json.dumps(line) + "\n" for line in (head, *runs.values()))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an sdist has no history")
def test_the_plan_was_committed_before_the_data_and_the_history_that_the_page_tells_is_there():
    def first(name):
        """Give the commits of a file, the first one first."""
        command = ["git", "log", "--reverse", "--format=%H", "--", f"benchmarks/{name}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()

    def there(commit):
        return not subprocess.run(
            ["git", "cat-file", "-e", commit], cwd=ROOT, capture_output=True, check=False
        ).returncode

    plan, data = first("study_plan.md"), first("study.jsonl")
    assert len(plan) == 1
    assert [commit for commit in study_page.HISTORY if not there(commit)] == []
    assert not there("0123456789")
    before = ["git", "merge-base", "--is-ancestor"]
    assert plan[0] != data[0]
    assert subprocess.run([*before, plan[0], data[0]], cwd=ROOT, check=False).returncode == 0
    assert subprocess.run([*before, data[0], plan[0]], cwd=ROOT, check=False).returncode == 1


def test_the_page_is_made_of_the_data(page):
    assert (ROOT / "docs" / "study.md").read_text(encoding="utf-8") == page


def test_the_page_is_short(page):
    prose = [line for line in page.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) < 2000


def test_the_page_quotes_the_plan(page):
    plan = " ".join(study.PLAN.read_text(encoding="utf-8").split())
    quoted = "\n".join(re.findall(r"^>.*", page, re.MULTILINE)).split("\n>\n")
    assert len(quoted) == 3
    assert all(" ".join(part.replace("> ", "").split()) in plan for part in quoted)


def with_other_losses(change):
    """Give the data with all losses of one variant in one condition changed."""
    runs = copy.deepcopy(DATA.runs)
    for (condition, seed), run in runs.items():
        if condition == "digits, batch 2, annealed":
            run["scores"][str(FIVE)]["final"][0] *= change + seed / 100
    return DATA._replace(runs=runs)


def test_other_data_would_give_another_page():
    other = with_other_losses(3)
    assert study_page.in_short(other, study_results.primary(other)) != study_page.in_short(
        DATA, study_results.primary(DATA)
    )
    assert study_page.sentences(other) != study_page.sentences(DATA)
    assert study_page.brief(other) != study_page.brief(DATA)


def verdicts(data):
    return {(t.condition, t.variant.k): t.verdict() for t in study_results.primary(data)}


def test_a_verdict_follows_the_loss():
    condition = Condition("digits", 2, "annealed")
    found = [verdicts(with_other_losses(change))[condition, 5] for change in (3, 0.3)]
    assert found == [1, -1]


def test_holms_correction_is_made_over_all_planned_comparisons():
    tests = study_results.primary(DATA)
    assert len(tests) == 4 * 4 * 2 * 2
    raw = [bootstrap_t(study_results.logs(DATA, test.condition, test.variant)).p for test in tests]
    assert min(test.p for test in tests) == pytest.approx(min(1, len(tests) * min(raw)))


def test_percent_is_the_ratio_of_geometric_means():
    condition = Condition("mnist", 8, "constant")
    losses = [study_results.values(DATA, condition, variant) for variant in (FIVE, ONE)]
    ratio = math.exp(statistics.fmean(map(math.log, losses[0])) - statistics.fmean(map(math.log, losses[1])))
    found = study_results.percent(bootstrap_t(study_results.logs(DATA, condition, FIVE)))
    assert found.mean == pytest.approx(100 * (ratio - 1))


def test_a_change_in_spreads_is_the_mean_change_over_the_deviation_between_seeds():
    condition = Condition("mnist", 8, "constant")
    one, five = ([math.log(x) for x in study_results.values(DATA, condition, variant)] for variant in (ONE, FIVE))
    by_hand = (statistics.fmean(five) - statistics.fmean(one)) / statistics.stdev(one)
    assert study_results.in_spreads(DATA, condition, FIVE) == pytest.approx(by_hand)


def test_the_predicted_ratios_are_the_papers():
    ratios = [study_results.variance(variant) / study_results.variance(ONE) for variant in (TWO, FIVE)]
    assert ratios == pytest.approx([1.99, 4.89], abs=0.005)


def test_the_answer_opens_the_page_and_stands_in_readme_and_paper(page):
    answer = study_page.sentences(DATA)
    assert all(sentence in page.split("\n## ")[0] for sentence in answer)
    for document in study_page.QUOTES:
        text = document.read_text(encoding="utf-8")
        wanted = answer if document.name == "paper.md" else [study_page.brief(DATA)]
        assert all(sentence in " ".join(text.split()) for sentence in wanted)
        assert study_page.quoting(text, DATA) == text


def test_every_figure_stands_on_the_page_and_in_its_folder(page):
    named = re.findall(r"!\[[^]]+\]\((study-\w+\.png)\)", page)
    assert sorted(named) == sorted(f"study-{name}.png" for name in study_figures.FIGURES)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("study-*.png"))


def test_a_k_has_one_colour_and_one_line_in_all_figures(in_float32):
    looks = {}
    for ax in [ax for draw in study_figures.FIGURES.values() for ax in draw(DATA).axes]:
        for container in ax.containers:
            k = int(re.search(r"k = (\d)", container.get_label())[1])
            line = container.lines[0]
            looks.setdefault(k, set()).add((line.get_color(), line.get_linestyle(), line.get_marker()))
    assert all(len(found) == 1 for found in looks.values())
    assert len({look for found in looks.values() for look in found}) == len(looks) > 1


def test_what_the_page_says_in_words_is_so_in_the_data():
    def sign(schedule, batch, variant, base=ONE):
        return study_results.over(DATA, schedule, batch, variant, base)[0].sign()

    larger = Variant(1, 0.3)
    assert [sign("annealed", 2, TWO), *(sign("annealed", batch, FIVE) for batch in study.STEPS)] == [1] * 5
    assert [sign("constant", 2, variant) for variant in (TWO, FIVE)] == [1, 1]
    assert [sign("constant", batch, v) for batch in (32, 64) for v in (TWO, FIVE, larger)] == [-1] * 6
    late = [sign(schedule, batch, Variant(1, 0.01)) for schedule in study.SCHEDULES for batch in (32, 64)]
    assert late == [1] * 4
    for variant in (TWO, FIVE):
        annealed, constant = (study_results.rule_of_thumb(DATA, schedule, variant) for schedule in study.SCHEDULES)
        assert statistics.median(annealed.ratios) == pytest.approx(annealed.predicted, rel=0.3)
        assert statistics.median(constant.ratios) < 0.6 * constant.predicted
