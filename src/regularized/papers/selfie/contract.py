"""What the contract suite checks of Selfie: pretraining of a trunk by the quiz."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import ProcedureSubject
from regularized.self_supervised.pretraining import Pretraining
from regularized.self_supervised.selfie.layer import AttentionPool
from regularized.self_supervised.selfie.pretext import Selfie
from regularized.training.data import TensorData


def small_trunk() -> nn.Sequential:
    """Two convolutions with batch normalisation, from (n, 2, P, P) to (n, 8, P / 2, P / 2)."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
    )


def small_selfie(pool: nn.Module | None = None) -> Selfie:
    """For images of 12 x 16 pixels, 12 patches of which three are cut out."""
    pool = AttentionPool(8, depth=1, heads=2, hidden=16) if pool is None else pool
    return Selfie(small_trunk(), dim=8, patch_size=4, grid=(3, 4), pool=pool)


class _Blind(nn.Module):
    """A summary that is the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.summary = nn.Parameter(torch.zeros(8))

    def forward(self, vectors: Tensor) -> Tensor:
        return self.summary.expand(len(vectors), -1)


def _build(blind: bool = False) -> Pretraining:
    selfie = small_selfie(_Blind() if blind else None)
    return Pretraining(selfie, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True))


def _train(pretraining: Pretraining, epochs: int) -> None:
    images = torch.randn(12, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    pretraining.fit(TensorData(images, batch_size=4, seed=1), epochs=pretraining.epoch + epochs)


def _weights(pretraining: Pretraining) -> Mapping[str, Tensor]:
    assert isinstance(pretraining.pretext, Selfie)
    return pretraining.pretext.trunk.state_dict()


def subjects() -> list[ProcedureSubject]:
    """The quiz, against one in which nothing is known of the image but where the holes are."""
    return [ProcedureSubject("pretraining", _build, partial(_build, blind=True), _train, _weights)]
