"""Which modules preserve_state and checkpoint find, and that they keep these exact."""

import copy
import functools
import types

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from momentum_fix import diagnose, update_once
from states import (
    KINDS,
    Normalizer,
    Steps,
    picture,
    same_gradients,
)
from twins import (
    EXACT,
    TORCHS_WARNINGS,
    by_context,
    counters,
    drop_in,
    drop_in_reentrant,
    non_reentrant,
    plainly,
    reentrant,
)

pytestmark = TORCHS_WARNINGS


def test_the_modules_among_the_arguments_are_known():
    torch.manual_seed(0)
    root = Root()
    truth = copy.deepcopy(root)

    def function(x, known, among):
        return among["it"][0].count(known.count(x))

    for each, ckpt in ((root, by_context), (truth, plainly)):
        x = torch.ones(2, 3, requires_grad=True)
        ckpt(function, x, each, {"it": [each]}).sum().backward()
    assert root.steps == truth.steps == 2
    assert same_gradients(root, truth)


class Noting(nn.Module):
    """Notes by which name a framework says that it runs it."""

    def __init__(self, note):
        super().__init__()
        self.note, self.name = note, "a"

    def forward(self, x):
        self.note((getattr(self, "_current_fx_name", "none"), getattr(self, "name", "none")))
        return x.sin()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_the_name_by_which_lightning_tells_what_is_running_is_not_state(ckpt):
    noted = []
    module, x = nn.Sequential(Noting(noted.append)), torch.ones(1, requires_grad=True)
    module[0]._current_fx_name = "training_step"
    losses = [ckpt(module, x)]
    del module[0]._current_fx_name
    losses.append(ckpt(module, x))
    module[0]._current_fx_name, module[0].name = None, "b"
    sum(losses).backward()
    assert noted == [("training_step", "a"), ("none", "a"), (None, "a"), (None, "a")]
    assert (module[0]._current_fx_name, module[0].name) == (None, "b")


# What a function reaches without calling it as a module.


class Root(nn.Module):
    """Moves a number of its own, and a child's statistics, in a method that is not its forward."""

    def __init__(self):
        super().__init__()
        self.linear, self.child, self.steps = nn.Linear(3, 3), Normalizer(), 0

    def method(self, x):
        self.steps += 1
        self.child.mean += 1
        return (self.linear(x) * self.steps + self.child.mean).tanh()

    def count(self, x):
        self.steps += 1
        return (self.linear(x) * self.steps).tanh()

    def step(self, x, ckpt, how):
        ckpt(how(self), x).sum().backward()


def stepped(how, ckpt):
    """Give three equal roots after a step: with the checkpoint, without one, and with torch's."""
    torch.manual_seed(0)
    root = Root()
    roots = root, copy.deepcopy(root), copy.deepcopy(root)
    for each, by in zip(roots, (ckpt, plainly, non_reentrant), strict=True):
        each.step(torch.ones(2, 3, requires_grad=True), by, how)
    return roots


