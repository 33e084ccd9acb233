"""Possible causes of more updates than steps: what speaks for and against each, where each of them is the true one."""

import re

import pytest
import torch
from torch import nn

from momentum_fix import audit
from momentum_fix.files.causes import causes, nearly, recomputed
from twins import non_reentrant

RECOMPUTED = "recomputation (activation checkpointing)"
SEVERAL = "a part that runs several times per step (a head shared by feature levels, a discriminator)"
EARLIER = "an earlier training, from which the model was fine-tuned"
DROPPED = "layers that are dropped at random (LayerDrop, stochastic depth)"


def part():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def fit(model, forward, steps):
    """Run training steps, which count without an optimizer too; give the state dict."""
    for x in torch.randn(steps, 8, 4, generator=torch.Generator().manual_seed(0)):
        forward(x.requires_grad_()).sum().backward()
    return model.state_dict()


def read(lines):
    """Give what speaks for (+) and against (-) each cause."""
    said = []
    for line in lines:
        if re.match(r"  [a-z]", line):
            said.append((line.strip(), []))
        else:
            assert re.match(r"    [+-] ", line)
            said[-1][1].append(line.strip())
    return dict(said)


def found(state, **options):
    return read(line for line in str(audit(state, **options)).splitlines() if line.startswith("  "))


# Models of which the cause is known.


def checkpointed(steps):
    model = nn.ModuleDict({"stem": part(), "a": part(), "b": part(), "head": part()})

    def forward(x):
        x = model["stem"](x)
        for name in "ab":
            x = non_reentrant(model[name], x)
        return model["head"](x)

    return fit(model, forward, steps)


def with_a_shared_head(steps):
    model = nn.ModuleDict({"stem": part(), "head": part()})

    def forward(x):
        x = model["stem"](x)
        return sum(model["head"](x * level) for level in range(1, 6))

    return fit(model, forward, steps)


def fine_tuned(steps):
    backbone = part()
    fit(backbone, backbone, 7)
    model = nn.ModuleDict({"backbone": backbone, "head": part()})
    return fit(model, lambda x: model["head"](model["backbone"](x)), steps)


def with_layerdrop(steps):
    model = nn.ModuleList(part() for _ in range(4))
    chance = torch.Generator().manual_seed(0)

    def forward(x):
        for number, layer in enumerate(model):
            x = x + layer(x) if number == 0 or torch.rand((), generator=chance) > 0.1 else x
        return x

    return fit(model, forward, steps)


def discriminator(steps):
    model = part()
    return fit(model, lambda x: model(x) - model(-x), steps)


@pytest.mark.parametrize("given", [True, False])
def test_checkpointed_blocks_speak_for_recomputation(given):
    said = found(checkpointed(20), steps=20 if given else None)
    whole, first = "+ small whole numbers of updates per step: 2", "the first layer, stem.1, has none"
    assert said == {
        RECOMPUTED: [whole, f"+ {first}: few models recompute it"],
        SEVERAL: [
            "- not the layers of one part",
            "+ 2 updates per step in each: a real and a generated batch, two views or accumulated batches?",
        ],
        EARLIER: [
            "+ 20 batches more than steps in each layer",
            "- small whole numbers of updates per step would be chance",
            f"- {first}",
        ],
        DROPPED: [
            "- small whole numbers",
            *["- dropped layers count fewer batches than steps, not more"] * given,
        ],
    }


def test_a_shared_head_speaks_for_a_part_that_runs_several_times():
    said = found(with_a_shared_head(20), steps=20)
    assert said[SEVERAL] == [
        "+ all layers of head, and no others",
        "+ 5 updates per step in each: feature levels, views or accumulated batches?",
    ]
    assert [line[0] for line in said[EARLIER]] == ["+", "-", "-"]
    assert [line[0] for line in said[DROPPED]] == ["-", "-", "-"]


def test_a_fine_tuned_backbone_speaks_for_an_earlier_training():
    said = found(fine_tuned(20))
    assert said[EARLIER] == [
        "+ 7 batches more than steps in each layer",
        "+ not small whole numbers",
        "+ the first layer, backbone.1, has them",
    ]
    assert said[RECOMPUTED] == [
        "- not small whole numbers of updates per step: 1.35",
        "- the first layer, backbone.1, has them: few models recompute it",
    ]
    assert said[SEVERAL] == ["+ all layers of backbone, and no others"]
    assert said[DROPPED] == ["+ not small whole numbers"]
    assert "- small whole numbers of updates per step would be chance" in found(fine_tuned(7))[EARLIER]


