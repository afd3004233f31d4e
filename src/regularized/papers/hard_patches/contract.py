"""What the contract suite checks of hard patches mining: pretraining with the copy's masks, and with other losses."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.contract import ProcedureSubject
from regularized.self_supervised.hard_patches.autoencoder import MaskedAutoencoder
from regularized.self_supervised.hard_patches.encoder import PatchTransformer
from regularized.self_supervised.hard_patches.mining import HardPatchMining
from regularized.self_supervised.pretraining import Pretraining
from regularized.training.data import TensorData


def small_autoencoder() -> MaskedAutoencoder:
    """For images of 8 x 12 pixels in two channels, 24 patches."""
    encoder = PatchTransformer((8, 12), patch_size=2, channels=2, width=16, depth=1, heads=2)
    return MaskedAutoencoder(encoder, decoder_width=8, decoder_depth=1, decoder_heads=2)


def _build(**settings: Any) -> Pretraining:
    mining = HardPatchMining(small_autoencoder(), decay=0.9, **settings)
    return Pretraining(mining, optimizer=partial(torch.optim.AdamW, lr=3e-3))


def _train(pretraining: Pretraining, epochs: int) -> None:
    images = torch.randn(12, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    pretraining.fit(TensorData(images, batch_size=4, seed=1), epochs=pretraining.epoch + epochs)


def _weights(pretraining: Pretraining) -> Mapping[str, Tensor]:
    assert isinstance(pretraining.pretext, HardPatchMining)
    return pretraining.pretext.model.state_dict()


def subjects() -> list[ProcedureSubject]:
    """The official scheme against a plain autoencoder; the ranking alone; the ablation with absolute losses."""
    plain = partial(_build, hard=0.0, weight=0.0)
    return [
        ProcedureSubject("easy to hard", _build, plain, _train, _weights),
        ProcedureSubject("ranking alone", partial(_build, hard=0.0), plain, _train, _weights),
        ProcedureSubject("absolute losses", partial(_build, relative=False), plain, _train, _weights),
    ]
