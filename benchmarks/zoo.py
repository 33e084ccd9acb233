"""Models of torchvision and timm with their own checkpointing on, beside their twins without: docs/zoo.md.

`make zoo` runs this with the newest torch, beside which both libraries load, and writes benchmarks/zoo.json;
`python benchmarks/zoo.py --page` writes the page anew, every number of it from there, and its sentence into the README.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pages  # noqa: E402
from momentum_fix import calibrate, correct, update_once  # noqa: E402
from pages import wrapped  # noqa: E402
from twins import counters, descend, deviation  # noqa: E402

DATA = ROOT / "benchmarks" / "zoo.json"
DOCUMENT = ROOT / "docs" / "zoo.md"
README = ROOT / "README.md"
STEPS, SHAPE = 3, (4, 3, 64, 64)
RIGHT = 1e-10  # relative, in float64
MODELS = {
    "torchvision": ["densenet121", "densenet169"],
    "timm": [
        "densenet121",
        "efficientnet_b0",
        "efficientvit_b0",
        "ese_vovnet19b_dw",
        "fasternet_t0",
        "fastvit_t8",
        "ghostnet_100",
        "hardcorenas_a",
        "hgnetv2_b0",
        "lcnet_050",
        "mixnet_s",
        "mnasnet_050",
        "mobilenetv3_small_100",
        "mobilenetv4_conv_small",
        "mobileone_s0",
        "mobilevit_xxs",
        "regnetx_002",
        "repvgg_a0",
        "repvit_m0_9",
        "res2net50_26w_4s",
        "resnest14d",
        "resnet18",
        "resnet50",
        "rexnet_100",
        "skresnet18",
        "starnet_s1",
        "swiftformer_xs",
        "tresnet_m",
        "vovnet39a",
    ],
}


# Running it.


def built(library: str, name: str) -> nn.Module:
    """Build a model with weights drawn from one seed."""
    torch.manual_seed(0)
    if library == "timm":
        return importlib.import_module("timm").create_model(name)
    return importlib.import_module("torchvision.models").get_model(name)


def switch(model: nn.Module, on: bool) -> None:
    """Switch on or off what the model itself has for checkpointing."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(on)
    for module in model.modules():
        if hasattr(module, "memory_efficient"):
            module.memory_efficient = on


def trained(model: nn.Module, on: bool, steps: range = range(STEPS)) -> nn.Module:
    """Train on the steps' batches, which depend on their numbers alone; so does what is dropped at random."""
    model.double().train()
    switch(model, on)
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(SHAPE) * (1 + step) + step
        model.zero_grad()
        outputs = model(x)
        outputs.square().mean().backward()
        descend(model)
    return model


def with_nothing(model: nn.Module) -> nn.Module:
    return trained(model, True)


def with_the_root(model: nn.Module) -> nn.Module:
    return trained(correct(model, passes=2), True)


def calibrated(model: nn.Module) -> nn.Module:
    with calibrate(model):
        trained(model, True, range(1))
    return trained(model, True, range(1, STEPS))


def with_update_once(model: nn.Module) -> nn.Module:
    with update_once(model):
        return trained(model, True)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": with_nothing,
    "two passes everywhere": with_the_root,
    "`calibrate`": calibrated,
    "`update_once`": with_update_once,
}


def measured(model: nn.Module) -> dict[str, Any]:
    """Give how many layers run how often for a batch, and how far each method's statistics are from the twin's."""
    truth = trained(copy.deepcopy(model), False)
    assert all(buffer.isfinite().all() for buffer in truth.buffers())
    runs = {name: method(copy.deepcopy(model)) for name, method in METHODS.items()}
    passes = Counter(count / STEPS for count in counters(runs["nothing"]).values())
    return {
        "passes": {f"{k:g}": layers for k, layers in sorted(passes.items())},
        "off": {name: deviation(run, truth) for name, run in runs.items()},
    }


