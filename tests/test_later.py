"""State that recomputation has moved may be read later: by the next forward pass, or by the backward pass itself."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_full_backward_hook, register_module_full_backward_pre_hook

from momentum_fix import calibrate, correct, diagnose, update_once
from momentum_fix.diagnosis.report import Diagnosis
from scenes import WIDTH, Counts, Net, data, same_gradients
from twins import by_context, drop_in_reentrant, non_reentrant, plainly, reentrant

BOTH = (non_reentrant, reentrant)
KEEPING = {non_reentrant: by_context, reentrant: drop_in_reentrant}
READ_BY_NEXT = "again before another forward pass, which may have read it"
READ_BY_BACKWARD = "runs in the backward pass of body, and may have read what recomputation had moved again"
READ_SOMEWHERE = READ_BY_BACKWARD.replace(" of body", "")


def trained(block, ckpt, batches, loss=lambda net, y: y.square().mean(), tool=None):
    torch.manual_seed(0)
    net = Net(block())
    handle = tool(net) if tool else None
    with diagnose(net) as report:
        for x in data(batches):
            loss(net, ckpt(net.body, net.stem(x))).backward()
    if handle:
        handle.remove()
    return report, net


def beside_its_twin(step, ckpt):
    """Run a step of a net that counts, and of its twin; give the report, and whether their gradients are the same."""
    nets = []
    for engine in (plainly, ckpt):
        torch.manual_seed(0)
        nets.append(Net(Counts()))
        with diagnose(nets[-1]) as report:
            step(nets[-1], engine, data()[0])
    return report, same_gradients(*nets)


class Changes(Counts):
    """Computes something else from its second batch on."""

    def forward(self, x):
        return super().forward(x * (3 if self.seen >= 2 else 1))


class ChangesAtOnce(Counts):
    def forward(self, x):
        return super().forward(x * (1 + self.seen))


class Center(Counts):
    """Moves a mean that only the loss reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x):
        y = self.layer(x).sin()
        self.center.lerp_(y.detach().mean(0), 0.5)
        return y


def centered(net, y):
    center = next(each.center for each in net.body.modules() if isinstance(each, Center))
    return (y - center).square().mean()


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize(
    ("block", "loss"),
    [(Changes, lambda net, y: y.square().mean()), (Center, centered), (Counts, lambda net, y: y.square().mean())],
    ids=["the module itself", "the loss", "nobody"],
)
def test_what_had_moved_before_the_next_forward_pass_may_have_been_read(block, loss, batches, ckpt):
    (report, net), (_, truth) = trained(block, ckpt, batches, loss), trained(block, plainly, batches, loss)
    assert same_gradients(net, truth) is (batches == 1 or block is Counts)
    assert report.gradients_right is (True if batches == 1 else None)
    assert (READ_BY_NEXT in report.verdict) is (batches > 1)
    assert "recomputation moves state again (in 1 module)" in report.verdict


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize(("block", "loss"), [(Changes, lambda net, y: y.square().mean()), (Center, centered)])
def test_where_it_is_preserved_it_is_right_in_every_batch(block, loss, ckpt):
    (report, net), (_, truth) = trained(block, KEEPING[ckpt], 3, loss), trained(block, plainly, 3, loss)
    assert same_gradients(net, truth)
    assert report.ok


@pytest.mark.parametrize("ckpt", BOTH)
def test_what_is_observed_to_be_wrong_is_said_to_be_wrong_in_every_batch(ckpt):
    report, _ = trained(ChangesAtOnce, ckpt, 3)
    assert report.gradients_right is False


@pytest.mark.parametrize("ckpt", BOTH)
def test_statistics_that_no_output_in_training_reads_make_no_batch_unknown(ckpt):
    norm = lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))  # noqa: E731
    (report, net), (_, truth) = trained(norm, ckpt, 3), trained(norm, plainly, 3)
    assert same_gradients(net, truth)
    assert report.gradients_right is True
    assert not report.ok
    assert trained(norm, ckpt, 3, tool=update_once)[0].ok


def test_forward_passes_before_the_first_recomputation_read_nothing_that_has_moved():
    net = Net(Counts())
    with diagnose(net) as report:
        sum(non_reentrant(net.body, net.stem(x)).square().mean() for x in data(3)).backward()
    assert report.gradients_right is True
    assert report["body.1.seen"].times == 2


@pytest.mark.parametrize("ckpt", BOTH)
def test_what_only_a_method_moves_may_be_read_by_the_next_call_of_it(ckpt):
    net = Net(Counts())
    counts = next(each for each in net.body.modules() if isinstance(each, Counts))
    with diagnose(net) as report:
        for x in data()[:2]:
            ckpt(counts.forward, net.stem(x)).square().mean().backward()
    assert report.gradients_right is None
    assert READ_BY_NEXT in report.verdict


