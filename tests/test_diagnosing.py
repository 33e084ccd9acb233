"""diagnose observes whether recomputations repeat their forward pass, names what they move, and changes nothing."""

import copy
import functools
import random
import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import count, repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import CheckpointPolicy

import recipes as by
from momentum_fix import calibrate, correct, diagnose, restore, update_once
from momentum_fix.diagnosis.report import Diagnosis, Finding
from recipes import ENGINES, Net, data
from states import CountsInAnArray, OwnNoise, ReadsItsChild, Steps
from twins import (
    EXACT,
    by_context,
    deviation,
    drop_in,
    drop_in_reentrant,
    non_reentrant,
    on_two_ranks,
    plainly,
    reentrant,
    train,
)

# Kinds of state. Each is a layer of three channels that changes itself.


def channelwise(x):
    return x.detach().movedim(1, -1).reshape(-1, 3)


class Normalizer(nn.Module):
    """Divides by an average that it has just moved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.move(channelwise(x).mean(0))
        return (x - self.mean[:, None, None]) * 2

    def move(self, mean):
        self.mean.lerp_(mean, 0.1)


class Unseen(Normalizer):
    """Writes where autograd does not see it."""

    def move(self, mean):
        self.mean.data.lerp_(mean, 0.1)


class Replaced(Normalizer):
    def move(self, mean):
        self.mean = self.mean.lerp(mean, 0.1)


class KeptInAFrozenParameter(Normalizer):
    def __init__(self):
        super().__init__()
        del self.mean
        self.mean = nn.Parameter(torch.zeros(3), requires_grad=False)


class BatchRenorm(nn.BatchNorm2d):
    def __init__(self):
        super().__init__(3)

    def forward(self, x):
        scale = (self.running_var + self.eps).sqrt().clone()
        return super().forward(x) / scale[:, None, None]


class Codebook(nn.Module):
    """Gives the nearest of codes, which are moved by what was nearest to them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.eye(3))
        self.register_buffer("counts", torch.ones(3))

    def forward(self, x):
        rows = channelwise(x)
        code = self.codes[torch.cdist(rows, self.codes).argmin(1)]
        with torch.no_grad():
            chosen = nn.functional.one_hot(torch.cdist(rows, self.codes).argmin(1), 3).to(rows)
            self.counts.data.lerp_(chosen.sum(0), 0.2)
            self.codes.data.lerp_(chosen.T @ rows / len(rows), 0.2)
        return x + (code.reshape(x.movedim(1, -1).shape).movedim(-1, 1) - x).detach().tanh()


class Observer(nn.Module):
    """Rounds to a range that follows the batches, and starts with that of the first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("high", torch.tensor(float("nan")))

    def forward(self, x):
        high = x.detach().abs().max()
        self.high = high if self.high.isnan() else self.high.lerp(high, 0.1)
        return x + ((x / self.high * 7).round() * self.high / 7 - x).detach()


class InPlace(Steps):
    """Writes to its input."""

    def forward(self, x):
        self.steps += 1
        x *= self.steps
        return x + 1


class Charge(nn.Module):
    """Has no state before its first batch, and then a plain tensor."""

    charge = None

    def forward(self, x):
        charge = x.detach().mean(0, keepdim=True)
        self.charge = charge if self.charge is None else self.charge * 0.5 + charge
        return x * torch.sigmoid(self.charge)


class Scaled(nn.Module):
    """Keeps what it reads in a dictionary of lists."""

    def __init__(self):
        super().__init__()
        self.kept = {"maxima": [torch.ones(()), torch.ones(())], "moved": 0}

    def forward(self, x):
        scale = max(self.kept["maxima"])
        self.kept["maxima"] = [*self.kept["maxima"][1:], x.detach().abs().max()]
        self.kept["moved"] += 1
        return x / scale


class MovesItsChild(nn.Module):
    """Moves a child's statistics before it calls the child, which reads them."""

    def __init__(self):
        super().__init__()
        self.child = Normalizer()
        self.child.move = lambda *_: None

    def forward(self, x):
        self.child.mean.lerp_(channelwise(x).mean(0), 0.1)
        return self.child(x)


class KeptInAList(nn.Module):
    """Moves and reads what a module has that is not registered."""

    def __init__(self):
        super().__init__()
        self.store = [Normalizer()]

    def forward(self, x):
        return self.store[0].forward(x)


class ReadsBoth(nn.Module):
    """Reads two numbers, neither of which changes the output without the other."""

    def __init__(self):
        super().__init__()
        self.one = self.two = 0

    def forward(self, x):
        self.one += 1
        self.two += 1
        return x / (1 + max(self.one, self.two))


class LeavesALoss(nn.Module):
    """Gives a loss by an attribute, which only that reads."""

    def __init__(self):
        super().__init__()
        self.weight, self.share = nn.Parameter(torch.ones(())), 1.0

    def forward(self, x):
        self.share *= 0.5
        self.loss = self.weight * self.share
        return x


class LazyNormalizer(nn.modules.lazy.LazyModuleMixin, Normalizer):
    cls_to_become = Normalizer

    def __init__(self):
        super().__init__()
        self.mean = nn.UninitializedBuffer()

    def initialize_parameters(self, x):
        if self.has_uninitialized_params():
            self.mean.materialize((3,))
            self.mean.fill_(0.5)


