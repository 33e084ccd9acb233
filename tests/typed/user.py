"""What a user's own script looks like to mypy and pyright, both strict: every public function is in it."""

import functools
import json
from fractions import Fraction

import torch
from torch import nn

import momentum_fix
from momentum_fix import (
    Audit,
    Diagnosis,
    Handle,
    Report,
    applied,
    audit,
    calibrate,
    checkpoint,
    correct,
    corrected_momentum,
    diagnose,
    effective_momentum,
    norm_layer,
    plots,
    preserve_everywhere,
    preserve_state,
    recomputing,
    restore,
    symbolic,
    update_once,
)


class Classifier(nn.Module):
    def __init__(self, norm: functools.partial[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.body, x, use_reentrant=False)
        return y


number: float = corrected_momentum(0.1, passes=2)
nothing: None = corrected_momentum(None)
back: float = effective_momentum(number, 2)

model: Classifier = correct(Classifier(norm_layer("BatchNorm1d", momentum=0.1, passes=2, eps=1e-3)), passes={"body": 2})
model = restore(model)
on_it: dict[str, str] = applied(model)

with diagnose(model) as found_out:
    model(torch.rand(8, 3)).sum().backward()
diagnosis: Diagnosis = found_out
fine: bool = diagnosis.ok
right: bool | None = diagnosis.gradients_right
size: float = diagnosis.rounding
uses: dict[str, str] = {name: finding.remedy for name, finding in diagnosis.items() if finding.times != 1}
starts: list[tuple[str, str, float]] = [(each.module, each.checkpoint, each.size) for each in diagnosis.differences]
to_paste: tuple[str, ...] = diagnosis.fixes

with calibrate(model) as report:
    model(torch.rand(8, 3)).sum().backward()
found: Report = report
passes: dict[str, int] = report.passes
correct(model, report.passes)
correct(model, report)
mean: int | Fraction = report["body.1"]
text: str = json.dumps(passes) + str(report)
for row in report.rows:
    line: tuple[str, str, str] = row.name, row.layer_class, row.note
    texts: list[str] = [note.text + note.remedy for note in row.notes if note.warns]

restore(model)
forward, recomputation = preserve_state()
with forward, recomputation:
    model.eval()
model.train()

everywhere = preserve_everywhere()
everywhere.remove()
with preserve_everywhere():
    model(torch.rand(8, 3)).sum().backward()

handle: Handle = update_once(model)
handle.remove()
with update_once(model):
    model(torch.rand(8, 3)).sum().backward()

with recomputing():
    model(torch.rand(8, 3))
with recomputing(False):
    model(torch.rand(8, 3))
covered: int = len(handle)

result: Audit = audit(model)
verdict: str = result.verdict

for theorem in symbolic.theorems():
    statement: str = theorem.statement
    theorem.prove()
plots.decay().figure.clear()
plots.save("decay.svg", plots.figure())
plots.save("decay.svg", plots.decay().figure)
version: str = momentum_fix.__version__