# The backward pass.


class Scales(torch.autograd.Function):
    """Its backward reads an object when it runs."""

    @staticmethod
    def forward(ctx, x, owner):
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.owner.seen, None


class ByAFunction(Counts):
    def forward(self, x):
        return Scales.apply(super().forward(x), self).sin()


class ByAHook(Counts):
    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * self.seen)
        return y.sin()


class ByAModulesHook(Counts):
    def __init__(self):
        super().__init__()
        # One that the copies of a module do not share.
        self.layer.register_full_backward_hook(lambda _, given, __: (given[0] * self.seen,))


class ByAModulesPreHook(Counts):
    def __init__(self):
        super().__init__()
        self.layer.register_full_backward_pre_hook(lambda _, gradients: (gradients[0] * self.seen,))


class Still(Scales):
    """Its backward reads no state."""

    @staticmethod
    def backward(ctx, gradient):
        return -gradient, None


class ByNone(Counts):
    def forward(self, x):
        return Still.apply(super().forward(x), None).sin()


READERS = (ByAFunction, ByAHook, ByAModulesHook, ByAModulesPreHook)


@pytest.mark.parametrize("block", [*READERS, ByNone])
def test_what_the_backward_pass_of_a_users_own_may_read_is_not_called_right(block):
    (report, net), (_, truth) = trained(block, non_reentrant, 1), trained(block, plainly, 1)
    assert same_gradients(net, truth) is (block is ByNone)
    assert report.gradients_right is None
    assert READ_BY_BACKWARD in report.verdict
    assert "seen" in report.verdict


@pytest.mark.parametrize("block", READERS)
def test_with_the_reentrant_engine_neither(block):
    report, net = trained(block, reentrant, 1)
    assert not same_gradients(net, trained(block, plainly, 1)[1])
    assert report.gradients_right is None


@pytest.mark.parametrize("block", READERS)
def test_if_it_is_preserved_what_they_read_is_right(block):
    (report, net), (_, truth) = trained(block, by_context, 1), trained(block, plainly, 1)
    assert same_gradients(net, truth)
    assert report.ok


@pytest.mark.parametrize("give", [lambda y: (y, None), lambda y: {"y": y}, lambda y: [y]])
def test_it_is_found_in_whatever_the_function_returns(give):
    net = Net(ByAFunction())
    with diagnose(net) as report:
        given = non_reentrant(lambda x: give(net.body(x)), net.stem(data()[0]))
        y = given["y"] if isinstance(given, dict) else given[0]
        y.square().mean().backward()
    assert report.gradients_right is None
    assert READ_BY_BACKWARD.partition(" of ")[0] in report.verdict


still, scales = Still.apply, Scales.apply  # under another name, since before anybody listens


def before(apply):
    return lambda net, ckpt, x: ckpt(net.body, apply(net.stem(x), net.body[1]))


@dataclass
class Output:
    y: torch.Tensor


def kept(net, ckpt, x):
    """Keep what the loss has of a function whose result the checkpoint does not return."""

    def run(x):
        net.kept = scales(x, net.body[1])
        return net.body(x)

    return ckpt(run, net.stem(x)) + net.kept.sum()


def wrapped(net, ckpt, x):
    return ckpt(lambda x: Output(net.body(scales(x, net.body[1]))), net.stem(x)).y


@pytest.mark.parametrize(
    ("forward", "reads", "ckpt"),
    [
        *product([before(still)], [False], BOTH),
        *product([before(scales), before(Scales.apply), kept], [True], BOTH),
        (wrapped, True, non_reentrant),  # the other engine gives no graph to what is in an object
    ],
)
def test_a_function_is_noticed_wherever_it_is_and_whatever_it_gives(forward, reads, ckpt):
    report, is_same = beside_its_twin(lambda *given: forward(*given).square().mean().backward(), ckpt)
    assert report.gradients_right is None
    assert is_same is not reads


def test_a_function_without_gradients_runs_in_no_backward_pass():
    net = Net(Counts())
    with diagnose(net) as report:
        with torch.no_grad():
            scales(net.stem(data()[0]), net.body[1])
        non_reentrant(net.body, net.stem(data()[0])).square().mean().backward()
    assert report.gradients_right is True


@pytest.mark.parametrize("ckpt", BOTH)
def test_a_function_whose_result_the_reentrant_engine_gives_no_graph_is_not_called_right(ckpt):
    net = Net(nn.Tanh())

    def run(x):
        net.kept = still(net.body[0](x), None)
        return net.body(x)

    with diagnose(net) as report:
        (ckpt(run, net.stem(data()[0])).sum() + net.kept.sum()).backward()
    assert report.gradients_right is (True if ckpt is non_reentrant else None)


