"""update_once: what it puts on a layer, what takes it off, what it refuses, and compiled code. See test_conformance."""

import contextlib
import copy
import functools
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import recipes
from momentum_fix import applied, calibrate, correct, norm_layer, restore, update_once
from momentum_fix.norms.wrapping import wrapper_of as covers
from recipes import ENGINES, Net, OwnForward, block, data, instance_norm, one, siamese
from twins import batches, counters, deviation, non_reentrant, plainly, reentrant, same_path, statistics, train

own_class = pytest.mark.filterwarnings("ignore:.*the class has a forward of its own")


def same_statistics(model, truth):
    mine, true = statistics(model), statistics(truth)
    same = all(torch.equal(mine[name], true[name]) for name in true)
    return same and mine.keys() == true.keys() and counters(model) == counters(truth) and same_path(model, truth)


def truth_of(model, step=one, count=4):
    return train(copy.deepcopy(model), step, data(count), plainly)


# The layer.


def test_a_layer_keeps_its_class_its_buffers_its_state_dict_and_its_momentum_and_gets_no_hook():
    net = Net()
    before = {name: type(module) for name, module in net.named_modules()}
    buffers, keys, momentum = list(net.buffers()), list(net.state_dict()), net.a[1].momentum
    update_once(net)
    train(net, one, data(), non_reentrant)
    assert {name: type(module) for name, module in net.named_modules()} == before
    assert all(mine is old for mine, old in zip(net.buffers(), buffers, strict=True))
    assert list(net.state_dict()) == keys
    assert net.a[1].momentum == momentum
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert [name for name, module in net.named_modules() if "forward" in vars(module)] == ["a.1", "b.1", "c.1"]


def test_layers_without_running_statistics_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2), nn.InstanceNorm1d(2))
    with pytest.warns(UserWarning, match="no layer with running statistics, so there is nothing to update once"):
        update_once(model)
    assert not any("forward" in vars(layer) for layer in model)


class Hidden(nn.Module):
    """Has blocks in a plain list, one of which is registered as well, and a norm in a tuple of one of its modules."""

    def __init__(self):
        super().__init__()
        self.first = block()
        self.blocks = [self.first, block(), nn.Sequential(nn.Conv2d(3, 3, 1))]
        self.holder = nn.Module()
        self.holder.more = (nn.BatchNorm2d(3),)

    def forward(self, x):
        for each in (*self.blocks, *self.holder.more):
            x = each(x)
        return x.tanh()


def test_layers_in_a_plain_list_are_named_as_they_are_not_reached():
    net = Hidden()
    with pytest.warns(UserWarning, match=r"^blocks\[1\], holder.more\[0\]: in a plain list.* nn\.ModuleList") as caught:
        update_once(net)
    assert caught[0].filename == __file__
    train(net, one, data(1), non_reentrant)
    moved = [norm.num_batches_tracked for norm in (net.first[1], net.blocks[1][1], net.holder.more[0])]
    assert moved == [1, 2, 2]
    net.blocks, net.holder.more = nn.ModuleList(net.blocks), nn.ModuleList(net.holder.more)
    update_once(net)
    train(net, one, data(1), non_reentrant)
    assert [norm.num_batches_tracked for norm in (net.first[1], net.blocks[1][1], net.holder.more[0])] == [2, 3, 3]