REACHED = {
    "bound method": lambda root: root.method,
    "partial of a bound method": lambda root: functools.partial(root.method),
    "lambda of a bound method": lambda root: (lambda method: lambda x: method(x))(root.method),
    "a module and a method of it": lambda root: functools.partial(lambda method, root, x: method(x), root.method, root),
    "a method and its module": lambda root: functools.partial(lambda root, method, x: method(x), root, root.method),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", REACHED.values(), ids=REACHED)
def test_a_method_may_move_its_module_and_the_modules_below_it(how, ckpt):
    root, truth, wrong = stepped(how, ckpt)
    assert picture(root) == picture(truth)
    assert same_gradients(root, truth)
    assert not same_gradients(wrong, truth)


class Owner:
    """An object that is no module, cannot be called, and has one."""

    def __init__(self, root):
        self.root = root

    def count(self, x):
        return self.root.count(x)


class Owners(list):
    """One that has modules as a list has them."""

    def count(self, x):
        return self[0].count(x)


COUNTED = {
    "closure": lambda root: lambda x: root.count(x),
    "default": lambda root: lambda x, root=root: root.count(x),
    "function in a closure": lambda root: (lambda inner: lambda x: inner(x))(lambda x: root.count(x)),
    "argument": lambda root: functools.partial(lambda known, x: known.count(x), root),
    "keyword": lambda root: functools.partial(lambda x, known: known.count(x), known=root),
    "dictionary": lambda root: (lambda known: lambda x: known["root"].count(x))({"root": root}),
    "global": lambda root: eval("lambda x: root.count(x)", {"root": root}),
    "an object whose method it is": lambda root: Owner(root).count,
    "a list whose method it is": lambda root: Owners([root]).count,
    "a function that knows itself": lambda root: calling_itself(root),
    "a function with an empty cell": lambda root: with_an_empty_cell(root),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_an_object_without_a_dictionary_may_have_the_method(ckpt):
    class Slotted:
        __slots__ = ("layer",)

        def run(self, x):
            return self.layer(x).tanh()

    owner = Slotted()
    owner.layer = nn.BatchNorm1d(3)
    ckpt(owner.run, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert owner.layer.num_batches_tracked == 1


def calling_itself(root):
    def function(x, times=1):
        return root.count(x) if times == 0 else function(x, times - 1)

    return function


def with_an_empty_cell(root):
    def function(x):
        return root.count(x) if x is not None else later(x)

    if root is None:
        later = None
    return function


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", COUNTED.values(), ids=COUNTED)
def test_a_function_may_move_what_the_modules_that_it_knows_have_themselves(how, ckpt):
    root, truth, wrong = stepped(how, ckpt)
    assert root.steps == truth.steps == 1
    assert same_gradients(root, truth)
    assert not same_gradients(wrong, truth)


def test_a_function_may_call_the_forward_of_what_keeps_its_state_elsewhere():
    keeper = KINDS["kept in another module"]()
    twin = copy.deepcopy(keeper)
    x, y = (torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_() for _ in range(2))
    by_context(lambda x: keeper.forward(x), x).square().sum().backward()
    twin(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert picture(keeper) == picture(twin)


# What functions name, and what modules make of themselves.


class Counts(nn.Module):
    """Has a method that moves it, and a state that its output reads."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        return x / self.steps

    def stepped(self, x):
        self.steps += 1
        return self(x)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.child, self.last = Counts(), nn.Tanh()


class Runs:
    """An object that is called, and not a function."""

    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return self.part.stepped(x)


def moves_a_child(net):
    def function(x):
        net.child.steps += 1
        return net.child(x)

    return function


NAMING = {
    "moves a child": moves_a_child,
    "calls a child's method": lambda net: lambda x: net.child.stepped(x),
    "is an object": lambda net: Runs(net.child),
    "is in a dictionary": lambda net: functools.partial(lambda parts, x: parts["a"].stepped(x), {"a": net.child}),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("named", NAMING.values(), ids=NAMING)
def test_a_function_may_move_a_child_of_what_it_knows(named, ckpt):
    def gradient(ckpt):
        net, x = Holds(), torch.ones(2, requires_grad=True)
        net.last(ckpt(lambda y: named(net)(y) * y, ckpt(named(net), x))).sum().backward()
        return net.child.steps, x.grad

    (steps, true), (counted, mine), (_, wrong) = map(gradient, (plainly, ckpt, non_reentrant))
    assert steps == counted == 2
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


class Banked(nn.Module):
    def __init__(self):
        super().__init__()
        self.bank = nn.Module()
        self.bank.steps = 0

    def moved(self, x):
        self.bank.steps += 1
        return (x * self.bank.steps).sin()


class Wrapped(Banked):
    """Moves its child in what are no plain functions of its class."""

    def moved(self, x):
        return super().moved(x)

    @torch.autocast("cpu", enabled=False)
    def decorated(self, x):
        self.bank.steps += 1
        return (x * self.bank.steps).sin()

    @classmethod
    def of_class(cls, net, x):
        net.bank.steps += 1
        return (x * net.bank.steps).sin()

    @property
    def steps(self):
        return self.bank.steps

    @steps.setter
    def steps(self, steps):
        self.bank.steps = steps

    @functools.cached_property
    def computed_once(self):
        return self.bank


def by_property(net):
    def function(x):
        net.steps += 1
        return (x * net.steps).sin()

    return function


def by_cached_property(net):
    def function(x):
        net.computed_once.steps += 1
        return (x * net.computed_once.steps).sin()

    return function


def helping(net, x):
    net.bank.steps += 1
    return (x * net.bank.steps).sin()


class RunsAnother:
    """An object whose `__call__` calls another method of it."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.run(x)

    def run(self, x):
        self.net.bank.steps += 1
        return (x * self.net.bank.steps).sin()


def of_a_script(net, source):
    """Give what `source` makes where `bank` is a global name."""
    known = {"__name__": "script", "bank": net.bank}
    exec(f"def helper(x):\n    bank.steps += 1\n    return (x * bank.steps).sin()\nfunction = {source}", known)
    return known["function"]


AROUND = {
    "a method that calls the one it overrides": lambda net: lambda x: net.moved(x),
    "a decorated method": lambda net: lambda x: net.decorated(x),
    "a method of the class": lambda net: lambda x: net.of_class(net, x),
    "a property": by_property,
    "a cached property": by_cached_property,
    "an object that is called": RunsAnother,
    "a helper that is given the module": lambda net: lambda x: helping(net, x),
    "a helper that names a module": lambda net: of_a_script(net, "lambda x: helper(x)"),
    "a function in a function that names a module": lambda net: of_a_script(
        net, "lambda x: (lambda y: [bank.__setattr__('steps', bank.steps + 1), y * bank.steps][1].sin())(x)"
    ),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_function_may_move_a_child_by_way_of_whatever_it_calls(around, ckpt):
    def gradient(ckpt):
        net, x = Wrapped(), torch.ones(2, requires_grad=True)
        (ckpt(around(net), x) * ckpt(around(net), x)).sum().backward()
        return net.bank.steps, x.grad

    (steps, true), (counted, mine), (_, wrong) = map(gradient, (plainly, ckpt, non_reentrant))
    assert steps == counted == 2
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


class OwnMethod:
    """What a class of a user's adds to a container of torch's."""

    steps = 0

    def stepped(self, x):
        self.steps += 1
        return x / self.steps


class OwnList(OwnMethod, nn.ModuleList):
    pass


class OwnDict(OwnMethod, nn.ModuleDict):
    pass


class OwnSequential(OwnMethod, nn.Sequential):
    pass


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "make",
    [OwnList, OwnDict, OwnSequential, lambda: OwnList([nn.Tanh()]), lambda: OwnSequential(nn.Tanh())],
    ids=["list", "dictionary", "sequence", "list of one", "sequence of one"],
)
def test_a_child_may_be_a_container_of_a_users_own_class(make, ckpt):
    def gradient(ckpt, reach):
        net, x = nn.Module(), torch.ones(2, requires_grad=True)
        net.child = make()
        function = (lambda y: net.child.stepped(y).sin()) if reach == "by its name" else Parent(net.child)
        sum(ckpt(function, x) for _ in range(2)).sum().backward()
        return net.child.steps, x.grad

    for reach in ("by its name", "from above"):
        (steps, true), (counted, mine), (_, wrong) = (gradient(by, reach) for by in (plainly, ckpt, non_reentrant))
        assert steps == counted == 2
        assert torch.equal(mine, true)
        assert not torch.equal(wrong, true)


class Parent(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return self.child.stepped(x).sin()


class BuildsItself(nn.Module):
    """Makes its parts when it meets its first batch, and notes that it has."""

    def __init__(self):
        super().__init__()
        self.built, self.first = False, nn.Linear(2, 2)

    def forward(self, x):
        if not self.built:
            self.layer, self.scale, self.built = nn.Linear(2, 2), nn.Parameter(torch.ones(2)), True
        return self.layer(self.first(x)) * self.scale


@pytest.mark.parametrize("ckpt", [by_context, drop_in])
def test_a_module_that_builds_itself_keeps_what_the_forward_has_built(ckpt):
    def trained(ckpt):
        torch.manual_seed(0)
        module = BuildsItself()
        for _ in range(2):
            ckpt(module, torch.ones(3, 2, requires_grad=True)).square().sum().backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    mine, true = trained(ckpt), trained(plainly)
    assert mine.keys() == true.keys()
    assert all(torch.equal(mine[name], true[name]) for name in true)


class HasAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = [nn.BatchNorm1d(6), nn.BatchNorm1d(6)]

    def forward(self, x):
        return self.norms[0](x)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_norms_in_a_plain_list_are_preserved_and_diagnose_says_that_update_once_does_not_reach_them(ckpt):
    def counted(ckpt, prepare):
        block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), HasAList(), nn.Tanh())
        prepare(block)
        with diagnose(block) as report:
            ckpt(block, torch.rand(8, 6, requires_grad=True)).sum().backward()
        counters = [int(norm.num_batches_tracked) for norm in (block[1], block[2].norms[0])]
        return counters, {name.rpartition(".")[0]: each for name, each in report.items()}

    assert counted(ckpt, lambda block: None) == ([1, 1], {})
    with pytest.warns(UserWarning, match=r"2\.norms\[0\].*in a plain list or dict, so update_once does not reach it"):
        counters, found = counted(non_reentrant, update_once)
    assert counters == [1, 2]
    assert [*found] == ["2.norms[0]"]
    assert found["2.norms[0]"].remedy == "preserve_state"
    assert "not registered (in a plain list or dict?), so update_once does not reach it" in found["2.norms[0]"].note


def test_torchscript_with_buffers_is_refused_in_training_and_left_alone_otherwise():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    module, x = nn.Sequential(Counts(), scripted), torch.ones(3, 2, requires_grad=True)
    with pytest.raises(TypeError, match="TorchScript with buffers, whose state cannot be preserved"):
        drop_in(module, x)
    scripted.eval()
    drop_in_reentrant(lambda y: scripted(module[0].stepped(y)), x).sum().backward()  # torch stops no script early
    assert module[0].steps == 1


class EncodesByMethods(nn.Module):
    """A layer that calls methods of its parts, and not the parts."""

    def __init__(self):
        super().__init__()
        self.linear, self.steps = nn.Linear(3, 3), Steps()

    def encode(self, x):
        return self.linear(self.quantized(self.linear(x)))

    def quantized(self, x):
        return Steps.forward(self.steps, x)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("kind", ["a method in a lambda", "an activation"])
def test_modules_that_only_names_and_attributes_lead_to_are_preserved(kind, ckpt):
    found = []
    for by in (plainly, ckpt, non_reentrant):
        torch.manual_seed(0)
        if kind == "an activation":
            steps = Steps()
            block = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, activation=lambda x, steps=steps: steps(x).relu())
            function, x = block, torch.rand(2, 3, 4).requires_grad_()
        else:
            block = EncodesByMethods()
            steps, x = block.steps, torch.rand(2, 3).requires_grad_()

            def function(x, block=block):
                return block.encode(x)

        by(function, x).square().sum().backward()
        found.append((x.grad, picture(steps)))
    true, mine, wrong = found
    assert torch.equal(mine[0], true[0])
    assert mine[1] == true[1] != wrong[1]


# Hooks, and modules that no call leads to.


class SetsAHook(nn.Module):
    """Puts a hook on its layer in the first forward pass, as a flag says."""

    def __init__(self):
        super().__init__()
        self.layer, self.done = nn.Linear(3, 3), False

    def forward(self, x):
        if not self.done:
            self.layer.register_forward_hook(lambda module, args, output: output * 1.5)
            self.done = True
        return self.layer(x).sin()


class Keeper(nn.Module):
    steps = 1

    def scale(self, module, args, output):
        self.steps += 1
        return (output * self.steps).sin()


def hooked_by_another():
    layer, keeper = nn.Linear(3, 3), Keeper()
    layer.register_forward_hook(keeper.scale)
    return layer


class CallsMethods(nn.Module):
    """Runs methods of its blocks other than `__call__`."""

    def __init__(self, method):
        super().__init__()
        self.blocks, self.method = nn.ModuleList([Scales(), Scales()]), method

    def forward(self, x, ckpt):
        def by_forward(x):
            for block in self.blocks:
                x = block.forward(x)
            return x

        def by_name(x):
            for block in self.blocks:
                x = block.scaled(x)
            return x

        return ckpt(by_forward if self.method == "forward" else by_name, x)


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.steps = nn.Linear(3, 3), 1

    def scaled(self, x):
        self.steps += 1
        return (self.layer(x) * self.steps).sin()

    forward = scaled


def run_by(make, ckpt):
    torch.manual_seed(0)
    model, x = make(), torch.rand(4, 3, requires_grad=True)
    for _ in range(2):
        (model(x, ckpt) if isinstance(model, CallsMethods) else ckpt(model, x)).sum().backward()
    return [each.grad for each in model.parameters()], [len(each._forward_hooks) for each in model.modules()]


OUT_OF_REACH = {
    "a hook that the forward puts on": SetsAHook,
    "a hook that is a method of another module": hooked_by_another,
    "blocks whose forward is called": lambda: CallsMethods("forward"),
    "blocks of which another method is called": lambda: CallsMethods("scaled"),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("make", OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def test_hooks_and_what_they_and_other_methods_move_are_preserved(make, ckpt):
    mine, true = run_by(make, ckpt), run_by(make, plainly)
    assert all(map(torch.equal, mine[0], true[0]))
    assert mine[1] == true[1]
    wrong = [not all(map(torch.equal, run_by(make, engine)[0], true[0])) for engine in (non_reentrant, reentrant)]
    assert wrong == [make is not SetsAHook] * 2


def test_of_a_large_array_the_sign_of_zero_is_preserved():
    class Signs(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = np.zeros(20_000)

        def forward(self, x):
            y = (x * float(np.copysign(1.0, self.values[0]))).exp()
            self.values[0] = -self.values[0]
            return y

    for ckpt, right in ((by_context, True), (non_reentrant, False)):
        gradients = []
        for engine in (ckpt, plainly):
            model, x = Signs(), torch.ones(3, requires_grad=True)
            for _ in range(2):
                engine(model, x).sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients) is right


@pytest.mark.parametrize("block", [lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()), lambda: SetsAHook()])
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_what_has_been_preserved_is_so_no_longer(block, ckpt):
    model = nn.Sequential(block(), nn.BatchNorm1d(3), nn.Tanh())
    for engine in (ckpt, non_reentrant):  # the second one relies on update_once
        ckpt(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
        with update_once(model):
            engine(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert set(counters(model).values()) == {4}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("put_on", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_on_a_layer_of_torchs_may_read_its_statistics(put_on, ckpt):
    def gradient(ckpt):
        torch.manual_seed(0)
        layer, x = nn.BatchNorm1d(3), torch.rand(4, 3, requires_grad=True)
        getattr(layer, put_on)(lambda module, given, *output: (output or given)[0] * (1 + module.running_var.clone()))
        ckpt(nn.Sequential(layer, nn.Tanh()), x).square().sum().backward()
        return layer.weight.grad

    true = gradient(plainly)
    assert torch.equal(gradient(ckpt), true)
    assert not torch.equal(gradient(non_reentrant), true)


class Holder:
    """No module, and not called."""

    def __init__(self, blocks):
        self.blocks, self.first = blocks, blocks[0]

    def step(self, x):
        return self.first.scaled(x)


def by_closure(blocks):
    def run(x):
        for block in blocks:
            x = block.scaled(x)
        return x

    return run


def through_an_object(blocks):
    holder = Holder(blocks)
    return lambda x: holder.step(x)


def through_a_namespace(blocks):
    holder = types.SimpleNamespace(net=blocks[0])
    return lambda x: holder.net.scaled(x)


HELD = {
    "a closure over a ModuleList": by_closure,
    "a ModuleList that is given": lambda blocks: functools.partial(
        lambda blocks, x: blocks[1].scaled(blocks[0].scaled(x)), blocks
    ),
    "a method of an object in a closure": through_an_object,
    "a namespace in a closure": through_a_namespace,
    "an object that is given": lambda blocks: functools.partial(Holder.step, Holder(blocks)),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("make", HELD.values(), ids=HELD)
def test_modules_in_what_a_function_closes_over_or_is_given_are_preserved(make, ckpt):
    def gradients(ckpt):
        torch.manual_seed(0)
        blocks = nn.ModuleList([Scales(), Scales()])
        for _ in range(2):
            ckpt(make(blocks), torch.rand(4, 3, requires_grad=True)).sum().backward()
        return blocks[0].layer.weight.grad

    true = gradients(plainly)
    assert torch.equal(gradients(ckpt), true)
    assert not torch.equal(gradients(non_reentrant), true)
