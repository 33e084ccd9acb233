"""docs/symptoms.md quotes the beginning of each message of this package, and of those of torch that lead here."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointError, checkpoint

import momentum_fix
from momentum_fix import preserve_state
from momentum_fix.norms.notes import Note
from pages import DOCS
from twins import non_reentrant, reentrant

PACKAGE = Path(momentum_fix.__file__).parent
ELSEWHERE = {"__init__.py", "__main__.py", "plots.py", "files", "symbolic"}  # not about training


def quotes(heading):
    """Give what a section quotes: the first cell of each row, or each piece of code in its text."""
    text = (DOCS / "symptoms.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`+)(.+?)\1 \|", text, re.MULTILINE)
    return [quote for _, quote in rows] or re.findall(r"`(.+?)`", text)


OURS = [
    quote
    for heading in (
        "update_once",
        "calibrate and correct",
        "preserve_state, checkpoint, preserve_everywhere, diagnose",
        "A wrong argument",
    )
    for quote in quotes(heading)
]


def text_of(node):
    """Give a string in the source, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def nodes():
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in ELSEWHERE]
    return [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]


STRINGS = {text_of(node) for node in nodes()} - {None}


def messages():
    """Give what is raised or warned of, as far as it stands in the call, and what `calibrate` warns of."""
    calls = [node.exc for node in nodes() if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    calls += [node for node in nodes() if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"]
    found = {text_of(call.args[0]) for call in calls if call.args} - {None}
    return {note.text for note in Note if note.warns} | {
        message for message in found if len(message.replace("…", "")) > 20
    }


@pytest.mark.parametrize("quote", OURS)
def test_a_quote_is_the_beginning_of_something_that_the_package_says(quote):
    assert any(text.startswith(quote) for text in STRINGS)


def test_every_warning_and_error_is_quoted():
    assert len(messages()) > 30
    assert [message for message in messages() if not message.startswith(tuple(OURS))] == []


def test_a_message_that_is_not_quoted_would_be_seen():
    assert any(not message.startswith(tuple(OURS[1:])) for message in messages())


# What torch says.


class Counts(nn.Module):
    """Does something else in every second call."""

    def __init__(self, other):
        super().__init__()
        self.layer, self.calls, self.other = nn.Linear(4, 4), 0, other

    def forward(self, x):
        self.calls += 1
        return self.other(self.layer(x).tanh()) if self.calls % 2 else self.layer(x).tanh()


def another_number(**how):
    net = Counts(torch.exp)
    checkpoint(net, torch.randn(2, 4), use_reentrant=False, **how).sum().backward()


def other_shapes(**how):
    net = Counts(lambda y: y)
    net.forward = lambda x, forward=net.forward: forward(x[: 1 + net.calls % 2]).tanh()
    checkpoint(net, torch.randn(2, 4), use_reentrant=False, **how).sum().backward()


class Moves(nn.Module):
    """Its output reads a buffer, or a copy of it, that its next call writes to."""

    def __init__(self, read):
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.layer, self.read = nn.Linear(4, 4), read

    def forward(self, x):
        return self.layer(x) * self.read(self.scale.mul_(1.1))


def in_place(read=lambda buffer: buffer):
    net = Moves(read)
    (net(torch.randn(2, 4)) + net(torch.randn(2, 4))).sum().backward()


class Twice(nn.Module):
    def __init__(self, ckpt):
        super().__init__()
        self.layer, self.ckpt = nn.Linear(4, 4), ckpt

    def forward(self, x):
        return self.ckpt(self.layer, self.ckpt(self.layer, x).tanh()).tanh()


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ready_twice(ckpt=reentrant, **options):
    net = DistributedDataParallel(Twice(ckpt), **options)
    net(torch.randn(2, 4, requires_grad=True)).sum().backward()


def test_the_page_quotes_what_torch_says_and_what_it_advises_ends_it(group):
    number, metadata, place, ready, engine = quotes("torch's errors")
    with pytest.raises(CheckpointError, match=f"^torch.utils.checkpoint: {re.escape(number)}"):
        another_number()
    another_number(context_fn=preserve_state)
    with pytest.raises(CheckpointError, match=f"^torch.utils.checkpoint: {re.escape(metadata)}"):
        other_shapes()
    other_shapes(context_fn=preserve_state)
    with pytest.raises(RuntimeError, match=f"^{re.escape(place)}"):
        in_place()
    in_place(torch.clone)
    with pytest.raises(RuntimeError, match=f"(?s)^{re.escape(ready)}.*marked as ready twice"):
        ready_twice(find_unused_parameters=True)
    ready_twice(non_reentrant, find_unused_parameters=True)
    ready_twice(static_graph=True)
    with pytest.raises(ValueError, match=f"^{re.escape(engine.partition(' or ')[0])}"):  # torch 2.14 names a third
        reentrant(nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True), context_fn=preserve_state)
    momentum_fix.checkpoint(nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True), use_reentrant=True).sum().backward()
