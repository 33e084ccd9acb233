"""The zoo: what its page says is what its data say, and its methods are told apart."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import zoo  # noqa: E402
from recipes import block  # noqa: E402
from twins import non_reentrant, plainly  # noqa: E402


class Model(nn.Module):
    """A stem that is not recomputed, and a body that can be."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.ckpt = block(), block(), plainly

    def set_grad_checkpointing(self, on=True):
        self.ckpt = non_reentrant if on else plainly

    def forward(self, x):
        return self.ckpt(self.body, self.stem(x))


def test_the_methods_are_told_apart_on_a_model_with_a_stem():
    found = zoo.measured(Model())
    assert found["passes"] == {"1": 1, "2": 1}
    right = [name for name, off in found["off"].items() if off < zoo.RIGHT]
    assert right == ["`calibrate`", "`update_once`"]
    assert min(found["off"][name] for name in ("nothing", "two passes everywhere")) > 1e-3


def test_without_checkpointing_everything_but_the_root_is_right():
    model = Model()
    model.set_grad_checkpointing = lambda on: None
    found = zoo.measured(model)
    assert found["passes"] == {"1": 2}
    assert [name for name, off in found["off"].items() if off >= zoo.RIGHT] == ["two passes everywhere"]


def test_statistics_that_are_no_numbers_are_refused():
    model = Model()
    model.stem[0].weight.data.fill_(torch.nan)
    with pytest.raises(AssertionError):
        zoo.measured(model)


def test_torchvisions_switch_is_found_in_the_layers():
    model = nn.Sequential(nn.Identity())
    model[0].memory_efficient = False
    zoo.switch(model, True)
    assert model[0].memory_efficient
    zoo.switch(model, False)
    assert not model[0].memory_efficient


def test_the_page_is_made_of_the_data():
    assert zoo.DOCUMENT.read_text(encoding="utf-8") == zoo.page(zoo.load())


def test_other_data_make_another_page_and_another_sentence():
    data = zoo.load()
    other = copy.deepcopy(data)
    other["models"][0]["off"]["`calibrate`"] = 1e-9
    assert zoo.page(other) != zoo.page(data)
    said = [re.findall(r"\b(none|\d+)\b", zoo.sentence(either)) for either in (data, other)]
    numbers = [[0 if word == "none" else int(word) for word in words] for words in said]
    assert numbers[0] == [len(data["models"]), *(zoo.right(data, name) for name in zoo.METHODS)]
    assert [a - b for a, b in zip(*numbers, strict=True)] == [0, 0, 0, 1, 0]


def test_a_document_that_quotes_the_sentence_quotes_these_data():
    readme = zoo.README.read_text(encoding="utf-8")
    assert zoo.quoting(readme, zoo.load()) == readme
    quoted = zoo.quoting("before\n<!-- zoo -->\nold\n<!-- /zoo -->\nafter\n", zoo.load())
    assert " ".join(quoted.split()) == f"before <!-- zoo --> {zoo.sentence(zoo.load())} <!-- /zoo --> after"


def test_the_models_are_those_of_the_data_and_each_has_a_layer_that_is_recomputed():
    data = zoo.load()
    listed = [(library, name) for library, names in zoo.MODELS.items() for name in names]
    assert [(model["library"], model["name"]) for model in data["models"]] == listed
    assert all(max(map(float, model["passes"])) > 1 for model in data["models"])