def everything() -> dict[str, Any]:
    """Measure all the models."""
    models = []
    for library, names in MODELS.items():
        for name in names:
            models.append({"library": library, "name": name, **measured(built(library, name))})
            print(models[-1], file=sys.stderr)
    libraries = {name: version(name).partition("+")[0] for name in ("torch", *MODELS)}
    return {"versions": libraries, "models": models}


# The page.


def load(file: Path = DATA) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def right(data: dict[str, Any], method: str) -> int:
    """Count the models with the twin's running statistics."""
    return sum(model["off"][method] < RIGHT for model in data["models"])


def sentence(data: dict[str, Any]) -> str:
    """Say what came of it."""
    return (
        f"Of {len(data['models'])} torchvision and timm models with their built-in checkpointing turned on, "
        f"{right(data, 'nothing') or 'none'} had the right running statistics without a fix. A momentum that is "
        f"corrected for two updates per batch in every layer made {right(data, 'two passes everywhere') or 'none'} of "
        f"them right, `calibrate` {right(data, '`calibrate`')}, and `update_once` {right(data, '`update_once`')}."
    )


def quoting(text: str, data: dict[str, Any]) -> str:
    """Put the sentence into a document, between the comments that mark its place, if it has any."""
    return pages.quoting(text, "zoo", wrapped(sentence(data)))


def table(data: dict[str, Any]) -> list[str]:
    columns = ["model", "library", "layers with k = " + ", ".join(ks(data)), *METHODS]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for model in data["models"]:
        layers = ", ".join(str(model["passes"].get(k, 0)) for k in ks(data))
        cells = [model["name"], model["library"], layers, *(how_far(model["off"][name]) for name in METHODS)]
        lines.append("| " + " | ".join(cells) + " |")
    counts = [str(right(data, name)) for name in METHODS]
    return [*lines, f"| **right, of {len(data['models'])}** | | | " + " | ".join(counts) + " |"]


def ks(data: dict[str, Any]) -> list[str]:
    return sorted({k for model in data["models"] for k in model["passes"]}, key=float)


def how_far(off: float) -> str:
    if off < RIGHT:
        return "right" if off else "to the bit"
    return f"{off:.2g}"


def page(data: dict[str, Any]) -> str:
    """Write docs/zoo.md."""
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    worst = max(off for model in data["models"] for off in model["off"].values() if off < RIGHT)
    mixed = sum(len(model["passes"]) > 1 for model in data["models"])
    images, _, height, width = SHAPE
    parts = [
        "# Real models",
        sentence(data),
        f"""Made by `make zoo` from [its data](../benchmarks/zoo.json) with {versions}, on a CPU. Each model is
        built with random weights and trained for {STEPS} steps in float64, on batches of {images} images of
        {height} by {width} pixels, with timm's `set_grad_checkpointing()` or torchvision's
        `memory_efficient=True`, and compared with the same model without it. k is how often a layer updates its
        running statistics for one batch, by its own counter.""",
        f"""*Right* means that each running_mean and running_var is that of the model without checkpointing, to
        {RIGHT:.0e} of its largest value (the largest deviation among those is {worst:.0e}), and *to the bit* that
        there is no deviation. A number is the largest deviation of a layer, relative to the largest value in its
        buffer. {mixed} of the {len(data["models"])} models have layers that differ in k (stems and heads are not
        recomputed, for one): no single momentum is right for such a model. *Two passes everywhere* is
        `correct(model, passes=2)`.""",
        "\n".join(table(data)),
    ]
    return "\n\n".join(part if part.startswith(("#", "|")) else wrapped(part) for part in parts) + "\n"


if __name__ == "__main__":
    if "--page" not in sys.argv:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        DATA.write_text(json.dumps(everything(), indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(page(load()), encoding="utf-8")
    README.write_text(quoting(README.read_text(encoding="utf-8"), load()), encoding="utf-8")