class Load(nn.Module):
    """Counts, and its output does not read it; in evaluation mode it does not count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.load += torch.bincount(channelwise(x).argmax(1), minlength=3)
        return x


class Gathers(nn.Module):
    def __init__(self):
        super().__init__()
        self.losses, self.last, self.seen = [], deque(maxlen=2), {0}

    def forward(self, x):
        self.losses.append(x.square().mean())
        self.last.append(float(x.detach().sum()))
        self.seen.add(len(self.losses))
        return x


def spectral(normalize):
    return lambda: nn.Sequential(normalize(nn.Conv2d(3, 3, 1)))


READ = {  # and what of it is read
    Normalizer: ["mean"],
    Unseen: ["mean"],
    Replaced: ["mean"],
    KeptInAFrozenParameter: ["mean"],
    BatchRenorm: ["running_var"],
    Codebook: ["codes"],
    Observer: ["high"],
    Steps: ["steps"],
    InPlace: ["steps"],
    OwnNoise: ["random"],
    CountsInAnArray: ["seen", "draws"],
    Charge: ["charge"],
    Scaled: ["kept"],
    MovesItsChild: ["child.mean"],
    ReadsItsChild: ["norm.running_mean"],
    KeptInAList: ["store[0].mean"],
    ReadsBoth: ["one", "two"],
    LazyNormalizer: ["mean"],
    spectral(spectral_norm): ["0.weight_u"],
    spectral(parametrizations.spectral_norm): ["0.parametrizations.weight.0._v"],
}
STATISTICS = ["running_mean", "running_var", "num_batches_tracked"]
NOT_READ = {
    lambda: nn.BatchNorm2d(3): STATISTICS,
    lambda: nn.InstanceNorm2d(3, track_running_stats=True): STATISTICS[:2],
    lambda: nn.LazyBatchNorm2d(): STATISTICS,
    Load: ["load"],
    Gathers: ["losses", "last", "seen"],
}


def net_of(kind):
    return Net(lambda _: kind())


def diagnosed(net, step=by.one, ckpt=non_reentrant, count=2):
    with diagnose(net) as report:
        train(net, step, data(count), ckpt)
    return report


# What it says.


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(("kind", "read"), READ.items())
def test_it_names_what_was_another_state_where_gradients_are_wrong(kind, read, ckpt):
    report = diagnosed(net_of(kind), ckpt=ckpt)
    assert report.gradients_right is False
    assert not report.ok
    assert report.verdict.startswith("Gradients are wrong: ")
    assert report.verdict.endswith(" of 2 recomputations gave autograd something else than the forward pass.")
    moved = {name for each in report.differences for name in each.moved}
    assert moved >= {f"{block}.1.{each}" for block in "abc" for each in read}
    assert all("preserve_state" in each.remedy and each.module[:2] in ("a.", "b.", "c.") for each in report.differences)


def test_a_number_that_autograd_itself_keeps_from_the_forward_pass_makes_nothing_wrong():
    net, twin = net_of(LeavesALoss), net_of(LeavesALoss)
    with diagnose(net) as report:
        (non_reentrant(net, data(1)[0].requires_grad_()).sum() + net.a[1].loss).backward()
    (twin(data(1)[0]).sum() + twin.a[1].loss).backward()
    assert report.gradients_right is True
    assert net.a[1].weight.grad == twin.a[1].weight.grad == 0.5


@pytest.mark.parametrize("keep", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("kind", READ)
def test_what_it_recommends_makes_it_clean(kind, keep):
    report = diagnosed(net_of(kind), ckpt=keep)
    assert report.ok
    assert report.verdict.startswith("Clean: 2 recomputations gave autograd the same as the forward pass, to the bit")


def test_what_torch_func_transforms_is_not_observed_with_the_reentrant_engine():
    model = nn.Linear(3, 3)
    for ckpt, known in ((non_reentrant, True), (reentrant, None)):
        with diagnose(model) as report:
            ckpt(lambda x: torch.vmap(torch.sin)(model(x)), torch.rand(4, 3, requires_grad=True)).sum().backward()
        assert report.gradients_right is known


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(("kind", "moved"), NOT_READ.items())
@pytest.mark.parametrize("count", [1, 2])
def test_it_names_what_moves_twice_and_is_not_read(kind, moved, ckpt, count):
    report = diagnosed(net_of(kind), ckpt=ckpt, count=count)
    # What it keeps for the loss has no graph if the reentrant engine has run it; whether the loss has it, nobody sees.
    # Nor whether the second batch reads it, but for torch's norms.
    is_known = (kind is not Gathers or ckpt is not reentrant) and (kind not in (Load, Gathers) or count == 1)
    assert report.gradients_right is (True if is_known else None)
    assert not report.ok
    begins = "Gradients are right, but" if is_known else "Not observed: "
    assert report.verdict.startswith(begins)
    assert report.verdict.endswith("recomputation moves state again (in 3 modules).")
    assert list(report) == [f"{block}.1.{each}" for block in "abc" for each in moved]
    remedy = "update_once" if "running_mean" in moved else "preserve_state"
    assert {(each.times, each.remedy) for each in report.values()} == {(2, remedy)}


@pytest.mark.parametrize("kind", [Normalizer, Load])
def test_a_forgotten_checkpoint_is_not_ok(kind):
    report = diagnosed(net_of(kind), ckpt=plainly)
    assert report.gradients_right is None
    assert not report.ok
    assert not report
    assert str(report).startswith("Not observed: no recomputation was seen. Is checkpointing on?")


def test_a_model_without_state_is_clean():
    report = diagnosed(net_of(nn.Identity))
    assert report.ok
    assert str(report) == (
        "Clean: 2 recomputations gave autograd the same as the forward pass, to the bit, and moved no state again."
    )


@pytest.mark.parametrize("ckpt", [plainly, non_reentrant])
def test_evaluation_mode_is_not_ok_and_said(ckpt):
    report = diagnosed(net_of(Load).eval(), ckpt=ckpt)
    assert not report.ok
    assert (
        report.verdict == "Not observed: the model ran in evaluation mode. Call model.train(), and run a training step."
    )
    assert report.gradients_right is (None if ckpt is plainly else True)


def test_a_frozen_part_in_evaluation_mode_does_not_hide_the_training():
    net = net_of(Load)
    net.b.eval()
    report = diagnosed(net)
    assert report.in_training
    assert {name[0] for name in report} == {"a", "c"}


def test_without_a_backward_pass_it_is_not_ok():
    net = Net()
    with diagnose(net) as report:
        non_reentrant(net, *data(1))
    assert not report.ok
    assert report.verdict == (
        "Not observed: no backward pass was seen inside the block. Put a whole training step into it."
    )


def test_until_the_block_ends_nothing_is_known():
    net = net_of(nn.Identity)
    with diagnose(net) as report:
        train(net, by.one, data(1), non_reentrant)
        assert not report.ok
        assert str(report) == "Nothing is known: the block has not ended."
    assert report.ok


def test_the_report_is_two_tables_a_mapping_and_short_in_a_shell():
    net = nn.ModuleDict(
        {"stem": by.block(), "body": by.block(lambda _: nn.Sequential(nn.BatchNorm2d(3), Steps(), by.Kink()))}
    )
    with diagnose(net) as report:
        non_reentrant(net["body"], net["stem"](*data(1))).sum().backward()
    (difference,) = report.differences
    assert str(report).splitlines() == [
        "Gradients are wrong: 1 of 1 recomputation gave autograd something else than the forward pass.",
        "",
        "differs from  in the checkpoint of  by    state that had changed",
        f"body.1.2      body                  {difference.size:.2g}  body.1.1.steps",
        "",
        "module    class        state                                           times  use             note",
        "body.1.0  BatchNorm2d  running_mean, running_var, num_batches_tracked  2      update_once",
        "body.1.1  Steps        steps                                           2      preserve_state",
        "",
        "Use: preserve_state.",
        "Fix: update_once(model)",
        "Fix: checkpoint(..., context_fn=preserve_state)",
    ]
    assert (difference.module, difference.checkpoint, difference.moved) == ("body.1.2", "body", ("body.1.1.steps",))
    assert repr(report) == f"<Diagnosis: {report.verdict}>"
    finding = report["body.1.1.steps"]
    assert (finding.module, finding.attribute, finding.module_class) == ("body.1.1", "steps", "Steps")
    page = report._repr_html_()
    assert report.verdict in page
    assert "<td>body.1.1</td><td>Steps</td><td>steps</td><td>2</td><td>preserve_state</td>" in page
    assert "<p>Fix: checkpoint(..., context_fn=preserve_state)</p>" in page


def test_the_model_itself_may_have_the_state():
    layer = Steps()
    with diagnose(layer) as report:
        non_reentrant(lambda y: layer(y).tanh(), torch.rand(3, requires_grad=True)).sum().backward()
    assert list(report) == ["steps"]


def test_a_shared_module_has_its_first_name():
    shared = Load()
    net = nn.ModuleDict({"left": shared, "right": nn.Sequential(shared, by.Kink())})
    with diagnose(net) as report:
        non_reentrant(net["right"], data(1)[0].requires_grad_()).sum().backward()
    assert list(report) == ["left.load"]


@pytest.mark.parametrize("wrong", [3, None, torch.jit.script(nn.Linear(1, 1))])
def test_what_is_no_module_is_refused(wrong):
    with pytest.raises(TypeError, match=f"model is of type {type(wrong).__name__}, but must be an nn.Module"):
        diagnose(wrong).__enter__()


# How often.


TIMES = {
    "one": (by.one, 2),
    "nested": (by.nested, {"a": 2, "b": 3, "c": 2}),
    "early stop off": (by.never_stopping_early, 3),
    "the last segment is not recomputed": (by.sequential(False), {"a": 2, "b": 2}),
    "a frozen block": (by.frozen, {"b": 2, "c": 2}),
    "several backwards": (by.two_backwards, 3),
    "gradient penalty": (by.gradient_penalty, 3),
    "accumulation": (by.accumulating(by.one), 2),
    "siamese": (by.siamese, 2),
    "pipeline": (by.pipeline, 2),
    "twice in a region": (by.twice_in_a_region, 2),
    "some batches without backward": (by.forward_only, Fraction(3, 2)),
    "an exception in a recomputation": (by.failing_recomputation, {"a": 2, "b": Fraction(3, 2), "c": Fraction(3, 2)}),
    "a checkpoint within the model": (by.inside_the_model, {"a": 2, "b": 3, "c": 2}),
    "written by hand": (lambda net, x, ckpt: by.one(net, x, by.hand_written), 2),
}


@pytest.mark.parametrize(("step", "times"), TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("kind", [Load, Normalizer])
def test_it_counts_how_often_a_batch_moves_it(kind, step, times):
    attribute = "load" if kind is Load else "mean"
    found = diagnosed(net_of(kind), step, count=1)
    expected = times if isinstance(times, dict) else dict.fromkeys("abc", times)
    assert {name: finding.times for name, finding in found.items()} == {
        f"{block}.1.{attribute}": number for block, number in expected.items()
    }
    if step is TIMES["written by hand"][0]:
        assert found.gradients_right is None
        assert "ran in the backward pass, but not in a checkpoint of torch's" in found.verdict
    elif step is TIMES["an exception in a recomputation"][0] and kind is Load:
        assert found.gradients_right is None  # of what was interrupted
    elif step is TIMES["accumulation"][0] and kind is Load:
        assert found.gradients_right is None  # the next batch may read it
    else:
        assert found.gradients_right is (kind is Load)


def test_where_selective_checkpointing_saves_a_norm_only_its_counter_moves_again():
    saved = diagnosed(Net(), by.selective(CheckpointPolicy.MUST_SAVE))
    recomputed = diagnosed(Net(), by.selective(CheckpointPolicy.MUST_RECOMPUTE))
    assert {finding.attribute for finding in saved.values()} == {"num_batches_tracked"}
    assert {finding.attribute for finding in recomputed.values()} == set(STATISTICS)


def test_what_another_engine_runs_in_a_module_of_others_has_not_moved_if_it_has_not():
    model = nn.ModuleDict({"a": nn.Conv2d(3, 3, 1), "b": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3).eval())})
    outside = nn.Sequential(model["a"], model["b"])
    with diagnose(model) as report:
        by.hand_written(outside, data(1)[0].requires_grad_()).sum().backward()
    assert not report
    model["b"][1].train()
    with diagnose(model) as report:
        by.hand_written(outside, data(1)[0].requires_grad_()).sum().backward()
    assert {(each.module, each.times) for each in report.values()} == {("b.1", 2)}


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, by.instance_norm])  # torch writes to their statistics unnoticed
def test_all_that_another_engine_moves_again_is_named(kind):
    net = Net(kind)
    found = diagnosed(net, ckpt=by.hand_written)
    assert {*found} == {name for name, each in net.named_buffers() if kind is nn.BatchNorm2d or "running" in name}
    assert {each.times for each in found.values()} == {2}


def test_what_the_user_or_an_optimizer_changes_is_not_counted():
    net = net_of(nn.Identity)
    net.register_buffer("load", torch.ones(3))
    net.epoch = 0
    with diagnose(net) as report:
        for x in data(2):
            y = non_reentrant(net, x.requires_grad_())
            net.epoch += 1
            net.load.zero_()
            y.sum().backward()
            net.load += 1
    assert report.ok


class CountsGradients(nn.Module):
    """Counts in a hook that autograd calls, and so in the backward pass."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(())), 0
        self.weight.register_hook(self.count)

    def count(self, _):
        self.seen += 1

    def forward(self, x):
        return x * self.weight


