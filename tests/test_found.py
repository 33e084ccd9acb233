"""What models of libraries, and two readers of the code, have shown: each with its twin that is not checkpointed."""

import copy
import functools
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from momentum_fix import diagnose, preserve_everywhere
from momentum_fix.state.compare import mark
from momentum_fix.state.fingerprint import difference, fingerprint
from scenes import WIDTH, Counts, LastDigits, Net, data, same_gradients
from twins import TORCHS_WARNINGS, by_context, drop_in_reentrant, non_reentrant, plainly, reentrant

pytestmark = TORCHS_WARNINGS
BOTH = (non_reentrant, reentrant)
KEEPING = {non_reentrant: by_context, reentrant: drop_in_reentrant}


def trained(block, ckpt):
    torch.manual_seed(0)
    net = Net(block())
    torch.manual_seed(1)
    with diagnose(net) as report:
        ckpt(net.body, net.stem(data()[0])).square().mean().backward()
    return report, net


# The reentrant engine: what the operations are given.


class Quantizes(Counts):
    def compute(self, x, n):
        return functional.gumbel_softmax(x, tau=2.0 * 0.5**n, hard=True)


class Adds(Counts):
    def compute(self, x, n):
        return x + (x if n == 1 else torch.ones(WIDTH))


class AddsAnAverage(Counts):
    def compute(self, x, n):
        with torch.no_grad():
            average = x * 0.9
        return x.sin() + (x if n == 1 else average)


class AddsAView(Counts):
    def compute(self, x, n):
        return x.sin() + (x if n == 1 else torch.ones_like(x))[:, :1]


class Concatenates(Counts):
    def compute(self, x, n):
        return torch.cat([x.sin(), x if n == 1 else torch.ones_like(x)], 1)[:, 2 : WIDTH + 2]


class DetachesItsBias(Counts):
    def compute(self, x, n):
        return x.sin() + (self.layer.bias if n == 1 else self.layer.bias.detach())


class GivenAConstant(Counts):
    """The function's input is replaced, and not what it has computed from that."""

    def forward(self, x):
        self.seen += 1
        return x + (x if self.seen == 1 else torch.ones(WIDTH))


def direct(block, ckpt):
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(4, WIDTH), block(), nn.Linear(WIDTH, WIDTH)])
    with diagnose(net) as report:
        net[2](ckpt(net[1], net[0](data()[0]))).sum().backward()
    return report, net


@pytest.mark.parametrize("run", [trained, direct])
@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize(
    "block", [Quantizes, Adds, AddsAnAverage, AddsAView, Concatenates, DetachesItsBias, GivenAConstant]
)
def test_what_a_recomputation_gives_an_operation_instead_is_told(block, ckpt, run):
    (report, net), (_, truth) = run(block, ckpt), run(block, plainly)
    assert (report.gradients_right is False) is not same_gradients(net, truth)
    kept, net = run(block, KEEPING[ckpt])
    assert same_gradients(net, truth)
    assert kept.gradients_right is not False


@pytest.mark.parametrize("ckpt", BOTH)
def test_a_function_that_is_made_anew_is_the_same(ckpt):
    net = Net(nn.Linear(WIDTH, WIDTH))

    def function(x):
        distance = lambda one, other: (one - other).norm(dim=1) + net.stem.bias.detach().sum() * 0  # noqa: E731
        y = net.body(x)
        return functional.triplet_margin_with_distance_loss(y, y.flip(0), y.roll(1, 0), distance_function=distance)

    with diagnose(net) as report:
        ckpt(function, net.stem(data()[0])).backward()
    assert report.ok


def test_a_function_that_knows_itself_is_the_same_too():
    def function(x):
        def distance(one, other, n=3):
            return (one - other).norm(dim=1) if n == 0 else distance(one, other, n - 1)

        x = x.sin()
        return functional.triplet_margin_with_distance_loss(x, x.flip(0), x.roll(1, 0), distance_function=distance)

    with diagnose(nn.Linear(1, 1)) as report:
        reentrant(function, torch.rand(4, 3, requires_grad=True)).backward()
    assert report.gradients_right is True


# Differences that are small beside the values.


