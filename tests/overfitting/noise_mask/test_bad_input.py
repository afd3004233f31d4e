"""Bad inputs of `noise_mask`: each is answered by what was given, what is allowed, and how to mend it."""

from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor, nn

from regularized.overfitting.noise_mask.layer import NoiseMask
from regularized.overfitting.noise_mask.loss import noise_mask_objective
from regularized.overfitting.noise_mask.procedure import NoiseMaskPretraining
from regularized.papers.noise_mask.contract import small_policy


def _shared_parameters():
    policy = small_policy()
    sgd = partial(torch.optim.SGD, lr=0.1)
    NoiseMaskPretraining(policy.backbone, NoiseMask(policy), optimizer=sgd, policy_optimizer=sgd)


class _HalfMask(NoiseMask):
    """Always a mask of one half, which concentrations near 0 make very unlikely."""

    def forward(self, images: Tensor, *, cells: Tensor | None = None):
        return super().forward(images, cells=torch.full((len(images), 16), 0.5))


def _negative_density():
    policy = small_policy()
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


def _large_concentration():
    policy = small_policy()
    policy.base_alpha.fill_(50.0)
    NoiseMask(policy, kernel=3, sigma=1.0)(torch.rand(4, 1, 8, 8))


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    images = torch.rand(4, 1, 8, 8)
    return [
        refused(
            "grid > image", lambda: NoiseMask(small_policy(9), kernel=1)(images), ValueError, ("grid of 9", "8 pixels")
        ),
        refused("even kernel", lambda: NoiseMask(small_policy(), kernel=4), ValueError, ("kernel must be odd", "4")),
        refused(
            "kernel too wide", lambda: NoiseMask(small_policy(), kernel=17)(images), ValueError, ("reflected", "15")
        ),
        refused(
            "sigma <= 0", lambda: NoiseMask(small_policy(), sigma=0.0), ValueError, ("sigma must be positive", "0.0")
        ),
        refused(
            "batch of 1", lambda: NoiseMask(small_policy(), kernel=3)(images[:1]), ValueError, ("at least 2", "got 1")
        ),
        refused(
            "loss of another shape with credit='batch'",
            lambda: noise_mask_objective(torch.rand(7), torch.rand(4)),
            ValueError,
            ("credit='batch'", "(7,)"),
        ),
        refused(
            "mean loss with credit='sample'",
            lambda: noise_mask_objective(torch.tensor(1.0), torch.rand(4), credit="sample"),
            ValueError,
            ("credit='sample'", 'reduction="none"'),
        ),
        refused("negative q", _negative_density, UserWarning, ("log density", "coupled=False")),
        refused("concentration overflows", _large_concentration, UserWarning, ("clamped", "learning rate")),
        refused("shared parameters", _shared_parameters, ValueError, ("share 2 parameter", "backbone of its own")),
        refused(
            "not images", lambda: NoiseMask(small_policy())(torch.rand(4, 64)), ValueError, ("square images", "(4, 64)")
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
