"""The study measures what it says: a replay is what torch would have done, and the page says what the data say."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
from momentum_fix import corrected_momentum  # noqa: E402
from study import Record, Variant, passes  # noqa: E402

STEPS = 16


def small_net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5), nn.BatchNorm1d(5))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator) * (1 + i % 3) + i % 2 for i in range(STEPS)]


def recorded():
    """Give the record of a network that does not learn, as the study's runs make it."""
    torch.manual_seed(0)
    net = small_net()
    record = Record(net, STEPS)
    for x in batches():
        net(x)
        record.add()
    return record


def really(updates, momentum):
    """Give the buffers after torch itself has updated them with these batches, one after the other."""
    torch.manual_seed(0)
    net = small_net()
    record = Record(net, 1)
    for layer in record.layers:
        layer.momentum = momentum
    for x in updates:
        net(x)
    return record._read()


ORDERS = {
    "1 pass": (passes(1), lambda x: x),
    "2 passes": (passes(2), lambda x: [b for b in x for _ in range(2)]),
    "5 passes, m = 0.3": (passes(5, 0.3), lambda x: [b for b in x for _ in range(5)]),
    "A B B A": (Variant(0.1, "ABBA"), lambda x: [x[i + j] for i in range(0, STEPS, 2) for j in (0, 1, 1, 0)]),
    "A B A B, root": (
        Variant(corrected_momentum(0.1), "ABAB"),
        lambda x: [x[i + j] for i in range(0, STEPS, 2) for j in (0, 1, 0, 1)],
    ),
    "8 in flight": (
        Variant(0.1, 2 * study.PIPELINE),
        lambda x: [x[i + j % 8] for i in range(0, STEPS, 8) for j in range(16)],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_replayed_variant_is_what_torch_does_when_it_really_makes_these_updates(name):
    variant, order = ORDERS[name]
    replayed = recorded().replay(variant, [1, 1])
    torch.testing.assert_close(replayed, really(order(batches()), variant.momentum), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", list(ORDERS)[1:])
def test_a_replayed_variant_is_not_what_torch_does_with_one_pass(name):
    replayed = recorded().replay(ORDERS[name][0], [1, 1])
    assert (replayed - really(batches(), 0.1)).abs().max() > 1e-4


def test_nested_passes_are_replayed_layer_by_layer():
    replayed = recorded().replay(study.VARIANTS["nested"], [2, 5])
    twice, five_times = (really([b for b in batches() for _ in range(k)], 0.1) for k in (2, 5))
    torch.testing.assert_close(replayed, torch.cat([twice[:8], five_times[8:]]), rtol=1e-12, atol=1e-14)


def test_a_full_pass_is_torchs_update_bn():
    torch.manual_seed(0)
    net = small_net()
    x = torch.cat(batches())
    found = study.full_pass(net, x, batch=6)
    torch.optim.swa_utils.update_bn(x.split(6), net)
    torch.testing.assert_close(found, Record(net, 1)._read(), rtol=1e-12, atol=1e-14)