def test_no_difference_is_none_that_is_too_small_to_be_told():
    one, other = torch.full((8,), 900.0), torch.full((8,), 900.0)
    one[0], other[0] = 1e-20, 2e-20
    assert 0 < difference(fingerprint(one).tolist(), fingerprint(other).tolist()) < 1e-9
    assert difference(fingerprint(one).tolist(), fingerprint(one.clone()).tolist()) is None


class Floors(Counts):
    def compute(self, x, n):
        beside = torch.full((len(x), 1), 900.0)
        return torch.cat([beside, x[:, 1:] * 1e-20 * n], 1).abs().log() * 0.01 + x.sin()


@pytest.mark.parametrize("ckpt", BOTH)
def test_a_difference_too_small_to_be_told_is_not_called_right_where_state_has_changed(ckpt):
    report, _ = trained(Floors, ckpt)
    assert report.gradients_right is not True
    assert trained(Floors, KEEPING[ckpt])[0].ok


# State.


class SetsAFlagFirst(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.layer, self.ready, self.factor = nn.Linear(WIDTH, WIDTH), False, factor

    def block(self, x):
        scale = 1.0 if self.ready else self.factor
        self.ready = True
        return self.layer(x * scale).exp()


@pytest.mark.parametrize("ckpt", BOTH)
def test_state_that_a_method_moves_before_it_calls_a_module_is_named(ckpt):
    model = SetsAFlagFirst()
    with diagnose(model) as report:
        ckpt(model.block, torch.rand(6, WIDTH, requires_grad=True)).sum().backward()
    assert report.gradients_right is False
    assert [(each.moved, each.remedy) for each in report.differences] == [(("ready",), "preserve_state")]
    model = SetsAFlagFirst()
    with preserve_everywhere(), diagnose(model) as report:
        ckpt(model.block, torch.rand(6, WIDTH, requires_grad=True)).sum().backward()
    assert report.ok


def test_neither_is_a_difference_that_comes_of_it_taken_for_rounding():
    torch.manual_seed(0)
    model, x = SetsAFlagFirst(1.006).float(), torch.rand(6, WIDTH, dtype=torch.float32, requires_grad=True)
    with diagnose(model) as report, torch.autocast("cpu", torch.bfloat16):
        non_reentrant(model.block, x).float().sum().backward()
    assert report.gradients_right is None
    assert "That may be rounding, or the state that had changed" in report.verdict


class Freezes(nn.Module):
    """Freezes a part, and trains it again in its last line, which a recomputation that stops early does not reach."""

    def __init__(self):
        super().__init__()
        self.layer, self.judge = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.judge.requires_grad_(False)
        y = self.judge(self.layer(x).sin()).sin()
        self.judge.requires_grad_(True)
        return y


def test_whether_a_parameter_is_trained_is_state():
    torch.manual_seed(0)
    for ckpt, frozen in ((non_reentrant, True), (by_context, False)):
        model = Freezes()
        with diagnose(model) as report:
            ckpt(model, torch.rand(6, WIDTH, requires_grad=True)).sum().backward()
        assert model.judge.weight.requires_grad is not frozen
        assert report.ok is not frozen
        assert set(report) == ({"judge.weight", "judge.bias"} if frozen else set())


class Unfreezes(Counts):
    def __init__(self):
        super().__init__()
        self.layer.requires_grad_(False)

    def forward(self, x):
        self.layer.requires_grad_(True)
        return super().forward(x)


@pytest.mark.parametrize("ckpt", [*BOTH, by_context, drop_in_reentrant])
def test_a_weight_that_the_function_begins_to_train_gets_its_gradient(ckpt):
    (_, net), (_, truth) = trained(Unfreezes, ckpt), trained(Unfreezes, plainly)
    assert net.body[1].layer.weight.grad is not None
    assert same_gradients(net, truth)


class Lengths(Counts):
    """What follows state is no tensor that ctc_loss saves, but how far it reads one."""

    def compute(self, x, n):
        steps = x.log_softmax(-1).unsqueeze(0).expand(6, -1, -1)
        lengths = torch.full((len(x),), 5 if n == 1 else 3)
        targets = torch.ones(len(x), 2, dtype=torch.long)
        return functional.ctc_loss(steps, targets, lengths, torch.full((len(x),), 2))


@pytest.mark.parametrize("ckpt", BOTH)
def test_the_lengths_of_ctc_matter(ckpt):
    def run(ckpt):
        torch.manual_seed(0)
        block, x = Lengths(), torch.randn(4, WIDTH, requires_grad=True)
        with diagnose(block) as report:
            ckpt(block, x).backward()
        return report, block

    (report, block), (_, truth) = run(ckpt), run(plainly)
    assert not same_gradients(block, truth)
    assert report.gradients_right is False


class KeepsAFeature(Net):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH))
        self.body[0].register_forward_hook(lambda module, args, output: setattr(self, "feature", output))