def test_the_model_may_be_the_layer_itself():
    layer = nn.BatchNorm1d(3)
    update_once(layer)
    non_reentrant(lambda x: layer(x).tanh(), torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert layer.num_batches_tracked == 1
    with pytest.raises(ValueError, match=r"^the model itself has a corrected momentum"):
        update_once(correct(nn.BatchNorm1d(3)))


def test_a_shared_layer_is_covered_once_and_updated_at_each_use():
    net = Net()
    net.c = net.a
    truth = truth_of(net)
    update_once(net)
    assert same_statistics(train(net, one, data(), non_reentrant), truth)
    assert net.a[1].num_batches_tracked == 8


@own_class
def test_a_forward_with_more_arguments_gets_them():
    class Shifted(nn.BatchNorm1d):
        def forward(self, x, shift, *, scale=1.0):
            return super().forward(x) * scale + shift

    layer = Shifted(3)
    x = torch.rand(4, 3)
    expected = copy.deepcopy(layer)(x, 2.0, scale=3.0)
    update_once(layer)
    assert torch.equal(layer(x, 2.0, scale=3.0), expected)


@pytest.mark.parametrize("covered", [update_once, calibrate])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_a_layer_may_get_its_input_by_keyword(covered, training, ckpt):
    layers = [nn.BatchNorm2d(3).train(training) for _ in range(2)]
    nothing_ran = covered is calibrate and not training
    said = pytest.warns(UserWarning, match="no layer was updated") if nothing_ran else contextlib.nullcontext()
    with said, covered(layers[0]):
        for layer, by in zip(layers, (ckpt, plainly), strict=True):
            by(lambda x, layer=layer: layer(input=x).tanh(), data(1)[0].requires_grad_()).sum().backward()
    assert same_statistics(*layers)
    assert layers[0].num_batches_tracked == training


@pytest.mark.parametrize(("count", "named"), [(1, "0"), (5, "0, 1, 2, 3, 4"), (6, "0, 1, 2, 3, 4 and 1 more")])
def test_a_warning_names_five_layers_at_most(count, named):
    with pytest.warns(UserWarning, match=f"^{named}: the class has a forward of its own"):
        update_once(nn.Sequential(*(OwnForward(3) for _ in range(count))))


@pytest.mark.parametrize("model", [nn.Sequential(OwnForward(3)), Hidden()], ids=["a class of its own", "a plain list"])
def test_a_warning_turned_into_an_error_leaves_the_model_as_it_was(model):
    said = r"forward of its own|in a plain list"
    with pytest.raises(UserWarning, match=said):  # pytest makes errors of warnings
        update_once(model)
    assert applied(model) == {}
    with pytest.warns(UserWarning, match=said):
        update_once(model)
    assert set(applied(model).values()) == {"update_once"}


class LeavesAPenalty(nn.BatchNorm2d):
    """Leaves a value on itself that the region reads."""

    def forward(self, x):
        self.penalty = x.square().mean()
        return super().forward(x)


def with_penalty(net, x, ckpt):
    ckpt(lambda y: net(y) + net.a[1].penalty, x.requires_grad_()).square().mean().backward()


@own_class
@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_a_value_that_a_layer_leaves_on_itself_is_found_there_in_the_recomputation_too(ckpt):
    net = Net(LeavesAPenalty)
    truth = truth_of(net, with_penalty)
    update_once(net)
    assert same_statistics(train(net, with_penalty, data(), ckpt), truth)


@own_class
def test_a_layer_whose_forward_reads_its_statistics_reads_copies_of_them():
    seen = []

    class Reading(nn.BatchNorm2d):
        def forward(self, x):
            seen.append(self.running_mean.clone())
            return super().forward(x)

    net = Net(Reading)
    update_once(net)
    train(net, one, data(1), reentrant)
    forward, recomputation = seen[:3], seen[3:]
    assert all(torch.equal(mean, torch.zeros(3)) for mean in forward)
    assert all(
        torch.equal(mean, layer.running_mean) for mean, layer in zip(recomputation, recipes.norms(net), strict=True)
    )


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_a_recomputation_in_evaluation_mode_uses_the_running_statistics(ckpt):
    net = Net().eval()
    truth = copy.deepcopy(net)
    update_once(net)
    for model, by in ((truth, plainly), (net, ckpt)):
        one(model, data(1)[0], by)
    assert same_statistics(net, truth)
    assert truth.a[0].weight.grad.abs().max() > 0


def test_a_graph_that_waits_for_its_backward_pass_is_not_seen_as_modified():
    net = Net()
    truth = truth_of(net, siamese)
    update_once(net)
    waiting = net(data(1)[0])  # an ordinary graph, built before and run backward after a checkpoint's recomputation
    versions = [buffer._version for name, buffer in net.named_buffers() if "running" in name]
    one(net, data(1)[0], non_reentrant)
    assert versions == [buffer._version for name, buffer in net.named_buffers() if "running" in name]
    waiting.sum().backward()
    assert truth.a[1].num_batches_tracked == 8


def test_backward_passes_in_two_threads_do_not_disturb_each_other():
    """Each thread has models of its own and one layer that it shares with the other, read in turn."""
    shared = nn.BatchNorm1d(3)
    update_once(shared)
    in_recomputation, go_on = threading.Event(), threading.Event()
    calls = []

    def held(x):
        calls.append(x)
        if len(calls) == 2:
            in_recomputation.set()
            go_on.wait(10)
        return shared(x).tanh()

    def other():
        reentrant(held, torch.rand(4, 3, requires_grad=True)).sum().backward()

    thread = threading.Thread(target=other)
    thread.start()
    in_recomputation.wait(10)
    shared(torch.rand(4, 3))  # a forward pass in this thread, while the other one is in its backward pass
    go_on.set()
    thread.join()
    assert shared.num_batches_tracked == 2


# Putting on, taking off.


def test_without_it_and_after_remove_the_statistics_move_with_every_pass():
    net = Net()
    handle = update_once(net)
    train(net, one, data(1), non_reentrant)
    handle.remove()
    assert not any("forward" in vars(module) for module in net.modules())
    train(net, one, data(1), non_reentrant)
    assert counters(net) == dict.fromkeys(counters(net), 1 + 2)
    handle.remove()


def test_the_block_of_a_with_statement_ends_it():
    net = Net()
    with update_once(net) as handle:
        assert covers(net.a[1])
    assert not covers(net.a[1])
    with pytest.raises(ZeroDivisionError), update_once(net):
        raise ZeroDivisionError
    assert not covers(net.a[1])
    handle.remove()


def test_a_second_call_doubles_nothing_and_its_handle_removes_nothing():
    net = Net()
    truth = truth_of(net)
    first, second = update_once(net), update_once(net)
    train(net, one, data(2), non_reentrant)
    second.remove()
    train(net, one, data(4)[2:], non_reentrant)
    assert same_statistics(net, truth)
    first.remove()
    assert not covers(net.a[1])


def test_a_second_call_covers_layers_that_are_new_and_its_handle_removes_those():
    net = Net()
    update_once(net)
    net.c = block(nn.BatchNorm2d)
    update_once(net).remove()
    assert covers(net.a[1])
    assert not covers(net.c[1])


def test_a_spent_handle_does_not_take_off_what_a_later_call_has_put_on():
    net = Net()
    spent = update_once(net)
    spent.remove()
    update_once(net)
    spent.remove()
    assert covers(net.a[1])


def test_a_handle_leaves_a_forward_alone_that_was_put_on_after_restore():
    layer = nn.BatchNorm2d(3)
    handle = update_once(layer)
    layer = restore(layer)
    layer.forward = own = lambda x: x
    handle.remove()
    assert layer.forward is own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_model_and_handle_are_copied_together(copied):
    net = Net()
    handle = update_once(net)
    other, handle_of_other = copied((net, handle))
    truth = truth_of(other)
    handle.remove()
    assert not covers(net.a[1])
    assert same_statistics(train(other, one, data(), non_reentrant), truth)
    handle_of_other.remove()
    assert not covers(other.a[1])


def test_a_copy_trains_itself_and_not_the_original():
    net = Net()
    update_once(net)
    other = copy.deepcopy(net)
    train(other, one, data(), non_reentrant)
    assert counters(net) == dict.fromkeys(counters(net), 0)
    assert counters(other) == dict.fromkeys(counters(other), 4)


def test_the_handle_counts_the_layers_that_it_is_on():
    net = Net()
    handle = update_once(net)
    assert (len(handle), repr(handle)) == (3, "<update_once on 3 layers>")
    assert repr(update_once(net)) == "<update_once on 0 layers>"
    del net.a[1].forward
    assert repr(handle) == "<update_once on 2 layers>"
    net.b[1] = nn.BatchNorm2d(3)
    assert repr(handle) == "<update_once on 1 layers>"
    nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert repr(handle) == "<update_once on 0 layers>"
    again = update_once(net)
    assert (len(again), len(handle)) == (3, 0)
    again.remove()
    assert repr(again) == "<update_once on 0 layers>"


def test_the_handle_of_a_model_that_is_one_layer_counts_it():
    assert len(update_once(nn.BatchNorm1d(3))) == 1


def test_deleting_forward_by_hand_takes_it_off_too():
    net = Net()
    handle = update_once(net)
    del net.a[1].forward
    handle.remove()
    train(net, one, data(1), non_reentrant)
    assert net.a[1].num_batches_tracked == 2


def test_lazy_layers_are_covered_from_their_first_batch_on():
    nets = recipes.seeded_pair(recipes.lazy)
    update_once(nets[0])
    for net, ckpt in zip(nets, (reentrant, plainly), strict=True):
        train(net, one, data(), ckpt)
    assert same_statistics(*nets)
    assert type(nets[0].a[1]) is nn.BatchNorm2d


def test_layers_made_anew_by_convert_sync_batchnorm_are_covered_by_a_second_call():
    net = Net()
    truth = truth_of(net)
    update_once(net)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert not covers(net.a[1])
    update_once(net)
    assert same_statistics(train(net, one, data(), non_reentrant), truth)


def test_the_way_out_for_a_new_batch_within_a_backward_hook():
    def with_the_way_out(net, x, ckpt):
        def new_batch(gradient):
            net.handle.remove()
            net(x.detach() + 1)
            net.handle = update_once(net)
            return gradient * 0 + 1

        y = ckpt(net, x.requires_grad_())
        y.register_hook(new_batch)
        y.sum().backward()

    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, step, ckpt in zip(
        nets, (with_the_way_out, recipes.forward_in_a_backward_hook), (non_reentrant, plainly), strict=True
    ):
        if ckpt is not plainly:
            net.handle = update_once(net)
        train(net, step, data(), ckpt)
    assert same_statistics(*nets)
    assert counters(nets[0]) == dict.fromkeys(counters(nets[0]), 8)


# Refusals: everything is checked, then changed.


@pytest.mark.parametrize("change", [correct, lambda net: correct(net, {"b": 3})])
def test_a_corrected_layer_is_refused_by_name_until_it_is_restored(change):
    net = change(Net())
    name = "b.1" if net.a[1].momentum == 0.1 else "a.1"
    with pytest.raises(ValueError, match=rf"layer '{name}' has a corrected momentum \(0\.0.*restore\(model\)"):
        update_once(net)
    assert not any("forward" in vars(module) for module in net.modules())
    update_once(restore(net))


def test_a_calibrated_layer_is_refused():
    net = Net()
    with calibrate(net):
        train(net, one, data(1), non_reentrant)
    with pytest.raises(ValueError, match=r"layer 'a\.1' has a corrected momentum"):
        update_once(net)


def test_correct_and_calibrate_refuse_a_covered_layer_by_name_and_change_nothing():
    net = nn.ModuleDict({"free": nn.BatchNorm1d(2), "covered": nn.BatchNorm1d(2)})
    handle = update_once(net["covered"])
    with pytest.raises(ValueError, match=r"layer 'covered' .* update_once, .* restore.model., or remove\(\)"):
        correct(net)
    with pytest.raises(ValueError, match=r"layer 'covered' .* update_once"), calibrate(net):
        pass
    assert net["free"].momentum == net["covered"].momentum == 0.1
    assert correct(net, 1)["covered"].momentum == correct(net, {"free": 2})["covered"].momentum == 0.1
    restore(net)
    handle.remove()
    assert correct(net)["covered"].momentum < 0.1


def test_a_momentum_that_needs_no_correction_does_not_stand_in_the_way():
    net = correct(Net(norm=functools.partial(nn.BatchNorm2d, momentum=None)))
    correct(net, 1)
    update_once(net)


def test_a_forward_of_somebody_else_is_refused_and_named():
    net = Net()
    net.b[1].forward = net.b[1].forward
    with pytest.raises(ValueError, match=r"layer 'b\.1' has a forward of its own"):
        update_once(net)
    assert "forward" not in vars(net.a[1])


def test_remove_refuses_while_somebody_else_wraps_the_forward():
    net = Net()
    handle = update_once(net)
    inner = net.b[1].forward
    net.b[1].forward = lambda x: inner(x)
    with pytest.raises(ValueError, match=r"layer 'b\.1' has a forward of its own"):
        handle.remove()
    assert covers(net.a[1])
    net.b[1].forward = inner
    handle.remove()
    assert not covers(net.b[1])


# Real networks.


@pytest.mark.parametrize("norm", ["batch", ("instance", {"track_running_stats": True})])
def test_monai_checkpoint_unet_has_the_statistics_of_its_uncheckpointed_twin(norm):
    nets = pytest.importorskip("monai.networks.nets.unet")
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "channels": (2, 4, 4, 4), "strides": (2, 2, 2)}
    torch.manual_seed(0)
    truth = nets.UNet(norm=norm, num_res_units=1, **arguments)
    torch.manual_seed(0)
    mine = nets.CheckpointUNet(norm=norm, num_res_units=1, **arguments)
    uncorrected = copy.deepcopy(mine)
    update_once(mine)

    def step(model, x, _):
        model(x.clone().requires_grad_()).square().sum().backward()

    for model in (truth, mine, uncorrected):
        train(model, step, batches(3, 2, 1, 16, 16, 16), plainly)
    true = list(statistics(truth).values())
    assert all(torch.equal(a, b) for a, b in zip(statistics(mine).values(), true, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(statistics(uncorrected).values(), true, strict=True))
    if norm == "batch":
        assert set(counters(mine).values()) == {3}
        assert len(set(counters(uncorrected).values())) > 2


def test_a_layer_that_was_built_with_the_corrected_momentum_is_refused_until_it_is_restored():
    net = Net(norm_layer("BatchNorm2d"))
    truth = truth_of(restore(copy.deepcopy(net)))
    with pytest.raises(ValueError, match=r"layer 'a\.1' has a corrected momentum \(0\.0513167 for 0\.1\)"):
        update_once(net)
    update_once(restore(net))
    assert same_statistics(train(net, one, data(), non_reentrant), truth)


def test_a_root_written_by_hand_is_refused_with_the_number_to_set():
    net = Net(functools.partial(nn.BatchNorm2d, momentum=1 - 0.9**0.5))
    with pytest.raises(ValueError, match=r"set the layer's momentum to 0\.1"):
        update_once(net)
    assert not any(covers(module) for module in net.modules())


# Compiled code.


def compiled(net, **options):
    return torch.compile(net, backend="aot_eager", **options)


def test_there_is_no_graph_break_and_one_operator_a_layer():
    net = Net()
    update_once(net)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(net, backend=backend, fullgraph=True)(data(1)[0])
    asked = [node for node in graphs[0].graph.nodes if "momentum_fix.recomputing" in str(node.target)]
    assert (len(graphs), len(asked)) == (1, 3)


def test_in_evaluation_mode_the_compiled_code_is_what_it_was():
    net = Net().eval()
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op != "placeholder"])
        return graph

    for prepare in (lambda: None, lambda: update_once(net)):
        torch.compiler.reset()
        prepare()
        torch.compile(net, backend=backend, fullgraph=True)(data(1)[0])
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, instance_norm])
@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_code_compiled_before_notices_that_it_is_put_on_and_taken_off(ckpt, norm):
    net = Net(norm)
    run = compiled(net)

    def step(net, x, by):
        by(run, x.requires_grad_()).sum().backward()

    start = copy.deepcopy(net.state_dict())
    train(net, step, data(2), ckpt)  # compiled without it
    twice = statistics(net)
    for handle in (update_once(net), None):
        net.load_state_dict(start)
        train(net, step, data(2), ckpt)
        if handle:
            once = statistics(net)
            handle.remove()
    truth = Net(norm)
    truth.load_state_dict(start)
    train(truth, one, data(2), plainly)
    assert all(torch.equal(once[name], value) for name, value in statistics(truth).items())
    assert all(torch.equal(statistics(net)[name], value) for name, value in twice.items())
    assert not all(torch.equal(once[name], twice[name]) for name in once)