def test_what_a_hook_moves_in_the_backward_pass_is_no_recomputations():
    net = net_of(CountsGradients)
    assert diagnosed(net).ok
    assert net.a[1].seen == 2


class MovesInAMethod(nn.Module):
    """Checkpoints a method, which moves a number before or after it calls a module."""

    def __init__(self, ckpt, after):
        super().__init__()
        self.a, self.b, self.ckpt, self.after, self.steps = nn.Linear(3, 3), nn.Linear(3, 3), ckpt, after, 0

    def part(self, x):
        self.steps += not self.after
        x = self.b(x).tanh() + (0 if self.after else self.steps)
        self.steps += self.after
        return x

    def forward(self, x):
        return self.ckpt(self.part, self.a(x))


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_what_a_method_moves_outside_of_a_call_of_a_module_is_found(ckpt):
    net = MovesInAMethod(ckpt, after=False)
    with diagnose(net) as report:
        net(torch.rand(2, 3)).square().sum().backward()
    assert report.gradients_right is True  # no gradient depends on what is added
    assert {name: (finding.times, finding.remedy) for name, finding in report.items()} == {
        "steps": (2, "preserve_state")
    }


def test_what_early_stop_leaves_out_is_not_moved_again():
    net = MovesInAMethod(non_reentrant, after=True)
    with diagnose(net) as report:
        net(torch.rand(2, 3)).sum().backward()
    assert report.ok
    assert net.steps == 1


class OnlyInRecomputations(nn.BatchNorm2d):
    """Does what fairscale's checkpoint_wrapper does under the reentrant engine."""

    def __init__(self):
        super().__init__(3)

    def forward(self, x):
        self.track_running_stats = torch.is_grad_enabled()
        y = super().forward(x)
        self.track_running_stats = True
        return y


def test_what_moves_in_recomputations_only_is_said_to_be_moved_by_them():
    report = diagnosed(net_of(OnlyInRecomputations), ckpt=ENGINES["reentrant"])
    assert not report.ok
    assert {each.remedy for each in report.values()} == {"update_once"}


# What is put right is ok, and what is only half right is not.


def test_update_once_is_ok_but_not_where_outputs_read_the_statistics():
    torchs, reads = Net(), net_of(BatchRenorm)
    update_once(torchs)
    with pytest.warns(UserWarning, match="forward of its own"):
        update_once(reads)
    assert diagnosed(torchs).ok
    report = diagnosed(reads)
    assert report.gradients_right is False
    assert not report  # statistics are right
    assert {each.remedy for each in report.differences} == {"preserve_state"}


class OwnChild(nn.BatchNorm2d):
    """Keeps statistics in a child, which update_once lets work on copies."""

    def __init__(self, channels):
        super().__init__(channels)
        self.child = Load()

    def forward(self, x):
        return super().forward(self.child(x))


