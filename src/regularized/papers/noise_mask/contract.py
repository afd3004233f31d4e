"""What the contract suite checks of the noise mask."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, ProcedureSubject
from regularized.overfitting.noise_mask.procedure import (
    BetaMaskPolicy,
    MaskedInput,
    NoiseMask,
    NoiseMaskPretraining,
    noise_mask_objective,
)
from regularized.training.data import TensorData


def _policy(grid: int = 4) -> BetaMaskPolicy:
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
        mask(_policy(), kernel=3, sigma=1.0),
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


def _shared_parameters() -> None:
    policy = _policy()
    sgd = partial(torch.optim.SGD, lr=0.1)
    NoiseMaskPretraining(policy.backbone, NoiseMask(policy), optimizer=sgd, policy_optimizer=sgd)


class _HalfMask(NoiseMask):
    """Always a mask of one half, which concentrations near 0 make very unlikely."""

    def forward(self, images: Tensor, *, cells: Tensor | None = None) -> MaskedInput:
        return super().forward(images, cells=torch.full((len(images), 16), 0.5))


def _negative_density() -> None:
    policy = _policy()
    for base in (policy.base_alpha, policy.base_beta):
        base.fill_(-8.0)
    sgd = partial(torch.optim.SGD, lr=0.01)
    pretraining = NoiseMaskPretraining(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        _HalfMask(policy, kernel=3, sigma=1.0),
        optimizer=sgd,
        policy_optimizer=sgd,
    )
    pretraining.fit([(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))], epochs=1)


def _large_concentration() -> None:
    policy = _policy()
    policy.base_alpha.fill_(50.0)
    NoiseMask(policy, kernel=3, sigma=1.0)(torch.rand(4, 1, 8, 8))


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    images = torch.rand(4, 1, 8, 8)
    return [
        BadInput(
            "grid > image", lambda: NoiseMask(_policy(9), kernel=1)(images), ValueError, ("grid of 9", "8 pixels")
        ),
        BadInput("even kernel", lambda: NoiseMask(_policy(), kernel=4), ValueError, ("kernel must be odd", "4")),
        BadInput("kernel too wide", lambda: NoiseMask(_policy(), kernel=17)(images), ValueError, ("reflected", "15")),
        BadInput("sigma <= 0", lambda: NoiseMask(_policy(), sigma=0.0), ValueError, ("sigma must be positive", "0.0")),
        BadInput("batch of 1", lambda: NoiseMask(_policy(), kernel=3)(images[:1]), ValueError, ("at least 2", "got 1")),
        BadInput(
            "loss of another shape with credit='batch'",
            lambda: noise_mask_objective(torch.rand(7), torch.rand(4)),
            ValueError,
            ("credit='batch'", "(7,)"),
        ),
        BadInput(
            "mean loss with credit='sample'",
            lambda: noise_mask_objective(torch.tensor(1.0), torch.rand(4), credit="sample"),
            ValueError,
            ("credit='sample'", 'reduction="none"'),
        ),
        BadInput("negative q", _negative_density, UserWarning, ("log density", "coupled=False")),
        BadInput("concentration overflows", _large_concentration, UserWarning, ("clamped", "learning rate")),
        BadInput("shared parameters", _shared_parameters, ValueError, ("share 2 parameter", "backbone of its own")),
        BadInput(
            "not images", lambda: NoiseMask(_policy())(torch.rand(4, 64)), ValueError, ("square images", "(4, 64)")
        ),
    ]
