"""The way into torch's checkpoint and modules: be told of each call, each recomputation, each module that runs.

Two places lead into the checkpoint in torch 2.9 to 2.15, however it was imported and whoever calls it: the class of
which the non-reentrant engine makes an object for each call, and the forward pass of the reentrant engine. Both are
private. So they are changed only while somebody listens, and what they tell is checked first, with a checkpoint of our
own.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torchs_module
from torch.utils import checkpoint as torchs


@dataclass
class Call:
    """A call of torch's checkpoint."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reentrant: bool
    keeps_random_numbers: bool  # `preserve_rng_state`
    gradients: bool = True  # whether they are on
    in_compilation: bool = (
        False  # torch is compiling it with its model, and runs it once for that; it will not be seen again
    )


class Listener:
    """What hears of one call."""

    __slots__ = ()

    def forward(self) -> AbstractContextManager[Any]:
        """Give what to enter around the forward pass."""
        return nullcontext()

    def recomputation(self) -> AbstractContextManager[Any]:
        """Give what to enter around each recomputation, outside of the contexts of a `context_fn`."""
        return nullcontext()

    def saved(self, tensor: torch.Tensor) -> Any:
        """Describe a tensor that autograd saves, or that is recomputed for it. Of the non-reentrant engine."""

    def compare(self, forward: Any, recomputed: Any) -> None:
        """Hear the descriptions of a saved tensor and of the recomputed one."""

    def reused(self) -> None:
        """Hear that a gradient is computed by the graph of a recomputation itself. Of the non-reentrant engine."""

    def given(self, args: tuple[Any, ...]) -> None:
        """Hear what the function is given, in each recomputation; by the reentrant engine, in the forward pass too."""

    def returned(self, output: Any) -> None:
        """Hear what the function gave, in the forward pass and each recomputation. Of the reentrant engine."""


Begin: TypeAlias = Callable[[Call], Listener | None]
_lock = threading.RLock()
_beginnings: list[Begin] = []  # the outermost first
_present: dict[tuple[Any, str], Any] = {}  # what stood in each place before we came; None: nothing
_hearing_hooks: list[Callable[[torch.Tensor], None]] = []
_hearing_functions: list[Callable[[], None]] = []


class _ThisThread(threading.local):
    gradients = True  # whether they were on when the reentrant engine was called


_this_thread = _ThisThread()


def listen(begin: Begin, *, outermost: bool = False) -> Callable[[], None]:
    """Have `begin` give a listener for each call of torch's checkpoint, in any thread; return what ends that.

    Raises:
        RuntimeError: this torch's checkpoint is not built as this module knows it.
    """
    _check()
    return _begin(begin, outermost)


def _begin(begin: Begin, outermost: bool) -> Callable[[], None]:
    with _lock:
        _beginnings.insert(0 if outermost else len(_beginnings), begin)
        for (owner, name), ours in _places().items():
            if vars(owner).get(name) is not ours:
                _present[owner, name] = vars(owner).get(name)
                setattr(owner, name, ours)

    def stop() -> None:
        with _lock:
            _beginnings.remove(begin)
            if not _beginnings:
                for (owner, name), theirs in _present.items():
                    if vars(owner).get(name) is _places()[owner, name]:  # and not what somebody has put there since
                        delattr(owner, name) if theirs is None else setattr(owner, name, theirs)

    return stop


def _listeners(call: Call) -> list[Listener]:
    from torch._guards import TracingContext

    call.in_compilation = TracingContext.try_get() is not None
    return [listener for begin in dict.fromkeys(_beginnings) if (listener := begin(call)) is not None]


