"""Bootstrap Masked Visual Modeling via Hard Patches Mining."""

from regularized.self_supervised.hard_patches.autoencoder import Decoder, MaskedAutoencoder, Prediction
from regularized.self_supervised.hard_patches.encoder import (
    PatchEncoder,
    PatchTransformer,
    TimmEncoder,
    grid_positions,
)
from regularized.self_supervised.hard_patches.loss import (
    absolute_loss,
    reconstruction_losses,
    relative_loss,
    standardised_patches,
)
from regularized.self_supervised.hard_patches.masking import hard_patch_split, hidden_patches
from regularized.self_supervised.hard_patches.mining import HardPatchMining, Mined, epoch_decay

__all__ = [
    "Decoder",
    "HardPatchMining",
    "MaskedAutoencoder",
    "Mined",
    "PatchEncoder",
    "PatchTransformer",
    "Prediction",
    "TimmEncoder",
    "absolute_loss",
    "epoch_decay",
    "grid_positions",
    "hard_patch_split",
    "hidden_patches",
    "reconstruction_losses",
    "relative_loss",
    "standardised_patches",
]
