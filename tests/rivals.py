"""What people write by hand about it, each as strong as we could make it without writing a library."""

import itertools

import torch
from torch.utils._python_dispatch import _disable_current_modes as unseen  # by selective checkpointing

from recipes import norms
from twins import plainly


def recomputing():
    """Tell whether a backward pass is running; code that is being compiled cannot ask."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def copies(layer):
    return {name: buffer.clone() for name, buffer in layer._buffers.items() if buffer is not None}


def copy_back(layer, saved):
    for name, value in saved.items():
        layer._buffers[name].data.copy_(value)


def hook(net, before, after):
    """Put two hooks on each norm; the second also runs where a checkpoint ends its recomputation within the layer."""
    for layer in norms(net):
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after, always_call=True)


def save(layer, _):
    if recomputing():
        with unseen():
            layer.saved = copies(layer)


def put_back(layer, *_):
    if recomputing():
        with unseen():
            copy_back(layer, layer.saved)


def flag(net):
    """The thread's flag: in a backward pass, save the statistics before the layer and copy them back after it."""
    hook(net, save, put_back)


def lay_stand_ins(layer, _):
    if recomputing() and layer.training:
        if not hasattr(layer, "spare"):
            with unseen():
                layer.spare = copies(layer)
        layer.own, layer._buffers = layer._buffers, layer.spare


def take_stand_ins_away(layer, *_):
    if recomputing() and layer.training:
        layer._buffers = layer.own


def stand_ins(net):
    """The layer gets other buffers before a recomputation, the same ones each time, and its own ones after it."""
    hook(net, lay_stand_ins, take_stand_ins_away)


def track_with_gradients(layer, _):
    layer.track_running_stats = torch.is_grad_enabled()


def track_always(layer, *_):
    layer.track_running_stats = True


def only_in_backward(net):
    """Statistics are tracked where gradients are: of a reentrant checkpoint, in the recomputation alone."""
    hook(net, track_with_gradients, track_always)


def around_the_region(net, ckpt):
    """Give a checkpoint function that saves the model's statistics before each run but the first, and puts them back.

    It needs no flag, but the call of the checkpoint has to be one's own.
    """

    def checkpoint(function, *args, **kwargs):
        runs = itertools.count()

        def region(*args):
            if next(runs) == 0:
                return function(*args)
            with unseen():
                saved = {layer: copies(layer) for layer in norms(net)}
            try:
                return function(*args)
            finally:
                with unseen():
                    for layer, its_own in saved.items():
                        copy_back(layer, its_own)

        return ckpt(function if torch.compiler.is_compiling() else region, *args, **kwargs)

    return ckpt if ckpt is plainly else checkpoint
