"""Can crops of two frames be matched without labels, and do wrong pairs hurt less when they are weighted down?

Each image of Fashion-MNIST is an individual. A video shows twelve of them: frame a as they are, frame b turned, scaled,
shifted and in another light, in another order; with some probability one has left and a stranger has come. A small
convolutional network learns from random weights. It is judged on images that it has never seen: a warped one must find
its original among all.

Claims: ``matching_bootstraps`` (after training most pairs are true, where nobody leaves), ``reliability_helps`` (where
40 % leave, weighting by reliability beats InfoNCE on the same matching), ``no_harm`` (where nobody leaves it costs
nothing), ``over_augmentation`` (both beat pairs that are made of one crop). A control is told the true pairs. Learning
rate and temperature are the best of six trials for each, by rank-1 on validation images. Six minutes on one core, with
the trials. *Paper* scale: crops of your own videos, a ResNet-50, and Market-1501.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets.samples import display_name, draw, resplit
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning
from regularized.evidence.models import seeded
from regularized.papers.identity_seeking import published
from regularized.self_supervised.identity_seeking.loss import (
    InterFrameContrastive,
    inter_frame_contrast,
    reliability_loss,
)
from regularized.self_supervised.identity_seeking.retrieval import Retrieval, retrieval_scores
from regularized.training.randomness import mix

DEFAULTS: Mapping[str, Any] = {
    "pairs": "matched",
    "q": 0.0,
    "leave": 0.4,
    "lr": 1e-3,
    "tau": 0.1,
    "trained": True,
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"data": "digits", "train": 200, "validation": 50, "test": 60, "steps": 4, "videos": 2, "people": 6},
    "laptop": {
        "data": "fashion_mnist",
        "train": 3000,
        "validation": 300,
        "test": 600,
        "steps": 300,
        "videos": 4,
        "people": 12,
    },
    # What is published: ResNet-50 or Swin-B, 512 features, images of 256 x 128; steps, batch and rates are ours.
    "paper": {"data": "videos", "steps": 200_000, "videos": 32, "people": 0, "lr": 1e-4},
}

ARMS: Mapping[str, Mapping[str, Any]] = {
    "untrained": {"leave": 0.0, "trained": False},
    "augmentation": {"pairs": "augmented", "lr": 0.001, "tau": 0.2},
    "matching": {"q": 0.0, "lr": 0.001, "tau": 0.05},
    "reliability": {"q": 1.0, "lr": 0.003, "tau": 0.05},
    "true_pairs": {"pairs": "true", "lr": 0.003, "tau": 0.1},
    "matching_all_stay": {"q": 0.0, "leave": 0.0, "lr": 0.001, "tau": 0.05},
    "reliability_all_stay": {"q": 1.0, "leave": 0.0, "lr": 0.003, "tau": 0.05},
}

_GRID = [{"lr": lr, "tau": tau} for lr in (1e-3, 3e-3) for tau in (0.05, 0.1, 0.2)]
TUNING = Tuning(
    metric="validation_rank_1",
    direction="higher",
    grids=dict.fromkeys(("augmentation", "matching", "reliability", "true_pairs"), _GRID),
)

SEEDS = Seeds()

_WIDTH = 64


def about(s: Mapping[str, Any]) -> About:
    """Images that no two seeds share."""
    if s["data"] == "videos":
        return published.about()
    weights = sum(p.numel() for p in encoder(14).parameters())
    data = f"{s['train']:,} {display_name(s['data'])} as individuals"
    return About(data, s["train"], "two convolutions", weights, resplit(s["data"], train=s["train"], test=s["test"]))


def encoder(size: int) -> nn.Module:
    """Two convolutions and a linear layer; (n, 1, size, size) to (n, 64)."""
    inside = math.ceil(math.ceil(size / 2) / 2)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48 * inside**2, _WIDTH),
    )


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train on pairs of frames; find unseen individuals, and look at the pairs that are made now."""
    if s["data"] == "videos":
        return published.run(s, seed)
    sample = draw(s["data"], seed, train=s["train"], validation=s["validation"], test=s["test"])
    train, validation, test = (smaller(x) for x in (sample.train_x, sample.validation_x, sample.test_x))
    model = seeded(seed, encoder, train.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"])
    curve: list[tuple[float, float]] = []
    for step in range(s["steps"] if s["trained"] else 0):
        frames = film(train, s, seed=mix(seed, step))
        loss = contrast(model, frames, s)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, s["steps"] // 6) == 0:
            curve.append((float(step + 1), found(model, validation, seed).rank[1]))
    scores = found(model, test, seed + 1)
    return Measurements(
        metrics={
            "validation_rank_1": 100 * found(model, validation, seed).rank[1],
            "rank_1": 100 * scores.rank[1],
            "mean_average_precision": 100 * scores.mean_average_precision,
            **pairs_made(model, train, s, seed),
        },
        curves={"validation_rank_1": [(step, 100 * rank) for step, rank in curve]} if curve else {},
        data=sample.fingerprint,
        curve_unit="step",
    )


def contrast(model: nn.Module, frames: "Film", s: Mapping[str, Any]) -> Tensor:
    """The loss of an arm."""
    second = frames.augmented if s["pairs"] == "augmented" else frames.second
    za, zb = model(frames.first), model(second)
    if s["pairs"] == "matched":
        loss: Tensor = InterFrameContrastive(tau=s["tau"], q=s["q"])(za, zb, frames.video, frames.video).loss
        return loss
    pairs = torch.arange(len(za))[:, None].expand(-1, 2) if s["pairs"] == "augmented" else frames.true_pairs
    similarity = F.normalize(za, dim=1) @ F.normalize(zb, dim=1).T
    return reliability_loss(inter_frame_contrast(similarity, pairs, tau=s["tau"]), s["q"]).mean()


# -- videos -------------------------------------------------------------------------------------


class Film(NamedTuple):
    """Two frames of each of several videos.

    Attributes:
        first: (n, 1, h, w) crops of frame a.
        second: (n, 1, h, w) crops of frame b, in an order of its own within each video.
        augmented: (n, 1, h, w) crops of frame a again, shifted and in another light: what can be made of one frame.
        video: (n,) video of each crop, of both frames.
        true_pairs: (k, 2) crops that show the same individual.
    """

    first: Tensor
    second: Tensor
    augmented: Tensor
    video: Tensor
    true_pairs: Tensor


def smaller(images: Tensor) -> Tensor:
    """At most 14 x 14 pixels."""
    return F.avg_pool2d(images, 2) if images.shape[-1] > 14 else images


def film(images: Tensor, s: Mapping[str, Any], *, seed: int) -> Film:
    """Videos of some of the images."""
    generator = torch.Generator().manual_seed(seed)
    count = s["videos"] * s["people"]
    chosen = torch.randperm(len(images), generator=generator)[: 2 * count]
    people, strangers = chosen[:count], chosen[count:]
    leaves = torch.rand(count, generator=generator) < s["leave"]
    video = torch.arange(s["videos"]).repeat_interleave(s["people"])
    order = torch.cat([
        number * s["people"] + torch.randperm(s["people"], generator=generator) for number in range(s["videos"])
    ])  # fmt: skip
    second = torch.where(leaves, strangers, people)[order]
    pairs = torch.stack([order, torch.arange(count)], dim=1)[~leaves[order]]
    first = images[people]
    return Film(
        first,
        warped(images[second], generator),
        warped(first, generator, turn=0.0, grow=0.0),
        video,
        pairs[pairs[:, 0].argsort()],
    )


def warped(images: Tensor, generator: torch.Generator, *, turn: float = 0.25, grow: float = 0.12) -> Tensor:
    """Turned, scaled, shifted, in another light, and with noise.

    Args:
        images: (n, 1, h, w).
        generator: of the draws.
        turn: standard deviation of the angle, in radians.
        grow: standard deviation of the scale.
    """
    angle, scale, x, y, light = torch.randn(5, len(images), generator=generator).unbind()
    angle, scale = turn * angle, 1.0 + grow * scale
    shift = 0.15 * torch.stack([x, y], dim=1)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(
        torch.cat([scale[:, None, None] * rotation, shift[:, :, None]], dim=2), list(images.shape), align_corners=False
    )
    moved = F.grid_sample(images - images.amin(), grid, align_corners=False) + images.amin()
    noise = 0.15 * torch.randn(images.shape, generator=generator)
    return moved * (1.0 + 0.2 * light[:, None, None, None]) + noise


# -- judging ------------------------------------------------------------------------------------


@torch.no_grad()
def found(model: nn.Module, images: Tensor, seed: int, *, draws: int = 3) -> Retrieval:
    """Warped images among the originals, mean over some draws of the warping."""
    ids, gallery = torch.arange(len(images)), model(images)
    scores = [
        retrieval_scores(
            model(warped(images, torch.Generator().manual_seed(mix(seed, number, 7)))), gallery, ids, ids, ranks=(1,)
        )
        for number in range(draws)
    ]
    rank = sum(one.rank[1] for one in scores) / draws
    return Retrieval({1: rank}, sum(one.mean_average_precision for one in scores) / draws, len(images))


@torch.no_grad()
def pairs_made(
    model: nn.Module, images: Tensor, s: Mapping[str, Any], seed: int, *, films: int = 20
) -> dict[str, float]:
    """Share of the true ones among matched pairs, and how much true and wrong ones weigh."""
    matched = InterFrameContrastive(tau=s["tau"])
    weights: dict[bool, list[Tensor]] = {True: [], False: []}
    for number in range(films):
        frames = film(images, s, seed=mix(seed, number, 8))
        out = matched(model(frames.first), model(frames.second), frames.video, frames.video)
        true = (out.pairs[:, None] == frames.true_pairs).all(dim=2).any(dim=1)
        for kind in (True, False):
            weights[kind].append(out.reliability[true == kind])
    true_weights, wrong_weights = (torch.cat(weights[kind]) for kind in (True, False))
    total = len(true_weights) + len(wrong_weights)
    return {
        "true_pair_share": 100 * len(true_weights) / total,
        "weight_of_true_pairs": float(true_weights.mean()) if len(true_weights) else 0.0,
        "weight_of_wrong_pairs": float(wrong_weights.mean()) if len(wrong_weights) else 0.0,
    }
