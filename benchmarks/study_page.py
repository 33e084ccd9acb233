"""What the study found: docs/study.md and its figures, every number of it from benchmarks/study.jsonl.

`python benchmarks/study_page.py` writes them anew, and the answer into README and paper; with `--small`, a page of the
small study beside its data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from study import CHANGES, DATA, DOUBLE, GRID, PLAN, ROOT, SCHEDULES, SEEDS, SMALL, Condition, Variant
from study_figures import FIGURES
from study_results import (
    BATCHES,
    ERROR,
    FIVE,
    ONE,
    TWO,
    Study,
    Test,
    coverages,
    in_spreads,
    load,
    logs,
    over,
    percent,
    points,
    primary,
    rule_of_thumb,
    values,
)
from study_statistics import Estimate, bootstrap_t
from study_tasks import TASKS

sys.path.insert(0, str(ROOT / "tests"))

import pages

QUOTES = (ROOT / "README.md", ROOT / "paper.md")
WORDS = {1: "worse", -1: "better", 0: "open"}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def ends(found: Estimate, digits: int = 1) -> str:
    return f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"


def said(found: Estimate, digits: int = 1) -> str:
    return f"{found.mean:+.{digits}f} ({ends(found, digits)})"


def counted(tests: list[Test]) -> str:
    counts = [(word, sum(test.verdict() == sign for test in tests)) for sign, word in WORDS.items()]
    return ", ".join(f"{count} {word}" for word, count in counts if count)


def in_short(study: Study, tests: list[Test]) -> str:
    rows = []
    for schedule in SCHEDULES:
        for batch in BATCHES:
            row = [schedule, str(batch)]
            for variant in (TWO, FIVE):
                here, anywhere = over(study, schedule, batch, variant)
                chosen = [t for t in tests if t.condition[1:3] == (batch, schedule) and t.variant == variant]
                row += [said(here), ends(anywhere), counted(chosen)]
            rows.append(row)
    columns = [f"k = {k}: {text}" for k in (2, 5) for text in ("loss, %", "as a sample of tasks", "tasks")]
    return table(["rate", "batch", *columns], rows)


def by_task(study: Study, tests: list[Test]) -> str:
    rows = []
    found = {(test.condition, test.variant): test for test in tests}
    for c in sorted(GRID, key=lambda c: (c.schedule, c.batch)):
        row = [c.schedule, str(c.batch), c.task, f"{values(study, c, ONE).mean():.3f}"]
        for variant in (TWO, FIVE):
            test = found[c, variant]
            row += [f"{said(test.change)} {WORDS[test.verdict()]}", f"{in_spreads(study, c, variant):+.2f}"]
        row += [f"{values(study, c, ONE, what=ERROR).mean():.2f}"]
        row += [said(bootstrap_t(points(study, c, variant)), 2) for variant in (TWO, FIVE)]
        rows.append(row)
    loss = [f"k = {k}: {text}" for k in (2, 5) for text in ("loss, %", "in spreads")]
    return table(["rate", "batch", "task", "loss", *loss, "error", "k = 2: points", "k = 5: points"], rows)


def beside_simple_methods(study: Study) -> str:
    rows = []
    for name, task in TASKS.items():
        baseline = Condition(name, 0, "none", "baseline")
        simple = study.runs[str(baseline), study.seeds[0]]["scores"]
        errors = [
            values(study, Condition(name, batch, "annealed"), ONE, what=ERROR).mean()
            for batch in (BATCHES[0], BATCHES[-1])
        ]
        methods = "; ".join(f"{m} {values(study, baseline, m, 'last', ERROR).mean():.1f}" for m in simple)
        rows.append([name, task.title, task.metric, *(f"{error:.1f}" for error in errors), methods])
    header = [f"network, batch {batch}" for batch in (BATCHES[0], BATCHES[-1])]
    return table(["task", "data and network", "error", *header, "simple methods"], rows)


def of_thumb(study: Study) -> str:
    rows = []
    for schedule in SCHEDULES:
        for variant in (TWO, FIVE):
            rule = rule_of_thumb(study, schedule, variant)
            measured = [f"{f(rule.ratios):.2f}" for f in (np.median, min, max)] if rule.ratios else ["none"] * 3
            number = f"{len(rule.ratios)} of {len(GRID) // len(SCHEDULES)}"
            rows.append([schedule, f"k = {variant.k}", f"{rule.predicted:.2f}", *measured, number])
    return table(["rate", "passes", "predicted", "median", "smallest", "largest", "conditions"], rows)


def other_momenta(study: Study) -> str:
    """Compare k = 5 with k = 1 at each momentum, and k = 1 at other momenta with k = 1 at 0.1."""
    pairs = [*((Variant(5, m), Variant(1, m)) for m in (0.01, 0.1, 0.3)), *((Variant(1, m), ONE) for m in (0.01, 0.3))]
    rows = [
        [schedule, str(batch), *(said(over(study, schedule, batch, *pair)[0]) for pair in pairs)]
        for schedule in SCHEDULES
        for batch in BATCHES
    ]
    header = [f"k = 5, m = {m}" for m in (0.01, 0.1, 0.3)] + [f"k = 1, m = {m}" for m in (0.01, 0.3)]
    return table(["rate", "batch", *header], rows)


def in_double(study: Study) -> tuple[str, int, int]:
    """Compare float64 with float32; give the table, and of how many verdicts how many differ."""
    single = {double: Condition(*double[:3]) for double in DOUBLE}
    rows = []
    for double, plain in single.items():
        found = [percent(bootstrap_t(logs(study, c, v))) for v in (TWO, FIVE) for c in (plain, double)]
        rows.append([plain.schedule, str(plain.batch), *map(said, found)])
    before, after = primary(study), primary(study, {plain: double for double, plain in single.items()})
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.condition in single.values()]
    header = [f"k = {k}: {kind}" for k in (2, 5) for kind in ("float32", "float64")]
    moved = sum(a.verdict() != b.verdict() for a, b in pairs)
    return table(["rate", "batch", *header], rows), moved, len(pairs)


def covered(study: Study) -> str:
    rows = [[name, *(f"{value:.1f}" for value in found)] for name, found in coverages(study).items()]
    return table(["population", "skewness", "t, %", "bootstrap-t, %"], rows)


# What was changed in the first study after results had been seen, by commit (`git show`).
HISTORY = {
    "66ae3e5": "after a pilot on the digits, orders of the data were cut, for time",
    "c7419ba": "conditions and seeds were cut, the constant rate at batch 32 because the pilot had shown the effect "
    "gone there; the message said that no result had been looked at",
    "05613b9": "with some seeds seen, the verdict *better as it is* was put before the others, a bootstrap interval "
    "was replaced by a t interval on logarithms, and the loss was added",
    "96da005": "with some seeds seen, the answer went from medians of the error to the mean loss over the tasks",
    "1a08075": "with all seeds seen, the verdict over the tasks was added, and the answer named the largest changes "
    "whose intervals exclude 0",
    "c643518": "README's answer became two numbers and a median over 116 unequal conditions",
    "bffc9c8": "the condition that had been cut was run, and had the largest effect for the better; the brain no "
    "longer counted, since its template is mirror-symmetric; batch 1, the median and *at most* left the answer",
}


def headline(study: Study, text: Callable[[Estimate], str]) -> dict[tuple[str, int, int], str]:
    """Give the planned headline numbers by schedule, batch size and k."""
    return {
        (schedule, batch, variant.k): text(over(study, schedule, batch, variant)[0])
        for schedule in SCHEDULES
        for batch in (BATCHES[0], BATCHES[-1])
        for variant in (TWO, FIVE)
    }


def brief(study: Study) -> str:
    """Give the answer as README's first screen has it."""
    h, few, many = headline(study, lambda found: f"{found.mean:+.1f} %"), BATCHES[0], BATCHES[-1]
    return (
        f"In four small tasks with an annealed (cosine) learning rate, uncorrected updates changed the test loss by "
        f"{h['annealed', few, 2]} (two updates per batch) and {h['annealed', few, 5]} (five) at batch size {few}, and "
        f"by {h['annealed', many, 2]} and {h['annealed', many, 5]} at batch size {many}. With a constant rate it was "
        f"{h['constant', few, 2]} and {h['constant', few, 5]} at batch size {few}, but {h['constant', many, 2]} and "
        f"{h['constant', many, 5]} at batch size {many}: there a momentum of {ONE.momentum} is too small, and more "
        "updates act as a larger one. Raise it yourself there, and use `update_once`."
    )