@pytest.mark.filterwarnings("ignore:.*forward of its own")
def test_what_is_moved_and_put_back_within_a_recomputation_has_not_moved():
    covered, plain = Net(OwnChild), Net(OwnChild)
    update_once(covered)
    assert diagnosed(covered).ok
    assert len(diagnosed(plain)) == 12


def test_a_momentum_may_be_corrected_for_three_passes():
    assert diagnosed(correct(Net(), passes=3), by.two_backwards).ok
    assert not diagnosed(correct(Net(), passes=2), by.two_backwards).ok


@pytest.mark.parametrize(("passes", "note"), [(2, "its momentum makes up for it"), (3, "another number of passes")])
def test_a_corrected_momentum_is_ok_if_it_is_corrected_for_that_number(passes, note):
    report = diagnosed(correct(Net(), passes))
    assert report.ok is (passes == 2)
    assert report.fixes == (() if passes == 2 else ("update_once(restore(model))",))
    assert len(report) == 9
    assert all(finding.note.endswith(note) for finding in report.values())


@pytest.mark.parametrize("ckpt", [plainly, *EXACT.values()], ids=["plainly", *EXACT])
def test_a_corrected_momentum_is_not_ok_where_the_layer_moves_once(ckpt):
    report = diagnosed(correct(Net(), passes=2), by.one, ckpt)
    assert not report.ok
    assert "a momentum is corrected for passes that this step did not make (in 3 modules)" in report.verdict
    assert report.verdict.startswith("Not observed" if ckpt is plainly else "Gradients are right")
    assert report.fixes == ("restore(model)",)
    rows = {(f.times, f.remedy, f.note) for f in report.values()}
    assert rows == {(1, "restore", "its momentum is corrected, but it moves once")}
    assert not diagnosed(Net(), by.one, ckpt)
    assert not diagnosed(correct(Net(), passes=2).eval(), by.one, ckpt)


def test_a_correction_of_layers_outside_of_the_checkpoint_is_found_beside_a_right_one():
    report = diagnosed(correct(Net(), passes=2), by.each_its_own)
    assert {name.partition(".")[0]: (f.times, f.remedy) for name, f in report.items()} == {
        "a": (1, "restore"),
        "b": (2, ""),
        "c": (2, ""),
    }
    wrong = diagnosed(correct(Net(), passes=3), by.each_its_own)
    assert wrong.verdict == "Gradients are right, but recomputation moves state again (in 3 modules)."


def by_hand(net, *names):
    for name in names:
        net.get_submodule(name).momentum = 1 - 0.9**0.5
    return net


def calibrated(net, step):
    with calibrate(net):
        train(net, step, data(1), non_reentrant)
    return net


NO_FIX = "its momentum is corrected, but it moves once"
PASTED = {"update_once": update_once, "restore": restore, "correct": correct}
FIXES = {  # for a net of which b and c are checkpointed; what nothing is said of would be right
    "nothing": (lambda net: net, "update_once(model)"),
    "a": (lambda net: correct(net, {"a": 2}), "update_once(restore(model))"),
    "b": (lambda net: correct(net, {"b": 2}), "update_once(restore(model))"),
    "a and b": (lambda net: correct(net, {"a": 2, "b": 2}), "update_once(restore(model))"),
    "all": (lambda net: correct(net, 2), "update_once(restore(model))"),
    "all, for three passes": (lambda net: correct(net, 3), "update_once(restore(model))"),
    "a by hand": (lambda net: by_hand(net, "a.1"), "update_once(correct(model, passes=1))"),
    "all by hand": (lambda net: by_hand(net, "a.1", "b.1", "c.1"), "update_once(correct(model, passes=1))"),
    "b, and a by hand": (lambda net: correct(by_hand(net, "a.1"), {"b": 2}), "update_once(correct(model, passes=1))"),
}


@pytest.mark.parametrize(("prepare", "line"), FIXES.values(), ids=FIXES)
def test_the_line_to_paste_makes_all_statistics_right_whatever_was_corrected(prepare, line):
    truth, net = by.seeded_pair(nn.BatchNorm2d)
    prepare(net)
    report = diagnosed(copy.deepcopy(net), by.each_its_own)
    assert report.fixes == (line,)
    untouched = train(copy.deepcopy(net), by.each_its_own, data(), non_reentrant)
    eval(line, PASTED, {"model": net})
    assert diagnosed(copy.deepcopy(net), by.each_its_own).ok
    train(truth, by.each_its_own, data(), plainly)
    assert deviation(train(net, by.each_its_own, data(), non_reentrant), truth) < 1e-12
    assert deviation(untouched, truth) > 1e-3


def test_a_layer_that_moves_once_and_was_corrected_by_hand_is_given_its_momentum_back():
    net = by_hand(Net(), "a.1", "b.1", "c.1")
    report = diagnosed(net, by.one, plainly)
    assert {(f.times, f.remedy, f.note) for f in report.values()} == {(1, "momentum=0.1", NO_FIX)}
    assert report.fixes == ("correct(model, passes=1)",)
    eval(*report.fixes, PASTED, {"model": net})
    assert not diagnosed(net, by.one, plainly)
    assert diagnosed(net, by.one).fixes == ("update_once(model)",)


class CountsRecomputations(nn.Module):
    """Moves only if gradients are on, which is in recomputations alone with the reentrant engine."""

    def __init__(self):
        super().__init__()
        self.norm, self.count = nn.BatchNorm2d(3), 0

    def forward(self, x):
        self.count += torch.is_grad_enabled()
        return self.norm(x)


def test_what_moves_once_and_is_no_statistic_has_no_momentum_to_be_given_back():
    report = diagnosed(correct(net_of(CountsRecomputations), 2), by.one, reentrant, count=1)
    assert (report["a.1.count"].times, report["a.1.count"].remedy) == (1, "")
    assert report.fixes == ()


@pytest.mark.parametrize("again", [calibrated, lambda net, step: correct(net, 3)])
def test_a_root_by_hand_is_one_also_if_it_was_corrected_once_more(again):
    net = again(by_hand(Net(), "a.1", "b.1", "c.1"), by.one)
    wrong = diagnosed(copy.deepcopy(net), by.nested if again is calibrated else by.one)
    assert wrong.fixes == ("update_once(correct(model, passes=1))",)
    idle = diagnosed(copy.deepcopy(net), by.one, plainly)
    assert idle.fixes == ("correct(model, passes=1)",)
    assert {each.remedy for each in idle.values()} == {"momentum=0.1"}
    for report in (wrong, idle):
        mended = copy.deepcopy(net)
        eval(*report.fixes, PASTED, {"model": mended})
        assert {norm.momentum for norm in by.norms(mended)} == {0.1}


def test_update_once_stays_on_where_another_layer_is_corrected():
    truth, net = by.seeded_pair(nn.BatchNorm2d)
    update_once(net.b)
    correct(net.a, 2)
    update_once(net.c)
    report = diagnosed(copy.deepcopy(net), by.each_its_own)
    assert report.fixes == ("correct(model, passes=1)",)
    eval(*report.fixes, PASTED, {"model": net})
    assert diagnosed(copy.deepcopy(net), by.each_its_own).ok
    train(truth, by.each_its_own, data(), plainly)
    assert deviation(train(net, by.each_its_own, data(), non_reentrant), truth) < 1e-12