def test_what_a_hook_keeps_on_the_model_has_not_moved():
    net = KeepsAFeature()
    with diagnose(net) as report:
        (non_reentrant(net.body, net.stem(data()[0])).sum() + net.feature.sum()).backward()
    assert report.ok


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("normalize", [weight_norm, nn.utils.weight_norm])
def test_weak_references_to_weights_are_no_state_of_their_own(normalize):
    model = normalize(nn.LSTM(4, 5, batch_first=True), "weight_hh_l0")
    with diagnose(model) as report:
        non_reentrant(model, torch.rand(2, 3, 4, requires_grad=True))[0].sum().backward()
    assert report.ok


class Reads:
    """What a proxy stands for."""


@dataclass(frozen=True)
class Partly:
    one: int
    two: int


def test_marks_of_what_is_seldom_an_attribute():
    owner = Reads()
    partly = object.__new__(Partly)
    object.__setattr__(partly, "one", 1)
    same = [
        slice(1, 6),
        range(1, 6),
        weakref.proxy(owner),
        partly,
        torch.rand(2, dtype=torch.float32).to_mkldnn(),
        weakref.ref(owner),
    ]
    for value in same:
        assert mark(value) == mark(value)
    del owner
    mark(same[2])
    other = [slice(2, 6), range(2, 6), None, Partly(1, 2), torch.rand(2, dtype=torch.float32).to_mkldnn(), None]
    for one, two in zip(same, other, strict=True):
        assert two is None or mark(one) != mark(two)
    assert mark(slice(1, 6)) == mark(slice(1, 6))
    assert mark(range(1, 6)) == mark(range(1, 6))
    layer = nn.Linear(2, 2)
    trains = mark(layer.weight), mark(layer.weight, by_value=False)
    layer.requires_grad_(False)
    assert mark(layer.weight) != trains[0]
    assert mark(layer.weight, by_value=False) != trains[1]


class Refers(nn.Module):
    """Has a proxy, which may stand for nothing that is there; may put others there."""

    def __init__(self, owners=()):
        super().__init__()
        self.layer, self.owners = nn.Linear(WIDTH, WIDTH), owners
        owner = Reads()
        self.owner = weakref.proxy(owner)

    def forward(self, x):
        if self.owners:
            owner = self.owners.pop()
            self.owner = weakref.proxy(owner)
        return self.layer(x).tanh()


@pytest.mark.parametrize("ckpt", [non_reentrant, reentrant, by_context, drop_in_reentrant])
def test_a_proxy_to_nothing_that_is_there_is_no_error(ckpt):
    block = Refers()
    with diagnose(block) as report:
        ckpt(block, torch.rand(4, WIDTH, requires_grad=True)).sum().backward()
    assert report.ok


def test_another_proxy_is_another_state():
    owners = [Reads(), Reads()]
    block = Refers(owners.copy())
    with diagnose(block) as report:
        non_reentrant(block, torch.rand(4, WIDTH, requires_grad=True)).sum().backward()
    assert "owner" in report


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.filterwarnings("ignore:.*TypedStorage")
def test_quantized_tensors_have_values():
    def quantized(value):
        return torch.quantize_per_tensor(torch.full((3,), value, dtype=torch.float32), 0.1, 0, torch.qint8)

    assert mark(quantized(1.0)) == mark(quantized(1.0))
    assert mark(quantized(1.0)) != mark(quantized(2.0))