@functools.cache
def _places() -> dict[tuple[Any, str], Any]:
    """Give where torch is changed while somebody listens, and what is put there."""
    torchs_frame, torchs_hook, function = torchs._CheckpointFrame, torchs._checkpoint_hook, torchs.CheckpointFunction
    torchs_recomputation = torchs._recomputation_hook
    torchs_forward = function.forward
    node = torch.autograd.function.BackwardCFunction

    class Frame(torchs_frame):  # type: ignore[misc, valid-type]
        """A call of the non-reentrant engine."""

        def __init__(self, recompute_fn: Any, early_stop: Any, unpack_error_cb: Any, metadata_fn: Any) -> None:
            # The functions below hold the list and not the frame, which holds them.
            self.listeners = listeners = list[Listener]()

            def recompute(*args: Any) -> None:
                with _entered(each.recomputation() for each in listeners):
                    for each in listeners:
                        each.given(args)
                    recompute_fn(*args)

            def describe(tensor: torch.Tensor) -> Any:
                return _described(tensor, metadata_fn, listeners)

            super().__init__(recompute, early_stop, unpack_error_cb, describe)

    class ForwardHook(torchs_hook):  # type: ignore[misc, valid-type]
        """What torch enters around the forward pass of the non-reentrant engine, if gradients are on."""

        def __init__(self, frame: Any) -> None:
            super().__init__(frame)
            call = checkpoint_in_the_making()
            names = ("fn", "args", "kwargs", "preserve_rng_state")
            fn, args, kwargs, keeps = (call[name] for name in names)
            self.listeners = frame.listeners
            self.listeners += _listeners(Call(fn, args, kwargs, False, keeps))
            self.contexts = _entered(each.forward() for each in self.listeners)

        def __enter__(self) -> None:
            self.contexts.__enter__()
            super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            self.contexts.__exit__(*error)

    class RecomputationHook(torchs_recomputation):  # type: ignore[misc, valid-type]
        """What torch enters around each recomputation of the non-reentrant engine."""

        unpack_hook: Any

        def __init__(self, frame: Any, *others: Any) -> None:
            super().__init__(frame, *others)
            unpack, listeners = self.unpack_hook, getattr(frame(), "listeners", ())

            def unpacked(saved: Any) -> Any:
                for each in listeners:
                    each.reused()
                return unpack(saved)

            self.unpack_hook = unpacked

    def apply(cls: Any, *args: Any) -> Any:
        _this_thread.gradients = torch.is_grad_enabled()  # in `forward` they are always off
        return super(function, cls).apply(*args)

    def forward(ctx: Any, run_function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        listeners = _listeners(Call(run_function, args, {}, True, preserve_rng_state, _this_thread.gradients))
        forwards: Iterator[Any] = iter([[each.forward() for each in listeners]])  # what runs again is a recomputation

        def run(*args: Any) -> Any:
            with _entered(next(forwards, ()) or (each.recomputation() for each in listeners)):
                for each in listeners:
                    each.given(args)
                output = called(run_function, args)
            for each in listeners:
                each.returned(output)
            return output

        return torchs_forward(ctx, run if listeners else run_function, preserve_rng_state, *args)  # type: ignore[no-untyped-call]

    def made(of_function: Any) -> None:
        room = getattr(type(of_function), "_forward_cls", nn.Module).__module__
        is_own = not room.startswith("torch.") or room.startswith("torch._library.")  # of operators of a user's
        if is_own and torch.is_grad_enabled():
            for hear in _hearing_functions:
                hear()

    return {
        (torchs, "_CheckpointFrame"): Frame,
        (torchs, "_checkpoint_hook"): ForwardHook,
        (torchs, "_recomputation_hook"): RecomputationHook,
        (function, "apply"): classmethod(apply),  # of which it has none of its own
        (function, "forward"): staticmethod(forward),
        (node, "__init__"): made,  # `apply` may have been kept under another name, but it makes a node each time
        **{(torch.Tensor, name): _heard(name) for name in ("register_hook", "register_post_accumulate_grad_hook")},
    }


def called(function: Any, args: tuple[Any, ...]) -> Any:
    """Call a function that is checkpointed, which may be an operation of torch's: then this is where it is called."""
    return function(*args)


def _heard(name: str) -> Any:
    """Give a method of tensors that registers a hook, and tells of it first."""

    @functools.wraps(vars(torch.Tensor)[name])
    def register(tensor: torch.Tensor, hook: Any) -> Any:
        looks_on = any(each.f_globals.get("__name__") == "torch.utils.module_tracker" for each in _callers())
        if not (looks_on or _is_made_in(hook, "momentum_fix.")):
            for hear in _hearing_hooks:
                hear(tensor)
        return _present[torch.Tensor, name](tensor, hook)

    return register


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled code saves tensors too
def _described(tensor: torch.Tensor, metadata_fn: Any, listeners: list[Listener]) -> Any:
    theirs = None if metadata_fn is None else metadata_fn(tensor)
    ours = [(each, each.saved(tensor)) for each in listeners if type(each).saved is not Listener.saved]
    return _Description(theirs, ours) if ours else theirs


class _Description:
    """What torch compares of a saved tensor: its own description decides, the listeners hear theirs."""

    def __init__(self, theirs: Any, ours: list[tuple[Listener, Any]]) -> None:
        self.theirs, self.ours = theirs, ours

    def __ne__(self, recomputed: Any) -> bool:
        for (listener, forward), (_, again) in zip(self.ours, recomputed.ours, strict=True):
            listener.compare(forward, again)
        return bool(self.theirs != recomputed.theirs)

    def __repr__(self) -> str:
        return repr(self.theirs)


@contextmanager
def _entered(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


_SEEN = [
    *("noted 3", "applied", "forward", "saved 2 2", "recomputation"),
    *("forward", "returned 4", "recomputation", "returned 4"),
]


@functools.cache
def _check() -> None:
    """Raise if a small checkpoint of either engine is not seen as what it is."""
    seen: list[str] = []

    class Probe(Listener):
        def forward(self) -> AbstractContextManager[Any]:
            seen.append("forward")
            return nullcontext()

        def recomputation(self) -> AbstractContextManager[Any]:
            seen.append("recomputation")
            return nullcontext()

        def saved(self, tensor: torch.Tensor) -> Any:
            return int(tensor)

        def compare(self, forward: Any, recomputed: Any) -> None:
            seen.insert(-1, f"saved {forward} {recomputed}")

        def returned(self, output: Any) -> None:
            seen.append(f"returned {int(output)}")

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x.square()

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.square()

    apply: Any = Own.apply  # before it is heard, as users do
    try:
        stop = _begin(lambda call: Probe() if call.function is probe and call.gradients else None, outermost=True)
        stop_hearing = hear_functions(lambda: seen.append("applied"))
        try:
            with outside_of_modes(), torch.enable_grad():
                with noting_saved(lambda tensor: seen.append(f"noted {int(tensor)}")):
                    torch.full((), 3.0, device="cpu", requires_grad=True).square()
                apply(torch.full((), 1.0, device="cpu", requires_grad=True))
                for reentrant in (False, True):
                    two = torch.full((), 2.0, device="cpu", requires_grad=True)
                    torchs.checkpoint(probe, two, use_reentrant=reentrant).backward()
        finally:
            stop()
            stop_hearing()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        seen.append(f"{type(error).__name__}: {error}")
    if seen != _SEEN:
        raise RuntimeError(
            f"torch {torch.__version__} does not tell of its checkpoints as torch 2.9 to 2.15 do "
            f"({', '.join(seen)}), so diagnose and preserve_everywhere cannot work with it: install a newer "
            "momentum_fix. update_once, calibrate, correct and momentum_fix.checkpoint do not need this"
        )


def checkpoint_in_the_making() -> Mapping[str, Any]:
    """Give the variables of the call of torch's checkpoint that is being made, its function and arguments among them.

    A `context_fn` is called without these, and there is no public way to ask. So they are read where torch has them.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:  # not by `_callers`: a generator costs microseconds, and each checkpoint asks for this
        if frame.f_globals is vars(torchs):
            return frame.f_locals
        frame = frame.f_back
    return {}


def is_called_by_library() -> bool:
    """Tell whether the call of torch's checkpoint that is being made stands in torch or in an installed package."""
    for frame in _callers():
        room, function = frame.f_globals.get("__name__", ""), frame.f_code
        if room.startswith("torch.distributed.") or function.co_name == "checkpoint_sequential":
            return True
        if not room.startswith(("torch.", "momentum_fix.")):
            return "-packages" in function.co_filename  # site-packages, or Debian's dist-packages
    return False


def role_of_saved(tensor: torch.Tensor) -> Literal["read", "unread", "unfilled"]:
    """Tell of a tensor that autograd is saving whether no gradient depends on its values, or these come later.

    torch's batch norm and instance norm save running statistics, in their own memory or repeated, and do not read them
    in training. An LSTM and CTC save their memory to work in, of which some parts are never written, and RReLU its
    slopes before it draws them, if it draws any.
    """
    passed = ("momentum_fix.", "torch._dynamo.", torchs.__name__)
    frame = next((each for each in _callers() if not each.f_globals.get("__name__", "").startswith(passed)), None)
    code, given, unread = frame and frame.f_code, frame.f_locals if frame else {}, False
    if frame is not None and frame.f_globals.get("__name__") == "torch.nn.modules.rnn":
        unread = tensor.dtype == torch.uint8
    elif code is functional.rrelu.__code__ and tensor.data_ptr() != given["input"].data_ptr():
        return "unfilled" if given["training"] else "unread"
    elif code is functional.ctc_loss.__code__:
        unread = tensor.dim() == 3 and tensor.data_ptr() != given["log_probs"].data_ptr()
    elif code in (functional.batch_norm.__code__, functional.instance_norm.__code__):
        statistics = [given[name] for name in ("running_mean", "running_var") if given[name] is not None]
        if code is functional.batch_norm.__code__:
            unread = given["training"] and any(tensor.data_ptr() == each.data_ptr() for each in statistics)
        elif given["use_input_stats"]:
            repeated = [each.repeat(len(given["input"])) for each in statistics]
            unread = any(tensor.shape == each.shape and torch.equal(tensor, each) for each in repeated)
            unread &= not tensor.requires_grad  # as a weight does, which is as large, and may be equal
    return "unread" if unread else "read"


def _callers() -> Iterator[types.FrameType]:
    """Give the frames of Python's that are running, the innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_in_transform() -> bool:
    """Tell whether a transform of torch.func is running, whose tensors have no memory; no, if torch does not tell."""
    peek = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
    return peek() is not None


def allows_saved_hooks() -> bool:
    """Tell whether hooks on saved tensors are allowed here."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def hidden_from_function_modes() -> AbstractContextManager[Any]:
    """Run operations of this package's own, which a TorchFunctionMode of a user's would see and might change."""
    return torch._C.DisableTorchFunction()


def may_be_seed(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor that autograd saves may be a seed, or the offset, that an attention kernel draws from."""
    is_one = tensor.dtype == torch.uint64 or (tensor.dtype == torch.int64 and not tensor.dim())
    return is_one and torch.accelerator.is_available()


def nodes_so_far() -> int:
    """Give the number that the next node of an autograd graph will get in this thread."""
    return torch._C._autograd._get_sequence_nr()


def is_older(tensor: torch.Tensor, number: int) -> bool:
    """Tell whether a tensor is a leaf of autograd's graph, or its node is none that this thread has made since then."""
    return tensor.grad_fn is None or not number <= tensor.grad_fn._sequence_nr() < nodes_so_far()


def hear_hooks(hear: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """While somebody listens, have `hear` called with each tensor that gets a hook; return what ends that."""
    _hearing_hooks.append(hear)
    return functools.partial(_hearing_hooks.remove, hear)


def hear_functions(hear: Callable[[], None]) -> Callable[[], None]:
    """While somebody listens, have `hear` called when a user's autograd.Function is applied; return what ends that.

    A user's operator of torch.library is one too. Where gradients are off, none is heard.
    """
    _hearing_functions.append(hear)
    return functools.partial(_hearing_functions.remove, hear)


@contextmanager
def noting_saved(note: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Have `note` called with each tensor that autograd saves, besides the hooks that are on."""
    pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_versioned, _of_that_version)

    def noted(tensor: torch.Tensor) -> Any:
        note(tensor)
        return pack(tensor)

    with torch.autograd.graph.saved_tensors_hooks(noted, unpack):
        yield


def _versioned(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return tensor, version(tensor)


def _of_that_version(saved: tuple[torch.Tensor, int]) -> torch.Tensor:
    """Refuse what was written to since it was saved, as autograd does where no hooks are on."""
    tensor, then = saved
    if version(tensor) != then:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(tensor.shape)} is at version {version(tensor)}, and was saved at version {then}"
        )
    return tensor


# Modules.

Enter: TypeAlias = Callable[[nn.Module, Any], None]
_entering: dict[Enter, int] = {}  # with the number of those who want it


def hear_entering(enter: Enter, wanted: int) -> None:
    """Have `enter` called with each module that is called and its inputs, in any thread, if anybody still wants it."""
    with _lock:
        _entering[enter] = _entering.get(enter, 0) + wanted
        if not _entering[enter]:
            del _entering[enter]
        handle = _entering_handle()  # always under the same number: compiled code is compiled again for another one
        if _entering:
            handle.hooks_dict_ref()[handle.id] = _on_entering
        else:
            handle.remove()


def is_heard(enter: Enter) -> bool:
    """Tell whether `enter` is called with each module that is called."""
    return enter in _entering


@functools.cache
def _entering_handle() -> Any:
    return torchs_module.register_module_forward_pre_hook(_on_entering)


def _on_entering(module: nn.Module, args: Any) -> None:
    if not (torch.compiler.is_compiling() or torch._C._is_tracing() or is_in_transform()):
        for enter in tuple(_entering):
            enter(module, args)


def hear_leaving(leave: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Have `leave` called with each module that is left, by an exception too; return what ends that."""
    handle = torchs_module.register_module_forward_hook(_Leaving(leave), always_call=True)
    return handle.remove


class _Leaving:
    """A hook that is known as one of this package."""

    def __init__(self, leave: Callable[[nn.Module], None]) -> None:
        self.leave = leave

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if not (torch.compiler.is_compiling() or is_in_transform()):
            self.leave(module)


_blocks = itertools.count()


@contextmanager
def no_warning_of_hooks() -> Iterator[None]:
    """Leave out what torch says of global hooks and compiled modules: ours only look. Other filters may come and go."""
    words = r"Using `torch.compile\(module\)` when there are global hooks"
    warnings.filterwarnings("ignore", rf"{words}(?#{next(_blocks)})")  # equal to no other filter
    ours = warnings.filters[0]
    try:
        yield
    finally:
        if ours in warnings.filters:
            warnings.filters.remove(ours)  # type: ignore[attr-defined]


def others_hear_modules() -> bool:
    """Tell whether somebody else has a global hook on, which may do anything with a module."""
    hooks = (torchs_module._global_forward_pre_hooks, torchs_module._global_forward_hooks)
    return any(hook is not _on_entering and type(hook) is not _Leaving for each in hooks for hook in each.values())


def has_backward_hooks(module: nn.Module) -> bool:
    """Tell whether hooks of a user's run in a module's backward pass: its own, its parameters', or those of all."""
    places: list[Any] = [torchs_module._global_backward_hooks, torchs_module._global_backward_pre_hooks]
    places += [module._backward_hooks, module._backward_pre_hooks]
    with hidden_from_function_modes():
        for each in module._parameters.values():
            places += [] if each is None else [each._backward_hooks, each._post_accumulate_grad_hooks]
    return any(not _is_made_in(hook, "momentum_fix.") for each in places if each for hook in each.values())


def has_saved_hooks() -> bool:
    """Tell whether hooks on saved tensors are on that are none of torch's, as those of save_on_cpu are."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and not _is_made_in(hooks[1], "torch.", "momentum_fix.")


def _is_made_in(hook: Any, *packages: str) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(packages)


# Recomputations, and modes.


@functools.cache
def _module_tracker() -> Any:
    from torch.utils.module_tracker import ModuleTracker

    return ModuleTracker()


def is_in_backward() -> bool:
    """Tell whether a backward pass is running in this thread. A public name, which `check_recomputation` tries out."""
    return bool(_module_tracker().is_bw)


@functools.cache
def check_recomputation() -> None:
    """Raise if a small checkpoint, by either engine, is not recomputed in what is seen as a backward pass.

    It runs in a thread of its own, in which none of the caller's modes is on.
    """
    seen: list[Any] = []

    def probe(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_in_backward())
        return x.square()

    def run() -> None:
        try:
            for reentrant in (False, True):
                x = torch.ones((), requires_grad=True)
                torch.utils.checkpoint.checkpoint(
                    probe, x, use_reentrant=reentrant, preserve_rng_state=False
                ).backward()
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if seen != [False, True, False, True]:
        raise RuntimeError(
            f"torch {torch.__version__} does not tell a recomputation from a forward pass as torch 2.9 to 2.15 do "
            f"({', '.join(map(str, seen))}), so update_once, calibrate and diagnose cannot work with it: install a "
            "newer momentum_fix. correct, restore, audit, preserve_state and momentum_fix.checkpoint do not need this"
        )


def is_watched_by_mode() -> bool:
    """Tell whether a mode that decides what operations give, as that of selective checkpointing, sees each of them."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return not all(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


def hidden_from_modes() -> AbstractContextManager[None]:
    """Run operations of this package's own, which selective checkpointing does not know from the forward pass.

    Fake and proxy modes stay: they decide what a tensor is.
    """
    return _without_modes() if is_watched_by_mode() else nullcontext()


@contextmanager
def outside_of_modes() -> Iterator[None]:
    """Run operations whose results are tensors of any code, whatever modes are on here."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.inference_mode(False):
        yield


@contextmanager
def _without_modes() -> Iterator[None]:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes() as modes, ExitStack() as kept:
        for mode in modes:
            if mode.is_infra_mode():
                kept.enter_context(mode)
        yield


def is_abstract_norm(cls: type[nn.Module]) -> bool:
    """Tell whether a class's forward is one of torch's that raises, or calls a check of the input that raises."""
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
    from torch.nn.modules.instancenorm import _InstanceNorm

    checks = (_NormBase._check_input_dim, _InstanceNorm._check_input_dim)
    forwards = (_BatchNorm.forward, _InstanceNorm.forward, nn.Module.forward)
    return getattr(cls, "_check_input_dim", None) in checks and cls.forward in forwards


# Tensors and modules.


def has_values() -> bool:
    """Tell whether operations compute: no fake tensors, and no tracing."""
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    return not is_in_torch_dispatch_mode(include_infra_modes=True)


def version(tensor: torch.Tensor) -> int:
    """Give how often a tensor was written to, as far as autograd has seen."""
    return 0 if tensor.is_inference() else tensor._version


def leaves_a_checkpoint(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is what a reentrant checkpoint gave."""
    return isinstance(tensor.grad_fn, torchs.CheckpointFunction._backward_cls)


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Give the tensor that this one is a view of."""
    return tensor._base


def is_base_kept(view: torch.Tensor) -> bool:
    """Tell whether anybody has the tensor that this one is a view of, besides the view."""
    alone = torch.ones(1)[0]
    return sys.getrefcount(base_of(view)) > sys.getrefcount(base_of(alone))


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Give a view of a tensor that stands for its negative, as the imaginary part of a conjugate does."""
    return torch._neg_view(tensor)


def has_compiled() -> bool:
    """Tell whether this process has compiled any code so far; yes, if torch does not tell."""
    return bool(getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COUNTER", "unknown"))


def is_compiled(value: Any) -> bool:
    """Tell whether a module or a function is compiled by itself."""
    own = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        return "_compiled_call_impl" in own or "_orig_mod" in own.get("_modules", ())  # traced code has none
    return "_torchdynamo_orig_callable" in own and not own.get("_torchdynamo_disable")