def sentences(study: Study) -> list[str]:
    """Give the answer in two sentences, as paper and page say it."""
    h, few, many = headline(study, said), BATCHES[0], BATCHES[-1]
    return [
        f"In these four small tasks, with {len(study.seeds)} seeds and an annealed learning rate, uncorrected passes "
        f"change the test loss by {h['annealed', few, 2]} % with k = 2 and {h['annealed', few, 5]} % with k = 5 at "
        f"batch {few}, and by {h['annealed', many, 2]} % and {h['annealed', many, 5]} % at batch {many}.",
        f"With a constant rate they change it by {h['constant', few, 2]} % and {h['constant', few, 5]} % at batch "
        f"{few}, and by {h['constant', many, 2]} % and {h['constant', many, 5]} % at batch {many}, where the weights "
        f"keep moving and a momentum of {ONE.momentum} is too small.",
    ]


def quoting(text: str, study: Study) -> str:
    """Put the answer into a document, between the comments that mark its place."""
    for mark, answer in (("study", " ".join(sentences(study))), ("study in brief", brief(study))):
        text = pages.quoting(text, mark, pages.wrapped(answer, 110))
    return text


def from_plan(*starts: str) -> str:
    """Quote the plan's paragraphs that start so."""
    paragraphs = PLAN.read_text(encoding="utf-8").split("\n\n")
    chosen = [next(one for one in paragraphs if one.startswith(f"**{start}")) for start in starts]
    return "\n>\n".join("\n".join(f"> {line}" for line in one.strip().splitlines()) for one in chosen)


