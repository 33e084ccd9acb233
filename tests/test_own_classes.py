"""Norm layers that are not torch's, and odd ones that are: update_once is exact, calibrate right or it says so."""

import copy
import functools
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from momentum_fix import applied, calibrate, correct, restore, update_once
from momentum_fix.norms.layers import NORMS, norm_of, only_writes
from momentum_fix.norms.notes import Note
from recipes import ENGINES, Net, block, data, norms, one
from twins import ROUNDING, counters, deviation, non_reentrant, plainly, reentrant, same_path, statistics, three, train

pytestmark = pytest.mark.filterwarnings("ignore:.*the class has a forward of its own")


class TakesLists(nn.BatchNorm2d):
    """Calls itself for each element of a list."""

    def forward(self, x):
        return [self.forward(each) for each in x] if isinstance(x, list) else super().forward(x)


class TakesVideos(nn.BatchNorm2d):
    """Calls itself with another shape."""

    def forward(self, x):
        if x.dim() == 5:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.forward(x[None])[0]


class KeepsABoundMethod(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.normalize = super().forward

    def forward(self, x):
        return self.normalize(x)


class Squares(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_square", torch.ones(channels))

    def forward(self, x, momentum):
        self.running_square.lerp_(x.detach().square().mean((0, 2, 3)), momentum)


class KeepsStatisticsInAChild(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.child = Squares(channels)

    def forward(self, x):
        if self.training:
            self.child(x, self.momentum)
        return super().forward(x)


class Growing(nn.Module):
    """Gets the shape of its statistics at the first batch."""

    dtype = torch.float64

    def __init__(self, channels):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_mean", torch.zeros(1, dtype=self.dtype))

    def forward(self, x):
        mean = x.mean((0, 2, 3)).to(self.dtype)
        if self.training:
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean.detach()
        return x - mean[:, None, None].real


class Complex(Growing):
    dtype = torch.complex128


class CountsSamples(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("running_count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.running_count += len(x)
        return super().forward(x)


OWN = [TakesVideos, KeepsABoundMethod, KeepsStatisticsInAChild, Growing, Complex, CountsSamples]


def is_exact(net, truth):
    mine, true = statistics(net), statistics(truth)
    same = all(torch.equal(mine[name], true[name]) for name in true)
    return same and counters(net) == counters(truth) and same_path(net, truth)


def in_a_compiled_block(net, x, ckpt):
    run = net if ckpt is plainly else torch.compile(net, backend="aot_eager")
    ckpt(run, x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("norm", OWN)
@pytest.mark.parametrize("step", [one, in_a_compiled_block])
def test_update_once_is_exact_for_it(norm, ckpt, step):
    net = Net(norm)
    truth, uncovered = train(copy.deepcopy(net), step, data(), plainly), train(copy.deepcopy(net), step, data(), ckpt)
    update_once(net)
    assert is_exact(train(net, step, data(), ckpt), truth)
    stopped_before_it_assigns = step is in_a_compiled_block and issubclass(norm, Growing) and ckpt is non_reentrant
    assert is_exact(uncovered, truth) is stopped_before_it_assigns


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("norm", OWN)
def test_calibrate_is_right_for_it(norm, ckpt):
    net = Net(norm)
    truth, uncorrected = train(copy.deepcopy(net), one, data(), plainly), train(copy.deepcopy(net), one, data(), ckpt)
    with calibrate(net) as report:
        train(net, one, data()[:1], ckpt)
    train(net, one, data()[1:], ckpt)
    assert set(report.values()) == {2}
    assert {row.note for row in report.rows} == {Note.MAY_READ.text}
    means = {name: mean for name, mean in statistics(truth).items() if not name.endswith("count")}
    for model, right in ((net, True), (uncorrected, False)):
        close = (torch.allclose(statistics(model)[name], mean, rtol=ROUNDING, atol=0) for name, mean in means.items())
        assert all(close) is right


def of_a_list(net, x, ckpt):
    ckpt(lambda y: sum(net.a[1]([net.a[0](y), net.a[0](2 * y)])).tanh(), x.requires_grad_()).sum().backward()


def test_a_layer_that_runs_once_for_each_element_of_a_list_takes_turns_with_itself():
    net = Net(TakesLists)
    truth = train(copy.deepcopy(net), of_a_list, data(), plainly)
    other = copy.deepcopy(net)
    with pytest.warns(UserWarning, match=r"only the decay is right.*a\.1\."), calibrate(net) as report:
        train(net, of_a_list, data(1), non_reentrant)
    assert report["a.1"] == 2
    update_once(other)
    assert is_exact(train(other, of_a_list, data(), non_reentrant), truth)


def sharing_buffers():
    net = Net()
    net.b[1].running_mean, net.b[1].running_var = net.a[1].running_mean, net.a[1].running_var
    return net


def test_layers_that_share_buffers_take_turns_at_them():
    nets = [sharing_buffers() for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    truth, calibrated, once = nets
    train(truth, one, data(), plainly)
    with (
        pytest.warns(UserWarning, match=r"only the decay is right.*Layers: a\.1, b\.1\."),
        calibrate(calibrated) as report,
    ):
        train(calibrated, one, data(1), non_reentrant)
    assert report.passes == {"a.1": 2, "b.1": 2, "c.1": 2}
    update_once(once)
    assert is_exact(train(once, one, data(), non_reentrant), truth)


# update_once says where it cannot help, and changes nothing where it cannot be put on.


class ReadsItsStatistics(nn.BatchNorm2d):
    """As Batch Renormalization does."""

    def forward(self, x):
        return super().forward(x) * self.running_var.sqrt()[:, None, None].clone()


@pytest.mark.filterwarnings("default:.*the class has a forward of its own")
def test_a_class_with_a_forward_of_its_own_is_named_since_its_output_may_read_the_statistics():
    net = Net(ReadsItsStatistics)
    truth = train(copy.deepcopy(net), one, data(1), plainly)
    with pytest.warns(UserWarning, match=r"^a\.1, b\.1, c\.1: .* forward of its own.* gradients are wrong") as caught:
        update_once(net)
    assert caught[0].filename == __file__
    train(net, one, data(1), non_reentrant)
    assert deviation(net, truth) == 0
    assert not same_path(net, truth)


def with_activation(module, name):
    """Give a class like timm's, with a forward of this name."""

    def forward(self, x):
        return nn.BatchNorm2d.forward(self, x).relu()

    forward.__module__, forward.__qualname__ = module, name
    return type("BatchNormAct2d", (nn.BatchNorm2d,), {"forward": forward})


@pytest.mark.parametrize(
    ("module", "name", "known"),
    [
        ("timm.layers.norm_act", "BatchNormAct2d.forward", True),
        ("timm.layers.norm_act", "SyncBatchNormAct.forward", True),
        ("timm.layers.norm_act", "BatchNormAct3d.forward", False),
        ("mine", "BatchNormAct2d.forward", False),
    ],
)
def test_timms_norms_with_an_activation_are_known_not_to_read_their_statistics(module, name, known):
    net = Net(with_activation(module, name))
    truth = train(copy.deepcopy(net), one, data(3), plainly)
    with calibrate(calibrated := copy.deepcopy(net)) as report:
        train(calibrated, one, data(1), non_reentrant)
    assert {row.note for row in report.rows} == {"" if known else Note.MAY_READ.text}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update_once(net)
    assert len(caught) == (0 if known else 1)
    train(net, one, data(3), non_reentrant)
    assert same_path(net, truth)
    assert deviation(net, truth) == 0


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: str(norm.defined_in))
def test_what_is_said_of_a_registered_class_is_so(norm):
    cls = norm.defined_in
    if isinstance(cls, str) or cls is nn.SyncBatchNorm:
        pytest.skip("needs timm, or a GPU")
    known = getattr(nn, cls.__name__.replace("1d", "2d"))
    assert norm_of(known(3)) is norm
    layer = known(3, track_running_stats=True).double()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = data(1)[0]
    y = layer(x)
    assert {name for name in before if not torch.equal(layer._buffers[name], before[name])} == {
        *norm.statistics,
        *(["num_batches_tracked"] if cls is nn.BatchNorm1d else []),
    }
    for name in norm.statistics:
        layer._buffers[name].fill_(7.0)
    assert torch.equal(layer(x), y) is not norm.reads_them


def test_every_norm_of_torchs_that_tracks_statistics_is_registered():
    classes = [cls for cls in vars(nn).values() if isinstance(cls, type) and tracks_by_default(cls)]
    assert {nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d} <= set(classes)
    assert all(only_writes(cls(*([] if "Lazy" in cls.__name__ else [3]))) for cls in classes)
    assert not only_writes(ReadsItsStatistics(3))


def tracks_by_default(cls):
    return "track_running_stats" in inspect.signature(cls).parameters


def tracking_in_the_recomputation_only(net):
    """Do what fairscale's checkpoint_wrapper does."""
    for layer in norms(net):
        layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "track_running_stats", torch.is_grad_enabled()))
        layer.register_forward_hook(lambda layer, *_: setattr(layer, "track_running_stats", True), always_call=True)
    return net


RECOMPUTATION_ONLY = (
    r"layer '0\.1' does not track statistics in the forward pass, but does in the backward.*restore\(model\)"
)


def test_layers_that_are_updated_in_the_recomputation_only_stay_so_and_a_warning_says_it():
    net = tracking_in_the_recomputation_only(nn.Sequential(block(), nn.Tanh()))
    truth = train(copy.deepcopy(net), one, data(1), plainly)
    update_once(net)
    with pytest.warns(UserWarning, match=RECOMPUTATION_ONLY):
        train(net, one, data(1), ENGINES["reentrant"])
    assert deviation(net, truth) == 0


def test_layers_that_come_to_be_updated_in_the_recomputation_only_are_noticed_one_step_later():
    net = nn.Sequential(block(), nn.Tanh())
    update_once(net)
    train(net, one, data(1), ENGINES["reentrant"])
    tracking_in_the_recomputation_only(net)
    with pytest.warns(UserWarning, match=RECOMPUTATION_ONLY):
        train(net, one, data(2), ENGINES["reentrant"])


class Scaled(nn.BatchNorm2d):
    def forward(self, x, *, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize(
    "where", [tracking_in_the_recomputation_only, lambda net: net], ids=["recomputation only", "both"]
)
def test_a_keyword_of_a_forward_reaches_the_layer_in_the_recomputation(where):
    def step(net, x, ckpt):
        ckpt(lambda y: net[0](y, scale=3.0).tanh(), x.requires_grad_()).square().sum().backward()

    net = where(nn.Sequential(Scaled(3)))
    truth = train(copy.deepcopy(net), step, data(1), plainly)
    update_once(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not track statistics in the forward pass")
        train(net, step, data(1), reentrant)
    assert deviation(net, truth) == 0
    assert same_path(net, truth)


def updating_once(net, step, data, ckpt):
    update_once(net)
    return train(net, step, data, ckpt)


def untracked(net, *, track):
    for layer in norms(net):
        layer.track_running_stats = track


def test_extra_forward_passes_that_do_not_track_do_not_count():
    """As in virtual adversarial training. The other engine refuses a recomputation that saves other tensors."""

    def step(net, x, ckpt):
        x = x.clone().requires_grad_()
        loss = ckpt(net, x).square().mean()
        untracked(net, track=False)
        ckpt(net, x).square().mean().backward()
        loss = loss + ckpt(net, x * 2).square().mean()
        untracked(net, track=True)
        loss.backward()

    truth, wrong, net = three(nn.Sequential(block(), nn.Tanh()), step, data(3), reentrant, updating_once)
    assert deviation(net, truth) == 0 < deviation(wrong, truth)


def test_a_graph_that_is_kept_over_untracked_passes_is_recomputed_once_more_without_moving_anything():
    """As in the fast gradient sign method: the gradient of the input first, then a pass on what that gave."""

    def step(net, x, ckpt):
        x = x.clone().requires_grad_()
        loss = ckpt(net, x).square().mean()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        untracked(net, track=False)
        ckpt(net, x + gradient.sign()).square().mean().backward()
        untracked(net, track=True)
        loss.backward()

    truth, wrong, net = three(nn.Sequential(block(), nn.Tanh()), step, data(3), non_reentrant, updating_once)
    assert deviation(net, truth) == 0 < deviation(wrong, truth)


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES.keys())
def test_a_layer_that_loses_its_statistics_after_update_once_goes_on_training(ckpt):
    net = nn.Sequential(block(), nn.Tanh())
    update_once(net)
    layer = net[0][1]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        delattr(layer, name)
        setattr(layer, name, None)
    layer.track_running_stats = False
    truth = train(copy.deepcopy(restore(copy.deepcopy(net))), one, data(2), plainly)
    assert same_path(train(net, one, data(2), ckpt), truth)


class ComputesItsMomentum(nn.BatchNorm2d):
    """Whose momentum is a new number at each reading."""

    @property
    def momentum(self):
        return float(str(self._momentum)) if self._momentum is not None else None

    @momentum.setter
    def momentum(self, value):
        self._momentum = value


@pytest.mark.parametrize("covered", [update_once, calibrate])
def test_a_momentum_that_is_computed_is_known_by_its_value(covered):
    net = nn.Sequential(block(ComputesItsMomentum), nn.Tanh())
    truth = train(copy.deepcopy(net), one, data(1), plainly)
    with covered(net) as found:
        train(net, one, data(1), non_reentrant)
    assert deviation(net, truth) == 0
    if covered is calibrate:
        assert found.passes == {"0.1": 2}
        assert found.rows[0].note == ""


def test_a_momentum_that_is_corrected_after_update_once_is_warned_of_at_the_first_pass():
    net = nn.Sequential(block(), nn.Tanh())
    update_once(net)
    net[0][1].momentum = 1 - 0.9**0.5  # as pytorch-pfn-extras does on the first call of its checkpoint
    with pytest.warns(UserWarning, match=r"layer '0\.1' got a corrected momentum .*0\.0513167 for 0\.1") as caught:
        train(net, one, data(3), non_reentrant)
    assert len(caught) == 1


class Sealed(nn.BatchNorm2d):
    def __setattr__(self, name, value):
        if name == "forward":
            raise AttributeError("sealed")
        super().__setattr__(name, value)


@pytest.mark.parametrize("change", [update_once, lambda model: calibrate(model).__enter__()])
def test_a_class_that_refuses_the_attribute_leaves_the_model_as_it_was(change):
    model = correct(nn.ModuleList([nn.BatchNorm2d(3, momentum=0.2), nn.BatchNorm2d(3), Sealed(3)]), {"0": 2})
    if change is update_once:
        model[0].momentum = 0.3
    before = [layer.momentum for layer in model]
    with pytest.raises(AttributeError, match="sealed"):
        change(model)
    assert not any("forward" in vars(layer) for layer in model)
    assert [layer.momentum for layer in model] == before


def test_a_shallow_copy_of_a_covered_layer_is_covered_by_a_call_of_its_own():
    layer = nn.BatchNorm1d(3)
    update_once(layer)
    twin = copy.copy(layer)
    twin._parameters = {"weight": nn.Parameter(torch.full((3,), 5.0)), "bias": None}
    x = torch.rand(4, 3)
    update_once(twin)
    assert torch.equal(twin(x), nn.functional.batch_norm(x, None, None, twin.weight, None, True))
    assert applied(layer) == applied(twin) == {"": "update_once"}


# Modes and devices.


class NoFloat64(TorchDispatchMode):
    """Stand in for a device that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert getattr(result, "dtype", None) is not torch.float64
        return result


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_a_device_without_float64_can_be_calibrated_and_updated_once(ckpt):
    torch.set_default_dtype(torch.float32)
    net, once = Net(), Net()
    update_once(once)
    with NoFloat64():
        with calibrate(net) as report:
            one(net, *data(1), ckpt)
        one(once, *data(1), ckpt)
    assert set(report.values()) == {2}
    assert set(counters(once).values()) == {1}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_training_step_traced_by_make_fx_has_its_statistics_moved_once(mode):
    net = block()
    update_once(net)
    names, buffers = [name for name, _ in net.named_parameters()], [name for name, _ in net.named_buffers()]

    def step(parameters, values, x):
        def run(parameters, values, x):
            state = dict(zip(names, parameters, strict=True)) | dict(zip(buffers, values, strict=True))
            return torch.func.functional_call(net, state, (x,))

        return torch.autograd.grad(non_reentrant(run, parameters, values, x).sum(), parameters)

    parameters = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]
    values = [buffer.clone() for buffer in net.buffers()]
    graph = torch.fx.experimental.proxy_tensor.make_fx(step, tracing_mode=mode)(
        parameters, [value.clone() for value in values], *data(1)
    )
    truth = copy.deepcopy(net)
    for x in data(3):
        graph(parameters, values, x)
        truth(x)
    assert all(torch.equal(mine, true) for mine, true in zip(values, truth.buffers(), strict=True))


# Compiled code.


class Deep(nn.Module):
    """Equal blocks, each compiled by itself and checkpointed, more of them than Dynamo would compile one by one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(12))
        self.run = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)

    def forward(self, x, ckpt=plainly):
        for each in self.blocks:
            x = each(x) if ckpt is plainly else ckpt(self.run(each), x)
        return x


@pytest.mark.parametrize("method", ["update_once", "calibrate"])
def test_equal_compiled_blocks_are_compiled_once(method):
    net = Deep()
    truth = copy.deepcopy(net)
    truth(data(1)[0].requires_grad_()).sum().backward()
    torch._dynamo.utils.counters.clear()
    if method == "update_once":
        update_once(net)
        net(data(1)[0].requires_grad_(), non_reentrant).sum().backward()
    else:
        with calibrate(net) as report:
            net(data(1)[0].requires_grad_(), non_reentrant).sum().backward()
        assert set(report.values()) == {2}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert deviation(net, truth) == 0


class Stemmed(nn.Module):
    """A norm outside of the checkpoints, and one inside."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = block(), block()
        self.ckpt = plainly

    def forward(self, x):
        return self.ckpt(self.body, self.stem(x))


def stepping(net, backend):
    run = torch.compile(net, backend=backend, fullgraph=True)
    return lambda x: run(x.clone().requires_grad_()).sum().backward()


def compiled_passes():
    """Count what this torch does by itself: how often a batch updates the norm in the checkpoint."""
    net = Stemmed()
    net.ckpt = non_reentrant
    stepping(net, "aot_eager")(*data(1))
    return {name.removesuffix(".num_batches_tracked"): count for name, count in counters(net).items()}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_update_once_moves_norms_outside_of_the_checkpoints_too_in_a_model_compiled_with_them(backend):
    net = Stemmed()
    truth = copy.deepcopy(net)
    net.ckpt = non_reentrant
    update_once(net)
    step = stepping(net, backend)
    for x in data():
        truth(x.clone().requires_grad_()).sum().backward()
        step(x)
    assert deviation(net, truth) < ROUNDING
    assert counters(net) == counters(truth) == {"stem.1.num_batches_tracked": 4, "body.1.num_batches_tracked": 4}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_calibrate_counts_what_torch_does_in_a_model_compiled_with_its_checkpoints(backend):
    net = Stemmed()
    truth = copy.deepcopy(net)
    net.ckpt = non_reentrant
    step = stepping(net, backend)
    first, *rest = data()
    with calibrate(net) as report:
        step(first)
    assert report.passes == compiled_passes()
    for x in rest:
        step(x)
    for x in data():
        truth(x.requires_grad_()).sum().backward()
    assert deviation(net, truth) < ROUNDING


def test_the_textbook_correction_makes_a_model_wrong_that_is_updated_once():
    net = Stemmed()
    truth = copy.deepcopy(net)
    net.ckpt = non_reentrant
    step = stepping(correct(net), "aot_eager")
    for x in data():
        truth(x.clone().requires_grad_()).sum().backward()
        step(x)
    assert compiled_passes()["stem.1"] == 1
    assert abs(net.stem[1].running_mean - truth.stem[1].running_mean).max() > 1e-3
