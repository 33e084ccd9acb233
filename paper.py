"""The paper's numbers, figures and page: `python paper.py` computes them, fills them in, draws them and builds it.

In paper.md a number stands before the comment that names it, as in 0.0513<!-- corrected -->: the text reads as
written, and every number in it is one of `numbers()`.
"""

import math
import re
import subprocess
from functools import partial
from pathlib import Path

import pypandoc
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from momentum_fix import corrected_momentum, effective_momentum, plots, preserve_state, symbolic
from momentum_fix.weights import batch_weights

ROOT = Path(__file__).parent
TEXT, FIGURES, PAGE = ROOT / "paper.md", ROOT / "figures", ROOT / "build" / "paper.html"
NAMED = re.compile(r"([^\s|(]+)<!-- (\w+) -->")
CHANNELS, BATCHES = 2000, 150
DRAWN = {"decay": plots.decay, "effective": plots.effective, "shares": plots.shares, "signal": plots.signal}


def nested_checkpoints(block, inputs, times, **options):
    """Run a block so that one backward pass computes it `times` more times: checkpoints, one inside the other."""
    if times == 0:
        return block(inputs)
    return checkpoint(lambda x: nested_checkpoints(block, x, times - 1, **options), inputs, **options)


def counts():
    """Measure how often a BatchNorm layer updates its statistics per batch, for ways to run it."""

    def updates(run, layers=1, gradient=True):
        norms = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(layers)))
        inputs = torch.randn(4, 2, requires_grad=gradient)
        run(norms, inputs)
        return [norm.num_batches_tracked.item() for norm in norms]

    def twice(block, x):
        loss = checkpoint(block, x, use_reentrant=False).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    def nested(norms, x):
        def outer(x):
            return norms[2](checkpoint(norms[1], norms[0](x), use_reentrant=False))

        checkpoint(outer, x, use_reentrant=False).square().sum().backward()

    def frozen(block, x):
        head = nn.Linear(2, 1)
        head(checkpoint(block.requires_grad_(False), x, use_reentrant=False)).sum().backward()

    def run(**options):
        return lambda block, x: checkpoint(block, x, **options).square().sum().backward()

    def segments(norms, x):
        checkpoint_sequential(norms, 2, x, use_reentrant=False).square().sum().backward()

    def deep(block, x):
        nested_checkpoints(block, x, 4, use_reentrant=True).square().sum().backward()

    def compiled(block, x):
        whole = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="aot_eager")
        whole(x).square().sum().backward()

    around, inside, _ = updates(nested, 3)
    return {
        "k_nested": updates(deep)[0],
        "k_compiled": updates(compiled)[0],
        "k_plain": updates(lambda block, x: block(x).square().sum().backward())[0],
        "k_checkpoint": updates(run(use_reentrant=False))[0],
        "k_reentrant": updates(run(use_reentrant=True))[0],
        "k_forward": updates(lambda block, x: checkpoint(block, x, use_reentrant=False))[0],
        "k_twice": updates(twice)[0],
        "k_around": around,
        "k_inside": inside,
        "k_last_segment": updates(segments, 2)[-1],
        "k_frozen": updates(frozen, gradient=False)[0],
    }


def train(momentum, checkpoints, channels=CHANNELS, batches=BATCHES):
    """Run a real layer on batches of independent noise; give its buffers and its last gradient."""
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(channels, momentum=momentum)
    for _ in range(batches):
        inputs = torch.randn(4, channels, requires_grad=True)
        nested_checkpoints(layer, inputs, checkpoints, use_reentrant=True).pow(3).sum().backward()
    assert layer.num_batches_tracked == batches * (checkpoints + 1)
    return layer.running_mean, layer.running_var, inputs.grad


def shares():
    """Measure the weights of two batches in a layer whose corrected passes are interleaved, in the two usual orders."""

    def siamese(block, inputs):
        sum(checkpoint(block, x, use_reentrant=False).square().sum() for x in inputs).backward()

    def gpipe(block, inputs):
        stage = PipelineStage(Checkpointed(block), 0, 1, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, len(inputs), loss_fn=lambda y, target: (y - target).square().sum())
        for _ in range(2):  # the first time, the schedule also runs the stage to see the shape of what it gives
            block.reset_running_stats()
            schedule.step(torch.cat(inputs).detach(), target=torch.zeros(4, 1))

    results = {}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        for order, run in (("share", siamese), ("pipe", gpipe)):
            for batch, ones in (
                ("a", (1.0, 0.0)),
                ("b", (0.0, 1.0)),
            ):  # so the running mean is the weight of this batch
                layer = nn.BatchNorm1d(1, momentum=corrected_momentum(0.1, 2))
                run(layer, [one + torch.tensor([[-1.0], [1.0]], requires_grad=True) for one in ones])
                assert layer.num_batches_tracked == 4
                results[f"{order}_{batch}_measured"] = f"{layer.running_mean.item():.4f}"
    finally:
        dist.destroy_process_group()
    return results


