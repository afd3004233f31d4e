"""Bad inputs of `hard_patches`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.mechanisms.patches import split_of
from regularized.papers.hard_patches.contract import small_autoencoder
from regularized.self_supervised.hard_patches import (
    HardPatchMining,
    MaskedAutoencoder,
    PatchTransformer,
    TimmEncoder,
    absolute_loss,
    epoch_decay,
    grid_positions,
    hard_patch_split,
    hidden_patches,
    reconstruction_losses,
    relative_loss,
)
from regularized.self_supervised.pretraining import Pretraining
from regularized.training.finite import NonFiniteLoss
from regularized.training.progress import Progress

LAST = Progress(step=0, total_steps=1, epoch=9, total_epochs=10)


def _images():
    return torch.randn(2, 2, 8, 12)


def _mining(**settings):
    return HardPatchMining(small_autoencoder(), **settings)


def _diverged():
    method = _mining()
    nn.init.constant_(method.teacher.module.predictor.head.bias, torch.nan)
    method(_images(), LAST)


def _followed_too_early():
    method = _mining()
    method(_images(), LAST).loss.backward()
    method.after_step(LAST)


def _not_finite():
    training = Pretraining(_mining(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    training.fit([_images() * torch.inf], epochs=100)


def _plain_mae():
    encoder = PatchTransformer(8, patch_size=2, channels=2, width=8, depth=1, heads=2)
    return MaskedAutoencoder(encoder, decoder_width=8, decoder_depth=1, decoder_heads=2, predictor_depth=0)


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    return [
        refused("ratio 1", lambda: _mining(mask_ratio=1.0), ValueError, ("mask_ratio", "(0, 1)", "1.0", "0.75")),
        refused("nothing to see", lambda: hidden_patches(4, 0.9), ValueError, ("0 of 4 patches", "visible")),
        refused("nothing hidden", lambda: hidden_patches(4, 1e-17), ValueError, ("4 of 4 patches", "visible")),
        refused("hard above 1", lambda: _mining(hard=1.5), ValueError, ("hard", "[0, 1]", "1.5")),
        refused("schedule above 1", lambda: _mining(hard=lambda p: 2.0)(_images(), LAST), ValueError, ("hard", "2.0")),
        refused(
            "reduced difficulty",
            lambda: relative_loss(torch.zeros(2, 3), torch.tensor(0.5)),
            ValueError,
            ("(B, M)", "not their mean", "()"),
        ),
        refused(
            "other shape",
            lambda: absolute_loss(torch.zeros(2, 3), torch.zeros(2, 4)),
            ValueError,
            ("(2, 3)", "(2, 4)"),
        ),
        refused("one patch", lambda: absolute_loss(torch.zeros(2, 1), torch.zeros(2, 1)), ValueError, ("at least 2",)),
        refused(
            "other pixels",
            lambda: reconstruction_losses(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)),
            ValueError,
            ("(2, 3, 4)", "(2, 3, 5)"),
        ),
        refused(
            "behind the end",
            lambda: _mining()(_images(), Progress(0, 1, epoch=10, total_epochs=10)),
            ValueError,
            ("epoch 10 of 10", "counted from 0"),
        ),
        refused("no progress", lambda: _mining()(_images(), 0.5), TypeError, ("Progress", "total_epochs", "0.5")),
        refused(
            "rows of a mask",
            lambda: split_of(torch.tensor([[True, False, False], [True, True, False]])),
            ValueError,
            ("row 0 hides 1", "row 1 hides 2"),
        ),
        refused(
            "side and patch",
            lambda: PatchTransformer(10, patch_size=4, width=8, depth=1, heads=2),
            ValueError,
            ("10 x 10", "multiples of 4"),
        ),
        refused(
            "other images",
            lambda: _mining()(torch.randn(2, 2, 8, 8), LAST),
            ValueError,
            ("4 x 6 patches", "16", "image_size"),
        ),
        refused("scores NaN", lambda: hard_patch_split(torch.full((2, 8), torch.nan), hard=0.5), ValueError, ("NaN",)),
        refused("the copy diverged", _diverged, ValueError, ("finite", "diverged", "learning rate")),
        refused("before the step", _followed_too_early, UserWarning, ("after_step", "optimizer's step")),
        refused("pixels infinite", _not_finite, NonFiniteLoss, ("not finite", "epoch 0")),
        refused("scores of one image", lambda: hard_patch_split(torch.zeros(8), hard=0.5), ValueError, ("(B, N)",)),
        refused("no autoencoder", lambda: HardPatchMining(nn.Linear(2, 2)), TypeError, ("MaskedAutoencoder", "Linear")),
        refused(
            "no encoder of patches", lambda: MaskedAutoencoder(nn.Linear(2, 2)), TypeError, ("embed", "TimmEncoder")
        ),
        refused("no predictor", lambda: HardPatchMining(_plain_mae()), ValueError, ("predictor_depth", "hard=0")),
        refused("no scores", lambda: _plain_mae().scores(torch.zeros(1, 2, 8, 8)), ValueError, ("predictor_depth",)),
        refused("not a timm model", lambda: TimmEncoder(nn.Linear(2, 2)), TypeError, ("patch_embed", "PatchEncoder")),
        refused("eps", lambda: relative_loss(torch.zeros(1, 2), torch.ones(1, 2), eps=-1.0), ValueError, ("eps",)),
        refused("weight", lambda: _mining(weight=-1.0), ValueError, ("weight", ">= 0", "-1.0")),
        refused("decay", lambda: _mining(decay=2.0), ValueError, ("decay", "[0, 1]", "2.0")),
        refused("decay of epochs", lambda: epoch_decay(epochs=0), ValueError, ("epochs", "at least 1")),
        refused("width of positions", lambda: grid_positions((2, 2), 6), ValueError, ("multiple of 4", "6")),
        refused(
            "heads",
            lambda: PatchTransformer(8, patch_size=4, width=12, depth=1, heads=5),
            ValueError,
            ("multiple of heads", "12 and 5"),
        ),
        refused(
            "nothing to train",
            lambda: Pretraining(small_autoencoder().requires_grad_(False), optimizer=torch.optim.Adam),
            ValueError,
            ("MaskedAutoencoder", "no parameter"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
