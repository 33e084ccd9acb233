"""Two processes under DistributedDataParallel: the statistics of the same run without checkpointing."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from momentum_fix import calibrate, correct, corrected_momentum
from twins import batches, deviation, momenta, non_reentrant, plainly, same_path, train


class Net(nn.Module):
    """Runs its blocks under the checkpoint function that it is given, one of them in another."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh())
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh())
        self.ckpt = plainly

    def forward(self, x):
        return self.ckpt(lambda y: self.ckpt(self.inner, self.outer(y)).tanh(), x)


def step(model, x, _):
    model(x).square().sum().backward()


def run(model, data, ckpt):
    model.module.ckpt = ckpt
    return train(model, step, data, ckpt)


def worker(rank, file):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = Net()
    data = batches(4, 4, 3, 4, 4, seed=rank)
    truth, uncorrected, corrected, calibrated = (DistributedDataParallel(copy.deepcopy(net)) for _ in range(4))
    run(truth, data, plainly)
    run(uncorrected, data, non_reentrant)
    run(correct(corrected, {"module.outer": 2, "module.inner": 3}), data, non_reentrant)
    with calibrate(calibrated) as report:
        run(calibrated, data[:1], non_reentrant)
    run(calibrated, data[1:], non_reentrant)
    assert report.passes == {"module.outer.1": 2, "module.inner.1": 3}
    assert momenta(calibrated) == {
        f"module.{name}.1": corrected_momentum(0.1, k) for name, k in (("outer", 2), ("inner", 3))
    }
    for model in (uncorrected, corrected, calibrated):
        assert same_path(model, truth)
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(corrected, truth) < 1e-12
    assert deviation(calibrated, truth) < 1e-12
    dist.destroy_process_group()


def test_two_ranks_get_the_statistics_of_the_uncheckpointed_distributed_run(tmp_path):
    mp.spawn(worker, args=(tmp_path / "rendezvous",), nprocs=2)
