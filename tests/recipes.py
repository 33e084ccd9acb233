"""Ways to recompute: a network of three blocks, and training steps that run it, each in a way of its own.

A step is `step(net, x, ckpt)`: forward and backward for one batch, with the checkpoint function `ckpt`. The truth is
the same step with `plainly` instead of a checkpoint. What trains with it and compares runs is in twins.py.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from momentum_fix import preserve_state
from twins import batches, by_context, drop_in, non_reentrant, plainly, reentrant

ENGINES = {"reentrant": reentrant, "non-reentrant": non_reentrant}
WRAPPER_OPTIONS = {
    by_context: {"context_fn": preserve_state},
    drop_in: {"checkpoint_fn": drop_in},
}  # of torch's wrapper
TINY_CONFORMER = {  # of a Wav2Vec2ConformerConfig
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "conv_depthwise_kernel_size": 5,
}
MIDWAY = 3  # batches after which some runs change something


class Kink(nn.Module):
    """Something that backward needs, so that a recomputation does not stop early before it."""

    def forward(self, x):
        return x.tanh() + x / 2


def block(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm(3), Kink())


class Net(nn.Module):
    """Three blocks in a row: a step says how they are run, or `ckpt` does, one checkpoint within another."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.a, self.b, self.c = block(norm), block(norm), block(norm)
        self.seen = 0  # batches that it was trained on, if whoever trains it counts them
        self.ckpt = plainly

    def forward(self, x):
        return self.ckpt(lambda y: self.c(self.ckpt(self.b, self.a(y))), x)


def seeded_pair(norm):
    """Give two equal Nets, for layers that cannot be copied before their first batch."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(Net(norm))
    return nets


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


def data(count=4, seed=1):
    """Give batches that a Net takes."""
    return batches(count, 4, 3, 4, 4, seed=seed)


def same(k):
    """Give k passes for each norm of a Net."""
    return {"a.1": k, "b.1": k, "c.1": k}


# Norm layers, as functions of the number of channels.


def instance_norm(channels):
    return nn.InstanceNorm2d(channels, track_running_stats=True)


def lazy(_):
    return nn.LazyBatchNorm2d()


def cumulative(channels):
    return nn.BatchNorm2d(channels, momentum=None)


class Uncounted(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.num_batches_tracked = None


class Stubborn(nn.BatchNorm2d):
    """A layer whose momentum cannot be set after it is built."""

    def __setattr__(self, name, value):
        if name == "momentum" and name in vars(self):
            raise AttributeError("momentum is fixed")
        super().__setattr__(name, value)


class OwnForward(nn.BatchNorm2d):
    """A user's class that assigns new buffers instead of writing to the old ones."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running_mean = torch.lerp(self.running_mean, mean.detach(), self.momentum)
        self.running_var = torch.lerp(self.running_var, variance.detach(), self.momentum)
        self.num_batches_tracked = self.num_batches_tracked + 1
        return (x - mean[:, None, None]) / (variance[:, None, None] + self.eps).sqrt()


# One checkpoint, several, or one within another.


def one(net, x, ckpt):
    ckpt(net, x.requires_grad_()).sum().backward()


def inside_the_model(net, x, ckpt):
    getattr(net, "module", net).ckpt = ckpt
    net(x).sum().backward()


def each_its_own(net, x, ckpt):
    ckpt(net.c, ckpt(net.b, net.a(x.requires_grad_()))).sum().backward()


def nested(net, x, ckpt):
    ckpt(lambda y: net.c(ckpt(net.b, net.a(y))), x.requires_grad_()).sum().backward()


def nested_directly(net, x, ckpt):
    ckpt(lambda y: ckpt(net, y), x.requires_grad_()).sum().backward()


def never_stopping_early(net, x, ckpt):
    with set_checkpoint_early_stop(False):
        nested_directly(net, x, ckpt)


def debugging(net, x, ckpt):
    one(net, x, functools.partial(ckpt, debug=True))


def sequential(use_reentrant):
    def step(net, x, ckpt):
        x.requires_grad_()
        blocks = [net.a, net.b, net.c]
        y = net(x) if ckpt is plainly else checkpoint_sequential(blocks, 3, x, use_reentrant=use_reentrant)
        y.sum().backward()

    return step


def wrapped(net, x, ckpt):
    x.requires_grad_()
    for part in (net.a, net.b, net.c):
        options = WRAPPER_OPTIONS.get(ckpt, {})
        x = part(x) if ckpt is plainly else checkpoint_wrapper(part, CheckpointImpl.NO_REENTRANT, **options)(x)
    x.sum().backward()


def frozen(net, x, ckpt):
    net.a.requires_grad_(False)
    ckpt(net.c, ckpt(net.b, ckpt(net.a, x))).sum().backward()


def ending_in_a_norm(net, x, ckpt):
    ckpt(lambda y: net.c[1](net.b(net.a(y))), x.requires_grad_()).sum().backward()