def page(study: Study) -> str:
    """Write docs/study.md."""
    tests = primary(study)
    double, moved, compared = in_double(study)
    hours = sum(run["seconds"] for run in study.runs.values()) / 3600
    spreads = {
        k: np.median([abs(in_spreads(study, t.condition, t.variant)) for t in tests if t.variant.k == k])
        for k in (2, 5)
    }
    networks = sum(run["steps"] > 0 for run in study.runs.values())
    return f"""\
# Is it negligible?

**{" ".join(sentences(study))}**

So with an annealed rate, or at batch 2, use `update_once` or a corrected momentum. With a constant rate and larger
batches an uncorrected run evaluates better, because its statistics are fresher. What is wrong there is the momentum,
which is too small: raise it, and use `update_once`.

Made by `make study` from [its data file](../benchmarks/study.jsonl): {networks:,} training runs, {len(study.seeds)}
seeds, {hours:.1f} hours of one core, torch {study.torch}. The tests make this page anew and compare. k is how often a
layer's running statistics are updated for one batch, with an uncorrected momentum of {ONE.momentum} unless another is
named; k = 1 is training without checkpoints, or with them corrected. Changes are those of the final test log loss in
percent, on the same weights, with 95 % intervals over seeds; above 0 the uncorrected run is worse. "Annealed" is a
cosine to 0, "constant" a constant learning rate.

## A table to decide with

The mean over the tasks (the geometric mean of the losses' ratios) speaks of these four tasks. *As a sample of tasks* is
a t interval over four numbers: what tasks like these may show. *Tasks* counts verdicts: *worse* and *better* hold after
Holm's correction over all {len(tests)} planned comparisons; *open* does not.

{in_short(study, tests)}

![what uncorrected passes change, by task, schedule and batch size](study-effect.png)

## Task by task

*In spreads* is the change in standard deviations of the log loss of k = 1 over seeds: what another seed changes. The
median of its size is {spreads[2]:.2f} for k = 2 and {spreads[5]:.2f} for k = 5. *Points* are points of
error, the second outcome, whose intervals are not corrected. Of {len(tests)} planned comparisons, {counted(tests)}.

{by_task(study, tests)}

The networks beside simple methods, in percent of error (of the network: k = 1, annealed). Where a simple method does
better, the rows tell what happens to the statistics, and not what one would use for this task.

{beside_simple_methods(study)}

## A rule of thumb, and where it fails

Evaluate your network as it is and once more after `torch.optim.swa_utils.update_bn`. What the loss gains with k = 1 is
what the noise of the running statistics costs; in theory k passes multiply it by the ratio of variances. Tried at the
last step in the conditions where that gain is told apart from 0:

{of_thumb(study)}

With an annealed rate the rule holds, roughly. With a constant rate it does not: there the statistics are not only
noisy but late, and k passes make them less so. A full pass itself does not depend on k.

## Other momenta

In the mean over the tasks, in percent of the loss: k = 5 against k = 1 at the same momentum, then k = 1 at other
momenta against k = 1 at {ONE.momentum}.

{other_momenta(study)}

## After a change of domain

In mid-training the contrast is inverted and halved, for the test data too (batch {CHANGES[0].batch}, annealed).

![errors after a change of domain](study-change.png)

## How sure

Intervals and p values are bootstrap-t. How often 95 % intervals from {len(study.seeds)} seeds contain the mean of a
population, simulated:

{covered(study)}

Floating point alone moves the numbers, and can move the verdict of a cell near the border. The digits were trained
again in float64 from the same weights and batches, so that rounding is all that differs: {moved} of {compared} verdicts
change.

{double}

## The plan

The plan (`benchmarks/study_plan.md`) was committed before the first run; the data file names its contents, and the
history shows it (`git log -- benchmarks/study_plan.md benchmarks/study.jsonl`). From it:

{from_plan("Primary family", "Verdicts", "The headline")}

What was changed after a result had been seen, all of it in the first study, which this one replaces:

{chr(10).join(f"- {commit}: {what}" for commit, what in HISTORY.items())}

## What small tasks cannot say

These networks train for seconds, on little data. What a network of real size
loses by its evaluation statistics is not known from them. One number beside ours: by changing nothing but the
statistics used in evaluation, Singh and Shrivastava ([EvalNorm](https://arxiv.org/abs/1904.06031), 2019, abstract)
gain 6.18 points of accuracy on ImageNet at batch size 2. That is what better statistics gave there, with one pass; it
is not what extra passes cost.

- But for the volumes, every seed draws from the same few thousand examples: the intervals speak of these data.
- With {len(study.seeds)} seeds an interval that contains 0 does not prove that there is no effect.
- The trainings are short: at momentum 0.01 the initial statistics still count at the end.
- Training that reads its running statistics (Batch Renormalization, a frozen BatchNorm later) is another matter.
"""


def write(study: Study, folder: Path) -> Path:
    """Write the page and its figures; give the page's path."""
    for name, draw in FIGURES.items():
        draw(study).savefig(folder / f"study-{name}.png", dpi=110)
    file = folder / "study.md"
    file.write_text(page(study), encoding="utf-8")
    return file


def main() -> None:
    small = sys.argv[1:] == ["--small"]
    study = load(SMALL if small else DATA)
    if not small and len(study.seeds) < SEEDS:  # as the plan says
        print(
            f"{len(study.seeds)} of {SEEDS} seeds are finished: the page stays as it is until `make study` is through"
        )
        return
    print(write(study, SMALL.parent if small else ROOT / "docs"))
    for document in () if small else QUOTES:
        document.write_text(quoting(document.read_text(encoding="utf-8"), study), encoding="utf-8")


if __name__ == "__main__":
    main()