class Distance(nn.Module):
    """The smallest module whose output reads the state that it moves: the distance of a batch to its running value."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.weight, self.momentum = nn.Parameter(torch.ones(())), momentum
        self.register_buffer("running", torch.zeros(()))

    def forward(self, batch):
        self.running = torch.lerp(self.running, batch, self.momentum)
        return self.weight * (batch - self.running)


def gradients():
    """Measure the gradient of a module that reads its state, in four ways to run it."""

    def gradient(run, momentum=0.1):
        module = Distance(momentum)
        (run(module, torch.ones(())).square() / 2).backward()
        return f"{module.weight.grad.item():.3f}"

    plain = partial(checkpoint, use_reentrant=False)
    return {
        "reads": gradient(lambda module, batch: module(batch)),
        "reads_plain": gradient(plain),
        "reads_corrected": gradient(plain, corrected_momentum(0.1, 2)),
        "reads_preserved": gradient(partial(plain, context_fn=preserve_state)),
    }


class Checkpointed(nn.Module):
    """A block under a checkpoint, as a pipeline's stage has to be a module."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def measured():
    """Measure noise and agreement on real layers in float64."""
    results = {"batches": str(BATCHES), "channels": str(CHANNELS), "sampling": f"{math.sqrt(2 / CHANNELS):.0%}"}
    mean, var, gradient = train(0.1, 0)
    for passes in (2, 3, 5):
        spoilt_mean, spoilt_var, spoilt_gradient = train(0.1, passes - 1)
        results[f"noise_{passes}_measured"] = f"{spoilt_mean.var() / mean.var():.2f}"
        fixed_mean, fixed_var, fixed_gradient = train(corrected_momentum(0.1, passes), passes - 1)
        assert torch.equal(gradient, spoilt_gradient)  # "to the last bit"
        assert torch.equal(gradient, fixed_gradient)
        torch.testing.assert_close(fixed_mean, mean, rtol=1e-12, atol=1e-12)  # "to twelve digits"
        torch.testing.assert_close(fixed_var, var, rtol=1e-12, atol=1e-12)
        assert (spoilt_var - var).abs().max() > 0.5  # so the comparison can fail
    return results


def numbers():
    """Compute every number of the paper, as it is printed there."""
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        results = {name: str(count) for name, count in counts().items()} | measured() | shares() | gradients()
    finally:
        torch.set_default_dtype(kind)
    theorems = symbolic.theorems()
    for order, name in (("AABB", "right"), ("ABBA", "share"), ("ABAB", "pipe")):
        for batch, weight in batch_weights(order, corrected_momentum(0.1, 2)).batches.items():
            results[f"{name}_{batch.lower()}"] = f"{weight:.4f}"
    spread = batch_weights([*range(8), *reversed(range(8))], corrected_momentum(0.1, 2)).batches
    root = math.sqrt(0.1)
    results |= {
        "torch": torch.__version__.split("+")[0],
        "theorems": str(len(theorems)),
        "claims": str(sum(len(theorem.claims) for theorem in theorems)),
        "steps": str(sum(len(theorem.steps) for theorem in theorems)),
        "oldest": f"{spread[0]:.3f}",
        "oldest_right": f"{0.1 * 0.9**7:.3f}",
        "newest": f"{spread[7]:.3f}",
        "root": f"{root:.3f}",
        "root_keeps": f"{(1 - root) ** 2:.2f}",
        "root_should": f"{1 - 0.1:.1f}",
        "tiny": "1e-17",
        "tiny_corrected": str(corrected_momentum(1e-17, 2)),
        "tiny_textbook": str(1 - (1 - 1e-17) ** 0.5),
    }
    for passes in (1, 2, 3, 5):
        decay = 0.9**passes
        results |= {
            f"effective_{passes}": f"{effective_momentum(0.1, passes):.3f}",
            f"noise_{passes}": f"{symbolic.noise_ratio(0.9, passes):.2f}",
            f"age_{passes}": f"{symbolic.mean_age(decay):.1f}",
            f"fresher_{passes}": f"{symbolic.mean_age(0.9) / symbolic.mean_age(decay):.1f}",
            f"half_{passes}": f"{math.log(0.5) / math.log(decay):.1f}",
            f"corrected_{passes}": f"{corrected_momentum(0.1, passes):.4f}",
        }
    return results


def fill(text, values):
    """Put each named number before its name."""
    return NAMED.sub(lambda found: f"{values[found[2]]}<!-- {found[2]} -->", text)


def draw(folder):
    """Draw the figures into a folder."""
    for name, plot in DRAWN.items():
        plots.save(folder / f"{name}.svg", plot().figure)


def build(page):
    """Make the page with pandoc, which fails if a citation or a figure is missing."""
    page.parent.mkdir(exist_ok=True)
    options = ["--standalone", "--citeproc", "--mathml", "--embed-resources", "--strip-comments", "--fail-if-warnings"]
    pandoc = pypandoc.get_pandoc_path()
    subprocess.run([pandoc, TEXT.name, *options, "--output", page], cwd=ROOT, check=True)


if __name__ == "__main__":
    TEXT.write_text(fill(TEXT.read_text(encoding="utf-8"), numbers()), encoding="utf-8")
    draw(FIGURES)
    build(PAGE)
    print(f"paper.md and figures/ are up to date; the page is {PAGE.relative_to(ROOT)}")