# Hooks from outside of the checkpoint, that scale a gradient which comes after the recomputation.


def on_a_parameter(net, other, scale):
    return net.stem.weight.register_hook(lambda gradient: gradient * scale())


def on_a_parameter_of_another_model(net, other, scale):
    return other.weight.register_hook(lambda gradient: gradient * scale())


def on_a_gradient_that_is_ready(net, other, scale):
    def hook(weight):
        weight.grad *= scale()

    return net.stem.weight.register_post_accumulate_grad_hook(hook)


def on_a_module(net, other, scale):
    return net.stem.register_full_backward_pre_hook(lambda _, gradients: (gradients[0] * scale(),))


def on_what_a_module_gives(net, other, scale):
    return net.stem.register_full_backward_hook(lambda _, gradients, __: (gradients[0] * scale(),))


def on_all_modules(net, other, scale):
    def hook(module, gradients):
        return (gradients[0] * scale(),) if isinstance(module, nn.Linear) else None

    return register_module_full_backward_pre_hook(hook)


def on_what_all_modules_give(net, other, scale):
    def hook(module, gradients, _):
        return (gradients[0] * scale(),) if module is net.stem else None

    return register_module_full_backward_hook(hook)


FROM_OUTSIDE = (
    on_a_parameter,
    on_a_parameter_of_another_model,
    on_a_gradient_that_is_ready,
    on_a_module,
    on_what_a_module_gives,
    on_all_modules,
    on_what_all_modules_give,
)


def hooked(hook, ckpt, scale):
    """Train two models, with a hook whose scale follows the count of the second one's checkpoint."""
    torch.manual_seed(0)
    other, net = nn.Linear(4, 4), Net(Counts())
    with hook(net, other, lambda: scale(net.body[1].seen)), diagnose(net) as report:
        ckpt(net.body, net.stem(other(data()[0].requires_grad_()))).square().mean().backward()
    return report, nn.ModuleList([net, other])


def as_it_is(seen):
    return float(seen)


def always_two(_):
    return 2.0


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("scale", [as_it_is, always_two])
@pytest.mark.parametrize("hook", FROM_OUTSIDE)
def test_what_a_hook_from_outside_may_have_read_is_not_called_right(hook, scale, ckpt):
    (report, nets), (_, truth) = hooked(hook, ckpt, scale), hooked(hook, plainly, scale)
    assert same_gradients(nets, truth) is (scale is always_two)
    assert report.gradients_right is None
    assert READ_SOMEWHERE in report.verdict.replace(" of body", "")


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("hook", FROM_OUTSIDE)
def test_where_it_is_preserved_what_a_hook_from_outside_reads_is_right(hook, ckpt):
    (report, nets), (_, truth) = hooked(hook, KEEPING[ckpt], as_it_is), hooked(hook, plainly, as_it_is)
    assert same_gradients(nets, truth)
    assert report.ok


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_that_is_put_on_a_parameter_inside_of_the_block_too(register, ckpt):
    net = Net(Counts())
    with diagnose(net) as report:
        getattr(net.stem.weight, register)(lambda _: None)
        ckpt(net.body, net.stem(data()[0])).square().mean().backward()
    assert report.gradients_right is None
    assert READ_SOMEWHERE in report.verdict


class OwnNorm(nn.BatchNorm1d):
    """Might read its statistics, for all that is known."""

    def forward(self, x):
        return super().forward(x)


class CountsRecomputations(Counts):
    def forward(self, x):
        self.seen += torch.is_grad_enabled()
        return self.layer(x).sin()


@pytest.mark.parametrize(
    ("block", "ckpt"),
    [(lambda: correct(OwnNorm(WIDTH), 2), non_reentrant), (CountsRecomputations, reentrant)],
    ids=["corrected", "in recomputations only"],
)
def test_a_hook_reads_nothing_wrong_of_what_needs_no_fix(block, ckpt):
    net = Net(block())
    net.stem.weight.register_hook(lambda _: None)
    with diagnose(net) as report:
        ckpt(net.body, net.stem(data()[0])).square().mean().backward()
    assert len(report) in (1, 3)
    assert report.ok


@pytest.mark.parametrize("ckpt", BOTH)
def test_hooks_of_this_package_are_nobodys_own(ckpt):
    for outer, inner in ((diagnose, diagnose), (calibrate, diagnose), (diagnose, calibrate)):
        net = Net(nn.Sequential(nn.BatchNorm1d(WIDTH), Counts()))
        with outer(net) as first, inner(net) as second:
            ckpt(net.body, net.stem(data()[0])).square().mean().backward()
        assert all(each.gradients_right is True for each in (first, second) if isinstance(each, Diagnosis))