def test_layers_that_are_dropped_speak_for_it():
    said = found(with_layerdrop(100))
    assert said[DROPPED] == ["+ not small whole numbers"]
    assert [line[0] for line in said[RECOMPUTED] + said[SEVERAL]] == ["-"] * 4
    assert said[EARLIER][0] == said[SEVERAL][1] == "- not equally many in each layer"
    assert found(with_layerdrop(100), steps=100) == {}


def test_a_discriminator_of_which_the_steps_are_known_speaks_for_a_part_that_runs_several_times():
    said = found(discriminator(20), steps=20)
    assert said[SEVERAL] == [
        "+ all layers of the model, and no others",
        "+ 2 updates per step in each: a real and a generated batch, two views or accumulated batches?",
    ]
    assert found(discriminator(20)) == {}


def test_updates_that_no_recomputation_makes_are_not_small_whole_numbers():
    assert read(causes({"a": 1, "b": 17}, 1, True, True))[RECOMPUTED][0].startswith("- not small whole numbers of upd")
    assert read(causes({"a": 1, "b": 16}, 1, True, True))[RECOMPUTED][0].startswith("+ small whole numbers of updates")
    assert read(causes({"a": 10, "b": 25}, 10, True, True))[DROPPED][1] == (
        "- more than 2 updates per step: few would drop so many"
    )
    assert len(read(causes({"a": 10, "b": 15}, 10, True, True))[DROPPED]) == 1
    five = causes({"a": 10, **{f"b{number}": 10 * number for number in (2, 3, 4, 5, 6)}}, 10, True, True)
    assert read(five)[RECOMPUTED][0] == "+ small whole numbers of updates per step: 2, 3, 4, 5, ..."
    four = causes({"a": 10, **{f"b{number}": 10 * number for number in (2, 3, 4, 5)}}, 10, True, True)
    assert read(four)[RECOMPUTED][0] == "+ small whole numbers of updates per step: 2, 3, 4, 5"


def test_a_little_more_than_once_is_no_whole_number():
    said = read(causes({"a": 1000, "b": 1005}, 1000, True, True))
    assert said[RECOMPUTED][0] == "- not small whole numbers of updates per step: 1.005"


def test_where_the_order_of_the_layers_is_not_known_the_first_one_says_nothing():
    for ordered in (True, False):
        lines = causes({"a": 1, "b": 2}, 1, True, ordered)
        assert ("the first layer, a, has none" in "\n".join(lines)) is ordered
        assert len(read(lines)) == 4


@pytest.mark.parametrize(
    ("more", "others", "part"),
    [
        (["head.a.1", "head.b.1"], ["stem.1"], "head"),
        (["head.a.1", "head.b.1"], ["head.c", "stem.1"], None),
        (["head.a.1"], ["head.c", "stem.1"], "head.a"),
        (["head.1"], ["head.11"], "head.1"),
        (["head", "head.1"], ["heads.1"], "head"),
        (["a.1", "b.1"], ["c.1"], None),
        (["a.1", "b.1"], [], "the model"),
        (["(the model)"], [], "the model"),
    ],
)
def test_a_part_is_the_largest_that_holds_these_layers_and_no_others(more, others, part):
    said = read(causes({**dict.fromkeys(others, 1), **dict.fromkeys(more, 2)}, 1, True, True))[SEVERAL][0]
    assert said == ("- not the layers of one part" if part is None else f"+ all layers of {part}, and no others")


def test_a_whole_number_may_be_off_by_less_than_one_step_or_one_percent():
    assert [recomputed(count, 10) for count in (8, 9, 10, 11, 12, 18, 19, 20, 21, 22)] == [
        *(None, None, 1, None, None),
        *(None, 2, 2, 2, None),
    ]
    assert [recomputed(count, 1000) for count in (1979, 1980, 1981, 2019, 2020, 2021)] == [None, None, 2, 2, None, None]
    assert [recomputed(count, 10_000) for count in (19_800, 19_801, 20_199, 20_200)] == [None, 2, 2, None]
    assert [recomputed(count, 1) for count in (1, 16, 17)] == [1, 16, None]
    assert recomputed(1, 10) is None
    assert nearly(21, 2, 10)
    assert not nearly(22, 2, 10)