def test_no_line_is_given_for_a_corrected_layer_that_it_does_not_reach():
    net = net_of(nn.Identity)
    net.hidden = [correct(nn.BatchNorm2d(3))]
    with diagnose(net) as report:
        net.hidden[0](net(data(1)[0].requires_grad_())).sum().backward()
    assert {(each.module, each.times, each.remedy) for each in report.values()} == {("hidden[0]", 1, "momentum=0.1")}
    assert report.fixes == ()


@pytest.mark.filterwarnings("ignore:.*got a corrected momentum after update_once")
def test_a_momentum_that_was_corrected_by_hand_after_update_once_is_named():
    net = Net()
    update_once(net)
    report = diagnosed(by_hand(net, "a.1", "b.1", "c.1"))
    assert {(f.times, f.remedy, f.note) for f in report.values()} == {(1, "momentum=0.1", NO_FIX)}
    eval(*report.fixes, PASTED, {"model": net})
    assert diagnosed(net).ok


def test_where_state_is_to_be_preserved_no_momentum_may_be_corrected():
    net = correct(net_of(lambda: nn.Sequential(Normalizer(), nn.BatchNorm2d(3))), 2)
    report = diagnosed(net, by.one)
    assert report.fixes == ("update_once(restore(model))", "checkpoint(..., context_fn=preserve_state)")
    eval(report.fixes[0], PASTED, {"model": net})
    assert diagnosed(net, by.one, by_context).ok


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_lines_name_what_is_not_in_the_model_that_was_given(passes):
    model, others = Net(nn.Identity), [nn.Sequential(by.block()), nn.Sequential(by.block())]
    correct(others[0], passes)
    with diagnose(model) as report:
        y = data(1)[0].requires_grad_()
        for each in others:
            y = non_reentrant(each, y)
        non_reentrant(model, y).sum().backward()
    line = {
        1: "update_once(...) on the model that has Sequential, Sequential 2",
        2: "update_once(...) on the model that has Sequential 2",
        3: "update_once(restore(...)) on the model that has Sequential, Sequential 2",
    }
    assert report.fixes == (line[passes],)


class PastItsNorm(nn.Module):
    """Moves the statistics of a norm layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        norm = self.norm
        return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)


@pytest.mark.parametrize(("ckpt", "use"), [(non_reentrant, "preserve_state"), (by.hand_written, "torch's checkpoint")])
def test_update_once_is_not_advised_where_it_is_on_and_does_not_help(ckpt, use):
    net = net_of(PastItsNorm)
    assert diagnosed(net, ckpt=ckpt).fixes == ("update_once(model)",)
    update_once(net)
    report = diagnosed(net, ckpt=ckpt)
    assert len(report) == 6
    assert all(finding.remedy.startswith(use) for finding in report.values())
    assert {(each.times, each.note) for each in report.values()} == {(2, "moves again although update_once is on it")}
    assert "update_once(model)" not in report.fixes


@pytest.mark.parametrize("prepare", [lambda net: correct(net, 2), lambda net: net])
def test_what_moved_again_and_is_right_is_not_said_not_to_have_moved(prepare):
    report = diagnosed(prepare(Net(by.cumulative)), count=1)
    assert report.ok
    assert report.verdict.endswith("to the bit, and what moved again does no harm.")
    assert diagnosed(Net(nn.Identity), count=1).verdict.endswith("to the bit, and moved no state again.")


def test_a_step_without_a_backward_pass_says_nothing_of_a_corrected_momentum():
    net = correct(Net())
    with diagnose(net) as report:
        net(data(1)[0])
    assert not report
    assert not report.ok


def test_a_corrected_momentum_is_not_ok_where_the_number_varies():
    assert not diagnosed(correct(Net()), by.forward_only).ok


def test_a_root_written_by_hand_is_a_corrected_momentum():
    assert diagnosed(Net(lambda channels: nn.BatchNorm2d(channels, momentum=1 - 0.9**0.5))).ok


def test_a_cumulative_average_is_ok_if_the_number_does_not_vary():
    assert diagnosed(Net(by.cumulative)).ok
    assert not diagnosed(Net(by.cumulative), by.forward_only).ok


class Restores:
    """A context for a checkpoint's recomputation: the state is what it was at the forward, and is put back."""

    def __init__(self, net):
        self.net, self.before = net, copy.deepcopy(net.state_dict())

    def __enter__(self):
        self.now = copy.deepcopy(self.net.state_dict())
        self.net.load_state_dict(self.before)

    def __exit__(self, *_):
        self.net.load_state_dict(self.now)


class PastItsChild(nn.Module):
    """Runs a child without calling it."""

    def __init__(self):
        super().__init__()
        self.child = Normalizer()

    def forward(self, x):
        return self.child.forward(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [Unseen, PastItsChild])
@pytest.mark.parametrize("step", [by.one, by.siamese, by.accumulating(by.one)])
def test_a_recomputation_that_starts_where_its_forward_did_and_is_put_back_is_ok(step, kind, frozen):
    net = net_of(kind).requires_grad_(not frozen)

    def restoring(function, x):
        contexts = warnings.catch_warnings(), Restores(net)
        return non_reentrant(function, x, context_fn=lambda: contexts)

    assert diagnosed(net, step, restoring).ok
    assert not diagnosed(net, step).ok


# What cannot be found out is never said to be ok.


@pytest.mark.parametrize("kind", [lambda: nn.BatchNorm2d(3), nn.Identity])
def test_a_checkpoint_in_compiled_code_is_not_observed_and_that_is_said(kind):
    report = diagnosed(net_of(kind), by.compiled_whole("aot_eager"), count=1)
    assert report.gradients_right is None
    assert not report.ok
    assert "compiled code" in report.verdict  # that one was compiled is not seen before torch 2.12
    assert "run a step without torch.compile" in report.verdict


def test_a_compiled_model_is_not_observed():
    model = torch.compile(net_of(nn.Identity), backend="aot_eager")
    with diagnose(model) as report:
        model(*data(1)).sum().backward()
    assert report.gradients_right is None
    assert not report.ok
    assert "compiled code" in report.verdict


@pytest.mark.parametrize("kind", [Normalizer, Load])
def test_a_compiled_block_within_a_checkpoint_is_observed_from_outside(kind):
    net = net_of(kind)
    net.b.compile(backend="aot_eager")
    report = diagnosed(net, count=1)
    assert report.gradients_right is (kind is Load)
    assert all(finding.times == 2 for finding in report.values())
    assert len(report) == 3