class Strict(torch.Tensor):
    """Refuses what it does not know."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__self__", None) in (torch.Tensor._backward_hooks, torch.Tensor._post_accumulate_grad_hooks):
            raise TypeError("not known")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_parameter_that_refuses_to_tell_of_its_hooks_is_no_crash():
    net = Net(nn.Tanh())
    net.strict = nn.Parameter(torch.rand(2).as_subclass(Strict), requires_grad=False)
    with pytest.raises(TypeError, match="not known"):
        net.strict._backward_hooks  # noqa: B018
    with diagnose(net) as report:
        non_reentrant(net.body, net.stem(data()[0])).square().mean().backward()
    assert report.ok


@pytest.mark.parametrize("ckpt", BOTH)
def test_hooks_that_run_in_no_backward_pass_read_nothing(ckpt):
    net, other = Net(Counts()), nn.Linear(4, 4)
    other.register_full_backward_pre_hook(lambda *_: None)
    with diagnose(net) as report:
        with torch.no_grad():
            x = other(data()[0])
        ckpt(net.body, net.stem(x)).square().mean().backward()
    assert report.gradients_right is True


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("scale", [as_it_is, always_two])
def test_hooks_on_saved_tensors_outside_of_the_checkpoint_may_have_read_it(scale, ckpt):
    def step(net, engine, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda each: each, lambda each: each * scale(net.body[1].seen)):
            y = net.stem(x)
        engine(net.body, y).square().mean().backward()

    report, is_same = beside_its_twin(step, ckpt)
    assert is_same is (scale is always_two)
    assert report.gradients_right is None
    assert READ_SOMEWHERE in report.verdict


@pytest.mark.parametrize("ckpt", BOTH)
def test_what_torch_saves_on_the_host_reads_nothing(ckpt):
    net = Net(Counts())
    with diagnose(net) as report, torch.autograd.graph.save_on_cpu():
        ckpt(net.body, net.stem(data()[0])).square().mean().backward()
    assert report.gradients_right is True


# The next forward pass, though no module of a user's is called in it.


def by_no_module(net, x):
    return net.stem(x) * net.body[1].seen


def by_a_function_of_a_layer(net, x):
    return nn.TransformerEncoderLayer(4, 2, 8, 0.0, lambda z: z.relu() * net.body[1].seen)(net.stem(x)[:, :4])


def by_nothing(net, x):
    return nn.TransformerEncoderLayer(4, 2, 8, 0.0)(net.stem(x)[:, :4])


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("score", [by_no_module, by_a_function_of_a_layer, by_nothing])
@pytest.mark.parametrize("inside", [False, True])
def test_a_forward_pass_by_layers_of_torchs_may_have_read_it(score, inside, ckpt):
    def step(net, engine, x):
        engine(net.body, net.stem(x)).square().mean().backward()
        score(net, x).square().mean().backward()

    class Trainer(nn.Module):
        def forward(self, net, engine, x):
            step(net, engine, x)

    report, is_same = beside_its_twin(Trainer() if inside else step, ckpt)
    assert report.gradients_right is None
    assert READ_BY_NEXT in report.verdict
    assert is_same is (score is by_nothing)


class Hides(nn.Module):
    """Has a counting block where nobody looks, moves what is on it, and never calls it."""

    def __init__(self, hide):
        super().__init__()
        self.layer, self.get = nn.Linear(WIDTH, WIDTH), hide(self, Counts())

    def forward(self, x):
        self.get().seen += 1
        return self.layer(x).sin()


def on_an_attribute(module, block):
    vars(module)["hidden"] = block
    return lambda: module.hidden


def in_a_tuple_in_a_dict(module, block):
    module.hidden = {"a": (block,)}
    return lambda: module.hidden["a"][0]


def below_one_in_a_list(module, block):
    module.hidden = [nn.Sequential(block)]
    return lambda: module.hidden[0][0]


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("hide", [on_an_attribute, in_a_tuple_in_a_dict, below_one_in_a_list])
def test_modules_are_looked_at_wherever_they_are(hide, ckpt):
    report, _ = trained(lambda: Hides(hide), ckpt, 1)
    name = {on_an_attribute: "", in_a_tuple_in_a_dict: "['a'][0]", below_one_in_a_list: "[0].0"}[hide]
    assert list(report) == [f"body.1.hidden{name}.seen"]
    assert trained(lambda: Hides(hide), ckpt, 2)[0].gradients_right is None