class MovesInGradients(Counts):
    """Moves a bank if gradients are on, as those do that are for training alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(WIDTH))

    def forward(self, x):
        y = self.layer(x).sin() + self.bank.clone()
        if y.requires_grad:
            self.bank += y.detach().mean(0)
        return y


def test_what_only_moves_with_gradients_moves_once_with_the_reentrant_engine():
    (report, net), (_, truth) = trained(MovesInGradients, reentrant), trained(MovesInGradients, plainly)
    assert same_gradients(net, truth)
    assert torch.equal(net.body[1].bank, truth.body[1].bank)
    assert report.ok
    bank = report["body.1.bank"]
    assert (bank.times, bank.remedy) == (1, "")
    assert bank.note.startswith("moves in recomputations only")
    report, net = trained(MovesInGradients, non_reentrant)
    assert not torch.equal(net.body[1].bank, truth.body[1].bank)
    assert (report["body.1.bank"].times, report["body.1.bank"].remedy) == (2, "preserve_state")


class AsksForGradients(nn.Module):
    def forward(self, x):
        return x.sin().sin() if torch.is_grad_enabled() else x.sin()


def test_code_that_asks_whether_gradients_are_on_is_told_of_the_other_engine():
    report, _ = trained(AsksForGradients, reentrant)
    assert report.gradients_right is False
    assert "use_reentrant=False, if it asks whether gradients are on" in report.differences[0].remedy
    assert trained(AsksForGradients, non_reentrant)[0].gradients_right is True


class HooksItsNorm(nn.BatchNorm1d):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("scale", torch.ones(()))
        self.register_forward_hook(lambda norm, args, output: norm.scale.mul_(1.5) and None)


def test_a_buffer_of_a_norm_that_is_no_statistic_needs_more_than_update_once():
    model = nn.Sequential(nn.Linear(3, 3), HooksItsNorm(3), nn.Tanh())
    with diagnose(model) as report:
        non_reentrant(model, torch.rand(6, 3)).sum().backward()
    assert report["1.scale"].remedy == "preserve_state"
    assert report["1.running_mean"].remedy == "update_once"


@pytest.mark.parametrize("keep", [by_context, drop_in_reentrant])
def test_a_layer_that_is_registered_twice_has_its_own_buffers_afterwards(keep):
    def run(ckpt):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(WIDTH)
        net = Net(nn.Sequential(norm, nn.Tanh(), norm))
        own = [*norm.buffers()]
        for x in data():
            ckpt(net.body[1], net.stem(x)).square().mean().backward()
        assert all(each is one for each, one in zip(norm.buffers(), own, strict=True))
        return norm

    for one, other in zip(run(keep).buffers(), run(plainly).buffers(), strict=True):
        assert torch.equal(one, other)


class Codebook(nn.Parameter):
    pass


class MovesACodebook(Counts):
    def __init__(self):
        super().__init__()
        self.codes = Codebook(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x):
        self.codes.data.mul_(0.5)
        return self.layer(x).sin()


def test_a_parameter_of_a_users_own_class_is_state():
    report, _ = trained(MovesACodebook, non_reentrant)
    assert "body.1.codes" in report


class Outer(nn.Module):
    """Reaches a layer through an object that nobody looks into."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.__dict__["owner"] = nn.Linear(WIDTH, WIDTH), iter([layer, layer])

    def forward(self, x):
        layer = next(self.owner)
        with torch.no_grad():
            layer.weight.mul_(0.5)
        layer.in_features += 1
        return self.layer(x).sin()


@pytest.mark.filterwarnings("ignore")
def test_layers_of_torchs_that_are_not_in_the_checkpoint_are_looked_at():
    layer = nn.Linear(3, 3)
    net = nn.ModuleList([layer, Outer(layer)])
    with diagnose(net) as report:
        non_reentrant(net[1], torch.rand(4, WIDTH, requires_grad=True)).sum().backward()
    assert {"0.weight", "0.in_features"} <= set(report)