def test_compiled_code_follows_a_momentum_schedule_and_the_mode():
    nets = [Net()]
    nets.append(copy.deepcopy(nets[0]))
    update_once(nets[0])
    for net, ckpt in zip(nets, (non_reentrant, plainly), strict=True):
        run = compiled(net) if ckpt is non_reentrant else net
        for i, x in enumerate(data(6)):
            for layer in recipes.norms(net):
                layer.momentum = (0.1, 0.3, 0.02)[i // 2]
            net.train(i != 3)
            ckpt(run, x.clone().requires_grad_())
            if i != 3:
                ckpt(run, x.clone().requires_grad_()).sum().backward()
    assert same_statistics(*nets)
    assert counters(nets[0])["a.1.num_batches_tracked"] == 10


class Broken(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y + 0


class InPlace(nn.BatchNorm2d):
    def forward(self, x):
        mean = x.mean((0, 2, 3))
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.num_batches_tracked.add_(1)
        return x - mean[:, None, None]


@own_class
@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("norm", [Broken, InPlace, OwnForward])
def test_compiled_layers_of_ones_own_are_right_in_one_graph_or_in_several(norm, ckpt):
    net = Net(norm)
    truth = truth_of(net)
    uncovered = copy.deepcopy(net)
    update_once(net)
    for model in (net, uncovered):
        run = compiled(model, fullgraph=norm is not Broken)
        train(model, lambda _, x, by, run=run: by(run, x.requires_grad_()).sum().backward(), data(), ckpt)
    assert same_statistics(net, truth)
    stopped_before_it_assigns = norm is OwnForward and ckpt is non_reentrant  # by early stop, in the compiled graph
    assert (deviation(uncovered, truth) > 1e-3) != stopped_before_it_assigns


@pytest.mark.parametrize("ckpt", [plainly, reentrant, non_reentrant])
def test_a_cumulative_average_is_right_in_compiled_code(ckpt):
    net = Net(recipes.cumulative)
    truth = truth_of(net)
    update_once(net)
    run = compiled(net)
    train(net, lambda _, x, by: by(run, x.requires_grad_()).sum().backward(), data(), ckpt)
    assert same_statistics(net, truth)


def test_a_backward_pass_that_is_compiled_itself_is_one():
    net = block(nn.BatchNorm2d)
    truth, uncovered = copy.deepcopy(net), copy.deepcopy(net)
    update_once(net)
    x = data(1)[0].requires_grad_()
    plainly(truth, x).sum().backward()
    for model in (net, uncovered):
        loss = non_reentrant(model, x).sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
    assert same_statistics(net, truth)
    assert deviation(uncovered, truth) > 1e-3


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_training_graph_moves_the_statistics(strict):
    net = Net()
    truth = truth_of(net, lambda net, x, _: net(x).sum().backward(), 1)
    update_once(net)
    exported = torch.export.export(net, tuple(data(1)), strict=strict)
    assert ("momentum_fix" in str(exported.graph)) is strict  # else it needs nothing of this package
    module = exported.module()
    module(*data(1))
    assert {name: int(b) for name, b in module.named_buffers() if "num_batches" in name} == counters(truth)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_scripting_a_covered_model_fails_loudly():
    net = nn.Sequential(nn.BatchNorm1d(2))
    handle = update_once(net)
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(net)
    handle.remove()


def test_cuda_graphs_leave_the_decision_to_run_time():
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    assert tag is None or tag in torch.ops.momentum_fix.recomputing.default.tags


# On GPUs; test_conformance has more.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_block_compiled_with_cuda_graphs_is_right():
    torch.set_default_dtype(torch.float32)
    net = Net().cuda()
    truth, uncovered = copy.deepcopy(net), copy.deepcopy(net)
    update_once(net)
    for x in [x.cuda().requires_grad_() for x in data(6)]:
        plainly(truth, x).sum().backward()
        for model in (net, uncovered):
            non_reentrant(torch.compile(model, mode="reduce-overhead"), x).sum().backward()
    assert counters(net) == counters(truth)
    assert deviation(net, truth) < 1e-5
    assert deviation(uncovered, truth) > 1e-3


def _synchronized(rank, file):
    torch.cuda.set_device(rank)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("nccl", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net()).cuda()
    truth, uncovered = copy.deepcopy(net), copy.deepcopy(net)
    update_once(net)
    mine = [x.cuda() for x in data(seed=rank)]
    for model, ckpt in ((truth, plainly), (net, non_reentrant), (uncovered, non_reentrant)):
        train(model, one, [x.clone() for x in mine], ckpt)
    assert same_statistics(net, truth)
    assert deviation(uncovered, truth) > 1e-3
    dist.destroy_process_group()


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs: SyncBatchNorm takes no CPU input in two ranks"
)
def test_sync_batch_norm_on_two_ranks_is_right(tmp_path):
    mp.spawn(_synchronized, args=(tmp_path / "rendezvous",), nprocs=2)


class CountsInputs(nn.BatchNorm1d):
    """Inherits a forward that is known, and has a buffer of its own, which is written to there."""

    def __init__(self, features):
        super().__init__(features)
        self.register_buffer("seen", torch.zeros(()))

    def _check_input_dim(self, x):
        super()._check_input_dim(x)
        self.seen += 1


@pytest.mark.parametrize("engine", [non_reentrant, reentrant])
def test_a_class_that_inherits_a_forward_keeps_its_other_buffers_in_recomputations(engine):
    found = []
    for ckpt, prepare in ((plainly, lambda _: None), (engine, update_once), (engine, lambda _: None)):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 4), CountsInputs(4), nn.Tanh()), torch.rand(8, 4).requires_grad_()
        prepare(model)
        ckpt(model, x).square().sum().backward()
        found.append((x.grad, model[1].seen, model[1].running_var))
    true, mine, wrong = found
    assert all(map(torch.equal, mine, true))
    assert not torch.equal(wrong[1], true[1])
    assert not torch.equal(wrong[2], true[2])