class Scales(nn.Module):
    """Autograd saves its state, and nothing that depends on it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3, 1, 1))

    def forward(self, x):
        self.scale *= 2
        return x * self.scale


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_statistics_that_compiled_code_saves_and_may_not_read_make_nothing_wrong(backend):
    report = diagnosed(Net(), by.compiled_block(backend), count=1)
    if backend == "eager":  # of which it is known
        assert report.gradients_right is True
    else:
        assert report.gradients_right is None
        assert "could not be compared. Run a step without torch.compile." in report.verdict
    net = Net()
    update_once(net)
    assert diagnosed(net, by.compiled_block(backend), count=1).ok
    assert diagnosed(net_of(Normalizer), by.compiled_block(backend), count=1).gradients_right is False


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, by.instance_norm])
def test_compiled_code_beside_a_norm_layer_leaves_that_known(norm):
    net = Net(norm)
    net.a[0].compile(backend="aot_eager")
    assert diagnosed(net, count=1).gradients_right is True


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_traced_code_in_a_checkpoint_is_no_crash():
    net = nn.Sequential(torch.jit.trace(nn.Linear(3, 3), torch.rand(2, 3)), nn.Tanh())
    with diagnose(net) as report:
        non_reentrant(net, torch.rand(2, 3)).sum().backward()
    assert report.gradients_right is True


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_state_that_compiled_code_saves_is_read(backend):
    block = nn.Sequential(nn.Conv2d(3, 3, 1), Scales())
    report = diagnosed(block, by.compiled_block(backend), count=1)
    assert report.gradients_right is False


def test_torchscript_is_said_not_to_be_looked_at():
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 3))), nn.Tanh())
    with diagnose(net) as report:
        non_reentrant(net, torch.rand(2, 3)).sum().backward()
    assert report.gradients_right is True
    assert not report.ok
    assert report["0"].note == "its state is not looked at"


def on_ranks(rank):
    net = DistributedDataParallel(net_of(Normalizer))
    for _ in range(2):  # in the second step DDP sends the buffers of the first rank to the other
        with diagnose(net) as report:
            by.inside_the_model(net, data(1)[0] + rank, non_reentrant)
    times = {name: finding.times for name, finding in report.items()}
    assert times == {"module.a.1.mean": 2, "module.b.1.mean": 3, "module.c.1.mean": 2}
    assert report.gradients_right is False
    with diagnose(net) as report:
        by.inside_the_model(net, data(1)[0] + rank, by_context)
    assert report.ok


def test_each_rank_observes_its_own_recomputations(tmp_path):
    on_two_ranks(on_ranks, tmp_path)


# It changes nothing.


def picture(model):
    """Give everything that modules have, as plain Python values."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype), str(value.detach().tolist())
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple, deque)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, (bool, int, float, str, set)) else type(value).__name__

    def own(module):
        return {name: value for name, value in vars(module).items() if "hooks" not in name}

    return {name: plain(own(module)) for name, module in model.named_modules()}


def gradients(model):
    return [(None if each.grad is None else each.grad.tolist()) for each in model.parameters()]


class Noisy(nn.Module):
    """Draws from each stream of random numbers, and writes to its input."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner, self.dropout = nn.Parameter(torch.ones(3)), Steps(), nn.Dropout(0.3)

    def forward(self, x):
        x = self.dropout(self.inner(x).clone())
        x *= 1 + random.random() + np.random.rand() + torch.rand(())
        return x * self.weight[:, None, None]


class ActNorm(nn.Module):
    """Writes to its parameter at the first batch, so that a trial with that state would write to it again."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("load", torch.zeros(3))

    def forward(self, x):
        if not self.ready:
            self.scale.data.mul_(2)
            self.ready.fill_(True)
        self.load += self.scale.data
        return x * self.scale[:, None, None]


class Toggles(Steps):
    """Has an attribute after every other batch."""

    def forward(self, x):
        if "odd" in vars(self):
            del self.odd
        else:
            self.odd = True
        return super().forward(x)


class Elsewhere(Normalizer):
    """Moves its buffer by a function that has it in its closure."""

    def __init__(self):
        super().__init__()
        mean = self.mean
        self.move = lambda new: mean.lerp_(new, 0.1)
        self.steps = Steps()

    def forward(self, x):
        return super().forward(self.steps(x))


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("kind", [*READ, *NOT_READ, Noisy, ActNorm, Toggles, Elsewhere])
def test_the_step_gives_bit_for_bit_what_it_gives_without(kind, ckpt):
    seen = []
    for watched in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        net = net_of(kind)
        with diagnose(net) if watched else warnings.catch_warnings():
            train(net, by.one, data(3), ckpt)
        numbers = torch.rand(2).tolist(), random.random(), np.random.rand()
        seen.append((picture(net), gradients(net), numbers))
    assert seen[0] == seen[1]


def test_this_check_sees_a_difference():
    for kind in (Noisy, Gathers, Charge):
        torch.manual_seed(0)
        net = net_of(kind)
        before = picture(net)
        net(*data(1))
        assert picture(net) != before


def test_objects_stay_the_same_objects():
    net = nn.Sequential(Scaled(), Normalizer(), nn.Conv2d(3, 3, 1))
    kept = net[0].kept, net[1].mean, net[2].weight, net[2]._parameters, net[1]._buffers
    with diagnose(net):
        train(net, by.one, data(1), non_reentrant)
    now = net[0].kept, net[1].mean, net[2].weight, net[2]._parameters, net[1]._buffers
    assert all(one is other for one, other in zip(kept, now, strict=True))


def hooks(model):
    modules = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    everywhere = torch.nn.modules.module
    shared = len(everywhere._global_forward_hooks) + len(everywhere._global_forward_pre_hooks)
    return sum(modules) + shared + sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())


def test_no_hook_stays_even_after_an_exception():
    net = Net()
    with diagnose(net):
        assert hooks(net) > 10
        train(net, by.one, data(1), non_reentrant)
    assert hooks(net) == 0
    with pytest.raises(by.StoppedError), diagnose(net) as report:
        raise by.StoppedError
    assert hooks(net) == 0
    assert torch.utils.checkpoint._CheckpointFrame.__module__ == "torch.utils.checkpoint"
    assert not report.ok


def test_a_copy_made_in_the_block_works():
    net = Net()
    with diagnose(net) as report:
        twin = copy.deepcopy(net)
        twin(*data(1))
        train(net, by.one, data(1), plainly)
    twin(*data(1))
    assert not report
    assert int(twin.a[1].num_batches_tracked) == 2


# Values that are hard to compare.


def test_nan_equals_nan():
    class Spoilt(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("tensor", torch.full((2,), float("nan")))
            self.number = float("nan")

        def forward(self, x):
            self.tensor, self.number = self.tensor + 1, self.number + 1
            return x

    assert diagnosed(net_of(Spoilt)).ok


def test_what_is_not_known_has_a_question_mark():
    report = Diagnosis({"a.b": Finding("a", "b", "C", None, "", "")})
    assert str(report).splitlines()[-1].split() == ["a", "C", "b", "?", "nothing"]


def test_a_large_buffer_is_as_well_looked_into_as_a_small_one():
    class Large(Normalizer):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(20_000))

        def forward(self, x):
            self.table += 1
            return super().forward(x) * self.table.sum()

    net = net_of(Large)
    report = diagnosed(net, count=3)
    assert {name.partition(".")[2] for each in report.differences for name in each.moved} == {"1.table", "1.mean"}
    assert {finding.times for finding in report.values()} == {2}
    assert net.b[1].table.unique().tolist() == [6]


def test_right_is_true_of_this_step_and_more_steps_find_what_is_read_later():
    class Late(Steps):
        def forward(self, x):
            self.steps += 1
            return x * max(self.steps - 3, 1)

    assert diagnosed(net_of(Late), count=1).gradients_right is True
    assert diagnosed(net_of(Late), count=4).gradients_right is False