class StepsAfterwards(Net):
    """Moves a number of its own after the checkpoint, and has a hook that is a method."""

    def __init__(self):
        super().__init__(LastDigits())
        self.steps, self.features = 0, []
        self.body[0].register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.features = [float(output.detach().sum().round())]

    def forward(self, x, ckpt):
        y = ckpt(self.body, self.stem(x))
        self.steps += 1
        return y


def test_what_the_owner_of_a_hook_moves_outside_of_the_checkpoint_makes_rounding_no_less_rounding():
    net = StepsAfterwards()
    with diagnose(net) as report:
        net(data()[0], non_reentrant).sum().backward()
    assert report.rounding > 0
    assert report.gradients_right is True


def test_a_limit_that_is_set_between_forward_and_backward_is_no_error():
    embedding = nn.Embedding(4, WIDTH)
    y = by_context(embedding, torch.tensor([1, 2]))
    embedding.max_norm = 1.0
    y.sum().backward()
    assert embedding.weight.grad is not None
    norms = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    y = by_context(norms, torch.rand(3, WIDTH))
    norms[0].register_buffer("extra", torch.ones(1))
    y.sum().backward()
    assert "extra" in norms[0]._buffers


class WithoutWeights(nn.MultiheadAttention):
    def forward(self, *inputs):
        return super().forward(*inputs, need_weights=False)[0]


@pytest.mark.parametrize("times", [1, 3])
def test_a_tensor_that_is_given_twice_is_two_tensors_in_a_reentrant_recomputation(times):
    torch.manual_seed(0)
    attention = WithoutWeights(4, 2, batch_first=True)
    x = torch.rand(3, 2, 4, requires_grad=True)
    run = attention if times == 3 else lambda x: attention(x, x, x)
    truth = torch.autograd.grad(run(*[x] * times).sum(), attention.in_proj_weight)[0]
    with diagnose(attention) as report:
        reentrant(run, *[x] * times).sum().backward()
    assert torch.allclose(attention.in_proj_weight.grad, truth)
    assert report.gradients_right is (True if times == 1 else None)
    assert ("Train with use_reentrant=False" in report.verdict) is (times == 3)


class Called:
    """Can be called, and has no name; it says that it belongs to a module."""

    def __init__(self, module):
        self.__self__ = module

    def __call__(self, x):
        return self.__self__(x).sin()


@pytest.mark.parametrize("wrap", [lambda each: each, functools.partial])
def test_what_can_be_called_needs_no_name(wrap):
    net = Net(nn.Linear(WIDTH, WIDTH))
    with diagnose(net) as report:
        non_reentrant(wrap(Called(net.body)), net.stem(data()[0])).sum().backward()
    assert report.gradients_right is True


# Later.


class Late(Counts):
    def compute(self, x, n):
        return (x if n < 3 else 2 * x).sin()


def given(net, ckpt):
    xs = [x.requires_grad_() for x in data()]
    return [torch.autograd.grad(ckpt(net.body, net.stem(x)).square().mean(), x)[0] for x in xs]


def to_inputs(net, ckpt):
    xs = [x.requires_grad_() for x in data()]
    for x in xs:
        ckpt(net.body, net.stem(x)).square().mean().backward(inputs=[x])
    return [x.grad for x in xs]


def frozen(net, ckpt):
    net.requires_grad_(False)
    xs = [x.requires_grad_() for x in data()]
    for x in xs:
        ckpt(net.body, net.stem(x)).square().mean().backward()
    return [x.grad for x in xs]


def by_another(net, ckpt):
    """The second loss is that of a module that was not there before, and reads what the block has counted."""

    class Criterion(nn.Module):
        def forward(self, y):
            return y.square().mean() * net.body[1].seen

    x, y = (net.stem(each) for each in data())
    ckpt(net.body, x).square().mean().backward()
    Criterion()(y).backward()
    return [p.grad for p in net.stem.parameters()]


@pytest.mark.parametrize("step", [given, to_inputs, frozen, by_another])
def test_the_next_forward_pass_is_noticed_in_whatever_way_its_gradients_are_asked_for(step):
    def run(ckpt):
        torch.manual_seed(0)
        net = Net(Late())
        with diagnose(net) as report:
            return report, step(net, ckpt)

    (report, gradients), (_, truth) = run(non_reentrant), run(plainly)
    assert not all(map(torch.allclose, gradients, truth))
    assert report.gradients_right is None