class HandWritten(torch.autograd.Function):
    """Recomputation as a memory-saving layer writes it for itself."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


def hand_written(function, x):
    return HandWritten.apply(function, x)


def selecting(policy_for_norms):
    """Give a `context_fn` that saves or recomputes what norms give, and recomputes everything else."""
    operations = {torch.ops.aten.native_batch_norm.default, torch.ops.aten.cudnn_batch_norm.default}

    def policy(_, operation, *args, **kwargs):
        return policy_for_norms if operation in operations else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


def selective(policy_for_norms):
    context = selecting(policy_for_norms)
    return lambda net, x, ckpt: one(net, x, functools.partial(ckpt, context_fn=context))


def compiled_whole(backend):
    def step(net, x, ckpt):
        forward = torch.compile(lambda y: ckpt(net, y), backend=backend, fullgraph=True)
        forward(x.requires_grad_()).sum().backward()

    return step


def compiled_block(backend):
    def step(net, x, ckpt):
        ckpt(torch.compile(net, backend=backend, fullgraph=True), x.requires_grad_()).sum().backward()

    return step


def compiled_block_inside(**options):
    def step(net, x, ckpt):
        inner = torch.compile(net.b, backend="aot_eager", **options)
        ckpt(lambda y: ckpt(inner, net.a(y)).tanh(), x.requires_grad_()).sum().backward()

    return step


# Other backward passes than one.


def two_backwards(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def backward_in_another_thread(net, x, ckpt):
    """Do as autograd does on a GPU."""
    left, right = (ckpt(net, half) for half in x.requires_grad_().chunk(2))
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit((left - right).square().sum().backward).result()


def gradient_penalty(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()


def autograd_grad(net, x, ckpt):
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(ckpt(net, x.requires_grad_()).sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def accumulating(step):
    def accumulation(net, x, ckpt):
        for micro in x.split(2):
            step(net, micro.detach(), ckpt)

    return accumulation


def forward_in_a_backward_hook(net, x, ckpt):
    y = ckpt(net, x.requires_grad_())
    y.register_hook(lambda _: net(x.detach() + 1) * 0 + 1)
    y.sum().backward()


def saved_tensors_read_by_hand(net, x, ckpt):
    y = ckpt(net, x.requires_grad_()).sin()
    _ = y.grad_fn._saved_self  # of sin, whose input the checkpoint made: nothing is recomputed for this
    if ckpt is not plainly:
        _ = y.grad_fn.next_functions[0][0].next_functions[0][0]._saved_result
    y.sum().backward()


# The passes of a batch do not follow one another, or their number varies.


def siamese(net, x, ckpt):
    left, right = x.requires_grad_().chunk(2)
    (ckpt(net, left) - ckpt(net, right)).square().sum().backward()


def pipeline(net, x, ckpt):
    losses = [ckpt(net, micro).sum() for micro in x.requires_grad_().chunk(2)]
    for loss in losses:
        loss.backward(retain_graph=True)


def twice_in_a_region(net, x, ckpt):
    ckpt(lambda y: net(net(y)), x.requires_grad_()).sum().backward()


def once_inside_once_outside(net, x, ckpt):
    ckpt(net, net(x.requires_grad_())).sum().backward()


def forward_only(net, x, ckpt):
    one(net, x, ckpt)
    ckpt(net, x.detach().requires_grad_() + 1)


def forward_only_no_grad(net, x, ckpt):
    one(net, x, ckpt)
    with torch.no_grad():
        ckpt(net, x.detach() + 1)


def switched_off_midway(net, x, ckpt):
    one(net, x, ckpt if net.seen < MIDWAY else plainly)


def evaluated_in_between(net, x, ckpt):
    one(net, x, ckpt)
    net.eval()
    ckpt(net, x.detach().requires_grad_())  # without backward: in evaluation mode gradients do depend on the statistics
    net.train()


class StoppedError(Exception):
    """Raised on purpose."""


def failing_forward(net, x, ckpt):
    def fails(y):
        net.a(y)
        raise StoppedError

    with contextlib.suppress(StoppedError):
        ckpt(fails, 2 * x.detach().requires_grad_())
    one(net, x, ckpt)


def failing_recomputation(net, x, ckpt):
    runs = []

    def fails_in_the_recomputation(y):
        runs.append(y)
        y = net.a(y)
        if len(runs) > 1:
            raise StoppedError
        return net.c(net.b(y))

    with contextlib.suppress(StoppedError):
        loss = ckpt(fails_in_the_recomputation, 2 * x.detach().requires_grad_()).sum()
        if ckpt is not plainly:
            loss.backward()
    net.zero_grad()
    one(net, x.detach(), ckpt)


# What may become of a model midway: a function of it that gives the one to train on.


def converted(net):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def pickled(net):
    return pickle.loads(pickle.dumps(net))


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def rescheduled(net):
    for layer in norms(net):
        layer.momentum = 0.02
    return net