def test_modules_in_a_list_of_the_model_itself_are_named_by_the_list():
    model = KeptInAList().double()
    with diagnose(model) as report:
        non_reentrant(lambda x: model(x).tanh(), data(1)[0].requires_grad_()).sum().backward()
    assert [*report] == ["store[0].mean"]


def test_tensors_without_values_do_not_move_and_other_objects_are_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("nothing", torch.zeros(3, device="meta"))
            self.register_buffer("absent", None)
            self.own, self.sparse = SimpleNamespace(steps=0), torch.eye(3).to_sparse()
            self.several = [np.zeros(2), object(), self.sparse]

        def forward(self, x):
            self.nothing += 1
            self.own.steps += 1
            self.own = copy.copy(self.own)
            return x

    assert diagnosed(net_of(Odd)).ok


def test_a_change_of_shape_or_type_is_a_move():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("values", torch.zeros(0))
            self.flag = 1

        def forward(self, x):
            self.values = torch.zeros(len(self.values) + 1)
            self.flag = True if type(self.flag) is int else 1
            return x

    assert {finding.attribute for finding in diagnosed(net_of(Grows), count=1).values()} == {"values", "flag"}


def test_early_stop_within_the_module_that_reads_does_not_hide_it():
    class Last(Steps):
        def forward(self, x):
            self.steps += 1
            return (x * self.steps).tanh()  # the recomputation is left here, by an exception

    net = nn.Sequential(Last(), Load())
    with diagnose(net) as report:
        for _ in range(2):
            non_reentrant(net[0], torch.rand(4, 3, 1, 1, requires_grad=True)).sum().backward()
            net[1](torch.rand(4, 3, 1, 1))
    assert {name: finding.times for name, finding in report.items()} == {"0.steps": 2}
    assert {each.module for each in report.differences} == {"0"}


def test_many_modules_and_checkpoints_take_seconds():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(250)))
    with diagnose(net) as report:
        x = torch.rand(8, 4)
        for part in net.children():
            x = part(x)
        non_reentrant(net, torch.rand(8, 4)).sum().backward()
    assert len(report) == 750


# What could be hidden from it.


class Moves(nn.Module):
    """Computes with a number that it then moves."""

    def __init__(self, compute):
        super().__init__()
        self.linear, self.compute, self.step = nn.Linear(6, 6), compute, 1.0

    def forward(self, x):
        y = self.compute(self.linear(x), self.step)
        self.step += 1
        return y


def masked(value):
    def compute(h, step):
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
        shifted = h - step * torch.linspace(0, 3, 6, dtype=h.dtype)  # of which autograd saves nothing
        return shifted.masked_fill(mask, value).log_softmax(-1).masked_fill(mask, 0)

    return compute


def mixed(h, step):
    return (h.to(torch.bfloat16).sin().to(h.dtype) + h * (1 + 0.003 * step)).square()


HIDING = {
    "a mask of -1e9": masked(-1e9),
    "a mask of -inf": masked(-torch.inf),
    "bfloat16 before float32": mixed,
    "alpha": lambda h, step: torch.add(h, h.detach(), alpha=1) if step < 0 else torch.sub(h, h.sin(), alpha=step),
}


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("compute", HIDING.values(), ids=HIDING)
def test_a_difference_is_seen_beside_large_values_and_coarse_ones(compute, ckpt):
    wrong = ckpt is ENGINES["reentrant"] or compute is not HIDING["alpha"]  # which the graph of the forward pass holds
    for tool, right in ((ckpt, not wrong), (by_context, True)):
        torch.manual_seed(0)
        model, x = Moves(compute).float(), torch.rand(6, 6, dtype=torch.float32).requires_grad_()
        with diagnose(model) as report:
            tool(model, x).sum().backward()
        assert report.gradients_right is right


@pytest.mark.parametrize("value", [-1e9, -torch.inf])
def test_rounding_beside_a_mask_is_rounding(value):
    noise = iter([0.0, 1e-14])
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    model = Moves(lambda h, _: (h * (1 + next(noise))).masked_fill(mask, value).logsumexp(-1))
    model.step = torch.zeros(())
    with diagnose(model) as report:
        non_reentrant(model, torch.rand(6, 6).requires_grad_()).sum().backward()
    assert report.gradients_right is True
    assert 0 < report.rounding < 1e-12


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient * ctx.by, None


def test_what_a_function_of_a_users_hides_from_a_reentrant_checkpoint_is_not_called_right():
    for ckpt, right in ((ENGINES["reentrant"], None), (non_reentrant, True)):
        model = Moves(lambda h, step: Reversal.apply(h, step).tanh())
        with diagnose(model) as report:
            ckpt(model, torch.rand(6, 6).requires_grad_()).sum().backward()
        assert report.gradients_right is right
        assert ("Train with use_reentrant=False" in report.verdict) is (right is None)


# State of other kinds, and modules in other places.


@dataclass(frozen=True)
class Seen:
    steps: float


REPLACED = {  # by what is equal, or by something else; none can be written to
    "a sparse tensor": lambda step: torch.eye(3).to_sparse() * step,
    "a sparse tensor in rows": lambda step: (torch.eye(3) * step).to_sparse_csr(),
    "a decimal number": lambda step: Decimal(step),
    "a fraction": lambda step: Fraction(step, 7),
    "a frozen dataclass": lambda step: Seen(step),
    "a partial function": lambda step: functools.partial(torch.mul, step),
}


class Replaces(nn.Module):
    def __init__(self, make, grows):
        super().__init__()
        self.make, self.steps, self.value = make, count(1) if grows else repeat(1), make(0)

    def forward(self, x):
        self.value = self.make(next(self.steps))
        return x.tanh()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("make", REPLACED.values(), ids=REPLACED)
def test_a_value_that_is_replaced_has_moved_if_it_is_another_one(make, grows):
    model = Replaces(make, grows)
    with diagnose(model) as report:
        non_reentrant(model, torch.rand(3, 3, requires_grad=True)).sum().backward()
    assert report.gradients_right is True
    assert ("value" in report) is grows


