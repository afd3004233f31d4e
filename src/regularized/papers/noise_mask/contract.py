"""What the contract suite checks of the noise mask."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import ProcedureSubject
from regularized.overfitting.noise_mask.layer import BetaMaskPolicy, MaskedInput, NoiseMask
from regularized.overfitting.noise_mask.procedure import NoiseMaskPretraining
from regularized.training.data import TensorData


def small_policy(grid: int = 4) -> BetaMaskPolicy:
    """A policy of images of 8 x 8 pixels."""
    return BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), features=6, grid=grid)


class _Unmasked(NoiseMask):
    """Draws the mask and leaves the images as they are."""

    def forward(self, images: Tensor, *, cells: Tensor | None = None) -> MaskedInput:
        """(B, C, S, S)."""
        return super().forward(images, cells=cells)._replace(images=images)


def _build(coupled: bool = True, mask: type[NoiseMask] = NoiseMask) -> NoiseMaskPretraining:
    sgd = partial(torch.optim.SGD, momentum=0.9)
    return NoiseMaskPretraining(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout(0.1)),
        mask(small_policy(), kernel=3, sigma=1.0),
        optimizer=partial(sgd, lr=0.05),
        policy_optimizer=partial(sgd, lr=0.005),
        credit="batch" if coupled else "sample",
        coupled=coupled,
    )


def _data() -> TensorData:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, 8, 8, generator=generator)
    return TensorData(x, torch.arange(24) % 3, batch_size=8, seed=1)


def _train(pretraining: NoiseMaskPretraining, epochs: int) -> None:
    pretraining.fit(_data(), epochs=pretraining.epoch + epochs)


def _weights(pretraining: NoiseMaskPretraining) -> Mapping[str, Tensor]:
    state = {f"classifier.{name}": tensor for name, tensor in pretraining.classifier.state_dict().items()}
    return state | {f"policy.{name}": tensor for name, tensor in pretraining.noise_mask.state_dict().items()}


def subjects() -> list[ProcedureSubject]:
    """The official loss, and the one with credit for each image and the plain gradient."""
    return [
        ProcedureSubject("official", _build, partial(_build, mask=_Unmasked), _train, _weights),
        ProcedureSubject(
            "credit for each image",
            partial(_build, coupled=False),
            partial(_build, coupled=False, mask=_Unmasked),
            _train,
            _weights,
        ),
    ]