class Turns(Counts):
    def compute(self, x, n):
        if hasattr(self, "flag"):
            del self.flag
        else:
            self.flag = 1
        return x.sin()


def test_an_attribute_that_is_gone_has_moved_too():
    net = Net(Turns())
    with diagnose(net) as report:
        for x in data():
            (non_reentrant(net.body, net.stem(x)) * (2 if hasattr(net.body[1], "flag") else 1)).sum().backward()
    assert report.gradients_right is None


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_the_model_is_no_training():
    net = Net(nn.BatchNorm1d(WIDTH))
    with diagnose(net) as report:
        non_reentrant(net.body, net.stem(data()[0])).sum().backward()
        torch.jit.trace(net.body, torch.rand(6, WIDTH))
    assert report.gradients_right is True


# Names.


class Layer(nn.Module):
    """Checkpoints its own call, as Hugging Face's layers do."""

    def __init__(self):
        super().__init__()
        self.layer = spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.layer(x).tanh()

    def __call__(self, x, **kwargs):
        return checkpoint(functools.partial(super().__call__, **kwargs), x, use_reentrant=False)


def plain():
    return nn.Sequential(spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


def in_a_closure(module, x):
    return checkpoint((lambda inner: lambda *inputs: inner(*inputs))(module), x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:.*CheckpointImpl")
@pytest.mark.parametrize(
    ("make", "run", "names"),
    [
        (Layer, lambda blocks, x: blocks(x), {"blocks.0", "blocks.1"}),
        (
            lambda: checkpoint_wrapper(plain(), CheckpointImpl.REENTRANT),
            lambda blocks, x: blocks[1](input=blocks[0](input=x)),
            {"my_function (blocks.0)", "my_function (blocks.1)"},
        ),
        (
            plain,
            lambda blocks, x: checkpoint_sequential(blocks, 2, x, use_reentrant=False),
            {"forward (blocks.1, blocks.0)"},
        ),
        (plain, in_a_closure, {"<lambda> (blocks)"}),
    ],
    ids=["a partial call", "a wrapper", "a sequence", "a closure"],
)
def test_a_checkpoint_is_called_what_its_modules_are(make, run, names):
    model = nn.ModuleDict({"blocks": nn.Sequential(make(), make())})
    with diagnose(model) as report:
        run(model["blocks"], torch.rand(6, WIDTH, requires_grad=True)).sum().backward()
    assert {each.checkpoint for each in report.differences} == names


def test_modules_outside_of_the_model_have_names_of_their_own():
    def make():
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())

    generator, one, two = make(), make(), make()
    with diagnose(generator) as report:
        x = non_reentrant(generator, torch.rand(8, 6))
        (non_reentrant(one, x).sum() + non_reentrant(two, x).square().sum()).backward()
    assert {each.module for each in report.values()} == {"1", "Sequential.1", "Sequential 2.1"}
    notes = {each.module: each.note for each in report.values()}
    assert notes["1"] == ""
    assert (
        notes["Sequential.1"]
        == notes["Sequential 2.1"]
        == "not in the model that was given: call update_once on it too"
    )


# Sharded and parallel modules, of one rank.


def sharded(net, mesh):
    fully_shard(net[0], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def parallel(net, mesh):
    return parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("spread", [sharded, parallel])
def test_parameters_that_torch_spreads_over_ranks_are_no_state(spread, ckpt, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        net = spread(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), init_device_mesh("cpu", (1,)))
        x = torch.rand(4, 8, requires_grad=True)
        net(x).sum().backward()
        truth = [copy.deepcopy(p.grad.full_tensor()) for p in net.parameters()]
        net.zero_grad()
        with diagnose(net) as report:
            ckpt(net, x).sum().backward()
        assert all(torch.equal(p.grad.full_tensor(), q) for p, q in zip(net.parameters(), truth, strict=True))
    finally:
        dist.destroy_process_group()
    if ckpt is reentrant:
        assert report.gradients_right is None
    else:
        assert report.gradients_right is not False  # before torch 2.13, FSDP may have freed a weight before it is read
    assert not report
