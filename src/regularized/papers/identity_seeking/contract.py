"""What the contract suite checks of identity seeking: pretraining on frame pairs, with and without a warm-up."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import ProcedureSubject
from regularized.self_supervised.identity_seeking.loss import InterFrameContrastive
from regularized.self_supervised.identity_seeking.pretext import IdentitySeeking
from regularized.self_supervised.identity_seeking.sampler import FramePairs
from regularized.self_supervised.pretraining import Pretraining
from regularized.training.progress import piecewise


def frames() -> FramePairs:
    """Six videos of three frames with four individuals: the same features, with noise."""
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(6, 1, 4, 8, generator=generator)
    crops = (people + 0.3 * torch.randn(6, 3, 4, 8, generator=generator)).flatten(0, 2)
    places = torch.arange(6 * 3 * 4)
    return FramePairs(crops, places // 12, places // 4 % 3, videos_per_batch=2, max_gap=2)


def build(**options: Any) -> Pretraining:
    """A perceptron as the encoder."""
    encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    q = options.pop("q", 1.0)
    pretext = IdentitySeeking(encoder, InterFrameContrastive(**options), q=q)
    return Pretraining(pretext, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def _train(training: Pretraining, epochs: int) -> None:
    training.fit(frames(), epochs=training.epoch + epochs)


def _weights(training: Pretraining) -> Mapping[str, Tensor]:
    return dict(training.pretext.state_dict())


def subjects() -> list[ProcedureSubject]:
    """Plain is InfoNCE on the same matching."""
    plain = partial(build, q=0.0)
    return [
        ProcedureSubject("reliability", build, plain, _train, _weights),
        ProcedureSubject(
            "warm-up, normalized weights",
            partial(build, q=piecewise({0.5: 1.0}, initial=0.0), normalize_weights=True, min_similarity=0.0),
            plain,
            _train,
            _weights,
        ),
    ]