class Domains(nn.Module):
    """Has a norm in a dictionary, and one in an object."""

    def __init__(self):
        super().__init__()
        self.norms, self.other = {"a": nn.BatchNorm1d(3)}, SimpleNamespace(norm=nn.BatchNorm1d(3))

    def forward(self, x):
        return self.other.norm(self.norms["a"](x)).tanh()


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_norms_in_dictionaries_and_objects_are_found(ckpt):
    model = Domains()
    with pytest.warns(UserWarning, match=r"norms\['a'\]: in a plain list or dict"):
        update_once(nn.Sequential(model, nn.BatchNorm1d(3)))
    for engine, moved in ((ckpt, 2), (drop_in if ckpt is non_reentrant else drop_in_reentrant, 0)):
        model = Domains()
        with diagnose(model) as report:
            engine(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
        assert report.gradients_right is True
        assert len({each.module for each in report.values()}) == moved
        assert {(each.times, each.remedy) for each in report.values()} == ({(2, "preserve_state")} if moved else set())


def test_a_module_that_the_function_finds_in_a_global_is_compared_by_value():
    class Ema(nn.Module):
        def __init__(self, moves):
            super().__init__()
            self.moves, self.last = moves, None
            self.register_buffer("mean", torch.ones(3))

        def forward(self, x):
            self.last = x.detach().clone()  # the same again in the recomputation
            if self.moves:
                self.mean.data.mul_(2)
            return x.tanh()

    for moves in (True, False):
        GLOBAL[:] = [Ema(moves)]
        with diagnose(GLOBAL[0]) as report:
            non_reentrant(lambda x: GLOBAL[0](x), torch.rand(2, 3, requires_grad=True)).sum().backward()
        assert [*report] == ["mean"] * moves


GLOBAL = []


# The reentrant engine.


def keeps_a_loss(module, x):
    module.loss = x.square().mean()
    return x.tanh()


def returns_a_loss_inside(module, x):
    return x.tanh(), {"loss": x.square().mean()}


def keeps_a_weight(module, x):
    if not hasattr(module, "root"):
        module.root = module.weight.exp()
    return (x * module.root).tanh()


def keeps_what_it_uses(module, x):
    module.attention = x.softmax(-1)
    return module.attention.tanh()


KEPT = []


def keeps_in_a_list(module, x):
    KEPT[:] = [x.square().mean()]
    return x.tanh()


def logs_its_loss(module, x):
    module.log = SimpleNamespace(loss=x.square().mean())
    module.shown = module.log.loss.detach()
    return x.tanh()


def moves_an_average(module, x):
    with torch.no_grad():
        module.average = x.mean(0)
    return x.tanh()


def keeps_a_number(module, x):
    module.loss = x.detach().square().mean()
    return x.tanh()


class Keeps(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.run, self.weight = forward, nn.Parameter(torch.rand(3))

    def forward(self, x):
        return self.run(self, x * self.weight)


@pytest.mark.parametrize(
    ("forward", "right"),
    [
        (keeps_a_loss, None),
        (returns_a_loss_inside, None),
        (keeps_a_weight, None),
        (keeps_what_it_uses, None),
        (keeps_in_a_list, None),
        (logs_its_loss, None),
        (moves_an_average, True),
        (keeps_a_number, True),
    ],
)
def test_what_the_reentrant_engine_gives_no_graph_to_is_not_called_right(forward, right):
    model = Keeps(forward)
    with diagnose(model) as report:
        output = reentrant(model, torch.rand(2, 3, requires_grad=True))
        (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()
    assert report.gradients_right is right


def test_a_reentrant_checkpoint_without_gradients_loses_none():
    model = nn.Linear(3, 3)
    for grad in (True, False):
        with diagnose(model) as report:
            with torch.set_grad_enabled(grad), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says it of both
                reentrant(model, torch.rand(2, 3))
            reentrant(model, torch.rand(2, 3, requires_grad=True)).sum().backward()
        assert report.gradients_right is (None if grad else True)
        assert ("is in it gets none" in report.verdict) is grad


def rounded(tensor):
    return (tensor * 4).round() / 4


def test_hooks_of_others_on_saved_tensors_stay_on():
    gradients = []
    for watched, pack in ((True, rounded), (False, rounded), (False, lambda tensor: tensor)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, diagnose(model) if watched else nullcontext():
            reentrant(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
        gradients.append(model[0].weight.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])


def test_a_checkpoint_inside_a_reentrant_one_recomputes_as_often_as_it_does_unwatched():
    for watched in (True, False):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
        with diagnose(model) if watched else nullcontext():
            reentrant(
                lambda x, model=model: non_reentrant(model, x) * 2, torch.rand(4, 3, requires_grad=True)
            ).sum().backward()
        assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_sparse_tensors_in_a_step_do_no_harm(ckpt):
    model, matrix = nn.Linear(3, 3), torch.eye(4).to_sparse()
    with diagnose(model) as report:
        ckpt(lambda x: torch.sparse.mm(matrix, model(x)).sin(), torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert report.gradients_right in (True, None)


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_a_full_backward_hook_makes_nothing_wrong(ckpt):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    model[2].register_full_backward_hook(lambda *_: None)
    with diagnose(model) as report:
        ckpt(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert report.ok


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_memory_that_a_recurrent_layer_works_in_makes_nothing_wrong(kind):
    for size in range(8):  # parts of it are never written, so they are what was there before
        scraps = [torch.randn(size * 100 + 7) for _ in range(20)]
        del scraps
        model = kind(8, 8)
        with diagnose(model) as report:
            non_reentrant(model, torch.rand(3, 4, 8, requires_grad=True))[0].sum().backward()
        assert report.ok


class Biased(nn.Module):
    """Attention with a bias: with and without gradients, torch computes it by other kernels, with other strides."""

    def __init__(self):
        super().__init__()
        self.layer, self.bias = nn.Linear(8, 24), nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x):
        q, k, v = self.layer(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None])
        return y.transpose(1, 2).contiguous().flatten(2).sin()


def test_an_operation_that_gives_its_input_itself_at_times_is_no_other_wiring():
    model = Biased()
    with diagnose(model) as report:
        reentrant(model, torch.randn(2, 5, 8, requires_grad=True)).sum().backward()
    assert report.gradients_right is True


def test_a_parameter_may_be_given_to_a_reentrant_checkpoint_and_one_input_twice():
    layer, position, x = nn.Linear(3, 3), nn.Parameter(torch.rand(3)), torch.rand(2, 3, requires_grad=True)
    model = nn.ModuleDict({"layer": layer, "position": nn.ParameterList([position])})
    for inputs in ((x, position), (x, x)):
        with diagnose(model) as report:
            reentrant(lambda a, b: layer(a + b).sin() * b, *inputs).sum().backward()
        assert report.gradients_right is True


def test_inputs_that_change_places_are_another_wiring_though_they_are_equal():
    calls = count()
    model, inputs = nn.Linear(3, 3), [torch.ones(2, 3, requires_grad=True) for _ in range(2)]
    with diagnose(model) as report:
        reentrant(lambda a, b: model(a).sin() + (a if next(calls) else b), *inputs).sum().backward()
    assert report.gradients_right is False


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_one_value_that_is_expanded_does_no_harm(dtype, ckpt):
    table = nn.Embedding(10, 3)

    def compute(x):
        times = torch.full((), 5, dtype=dtype).expand(6)
        return (x + (table(times) if dtype == torch.int64 else times[:, None])).sin()

    with diagnose(table) as report:
        ckpt(compute, torch.rand(6, 3, requires_grad=True)).sum().backward()
    assert report.gradients_right is True


def test_what_autograd_refuses_is_refused_in_a_block_of_diagnose_too():
    model = nn.Linear(3, 3)
    for watched in (False, True):
        refused = pytest.raises(RuntimeError, match="has been modified by an inplace operation")
        with refused, diagnose(model) if watched else nullcontext():
            reentrant(lambda x: model(x).exp().add_(1), torch.rand(2, 3, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacrev, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]]
)
def test_transforms_of_a_layer_do_no_harm_in_a_reentrant_checkpoint(transform):
    model = nn.Linear(3, 1)
    with diagnose(model) as report:
        reentrant(
            lambda x: transform(lambda z: model(z).sin().sum())(x) * x, torch.rand(3, requires_grad=True)
        ).sum().backward()
    assert report.gradients_right is None
