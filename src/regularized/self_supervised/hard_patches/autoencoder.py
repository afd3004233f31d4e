"""The masked autoencoder with two decoders: one says what is hidden, the other how wrong the first will be.

:mod:`regularized.self_supervised.hard_patches.loss` has the symbols.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regularized.mechanisms.patches import Split, patch_vectors, take
from regularized.mechanisms.ranges import allowed, count
from regularized.self_supervised.hard_patches.encoder import (
    NORM_EPS,
    PatchEncoder,
    grid_positions,
    reset_linear,
    transformer,
)
from regularized.self_supervised.hard_patches.loss import standardised_patches

__all__ = ["Decoder", "MaskedAutoencoder", "Prediction"]

# Shapes: B images, N patches, V visible and M hidden, D features of the encoder, F of the decoders, E = P P C pixels.


class Prediction(NamedTuple):
    """What a :class:`MaskedAutoencoder` says of the hidden patches, in raster order."""

    patches: Tensor
    """(B, M, E) reconstructed pixels, standardised in each patch where the model was told so."""
    predicted: Tensor | None
    """(B, M) expected difficulty; None without a loss predictor."""


class Decoder(nn.Module):
    """Transformer layers on all tokens, then a norm and a linear layer on those that are asked for.

    Args:
        width: F, a multiple of ``heads``.
        depth: layers.
        heads: of the attention.
        outputs: numbers for each token.
        mean_of: start the last layer as the mean of so many drawn rows. The official loss predictor computes E numbers
            and takes their mean; that is one row, which is smaller at the start than a drawn one. Default 1.
    """

    def __init__(self, width: int, depth: int, heads: int, outputs: int, *, mean_of: int = 1) -> None:
        super().__init__()
        self.blocks: nn.Sequential = transformer(width, depth, heads)
        self.norm: nn.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head: nn.Linear = nn.Linear(width, outputs)
        reset_linear(self)
        if mean_of > 1:
            rows = nn.init.xavier_uniform_(torch.empty(mean_of * outputs, width))
            with torch.no_grad():
                self.head.weight.copy_(rows.view(mean_of, outputs, width).mean(dim=0))

    def forward(self, tokens: Tensor, last: int) -> Tensor:
        """(B, K + N, F) to (B, last, outputs) of the last tokens."""
        out: Tensor = self.head(self.norm(self.blocks(tokens)[:, -last:]))
        return out


class MaskedAutoencoder(nn.Module):
    """Sees some patches of an image and says what the others are, and how wrong it is about each.

    After pretraining keep ``encoder``.

    Args:
        encoder: :class:`~regularized.self_supervised.hard_patches.PatchTransformer`,
            :class:`~regularized.self_supervised.hard_patches.TimmEncoder`, or a module of your own with the methods of
            :class:`~regularized.self_supervised.hard_patches.PatchEncoder`.
        decoder_width: F, a multiple of 4 and of ``decoder_heads``; default 512 (official).
        decoder_depth: layers of the reconstructor; default 8 (official).
        decoder_heads: default 16 (official).
        predictor_depth: layers of the loss predictor; default None: as many as the reconstructor (official). Fewer
            make a step cheaper; 0 leaves the predictor out, which is a plain MAE.
        standardise: compare with standardised patches, see
            :func:`~regularized.self_supervised.hard_patches.standardised_patches`; default False (official
            scripts).

    Attributes:
        encoder: the encoder.
        reconstructor: the decoder that says what is hidden.
        predictor: the decoder that says how wrong the other is, or None.

    Raises:
        TypeError: the encoder lacks what a masked autoencoder asks of it.
        ValueError: a width fits neither heads nor positions.

    Examples:
        >>> from regularized.mechanisms.patches import random_split
        >>> from regularized.self_supervised.hard_patches.encoder import PatchTransformer
        >>> encoder = PatchTransformer(16, patch_size=4, channels=1, width=32, depth=2, heads=4)
        >>> model = MaskedAutoencoder(encoder, decoder_width=16, decoder_depth=1, decoder_heads=4)
        >>> images = torch.randn(5, 1, 16, 16)
        >>> out = model(images, random_split(5, 16, hidden=12))
        >>> out.patches.shape, out.predicted.shape, model.scores(images).shape
        (torch.Size([5, 12, 16]), torch.Size([5, 12]), torch.Size([5, 16]))
    """

    @allowed(
        decoder_depth=count(1), predictor_depth=count(0, "0 is a plain MAE").or_none("as deep as the reconstructor")
    )
    def __init__(
        self,
        encoder: nn.Module,
        *,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        predictor_depth: int | None = None,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, PatchEncoder):
            raise TypeError(
                f"{type(encoder).__name__} is no encoder of patches: it needs width, patch_size, grid, channels, "
                "prefix, embed(images) and encode(tokens); wrap a vision transformer of timm in TimmEncoder"
            )
        self.encoder = encoder
        pixels = encoder.patch_size**2 * encoder.channels
        depth = decoder_depth if predictor_depth is None else predictor_depth
        self.bridge: nn.Linear = nn.Linear(encoder.width, decoder_width)
        reset_linear(self.bridge)
        self.mask_token: nn.Parameter = nn.Parameter(0.02 * torch.randn(1, 1, decoder_width))
        self.register_buffer("positions", grid_positions(encoder.grid, decoder_width)[None], persistent=False)
        self.positions: Tensor
        self.reconstructor: Decoder = Decoder(decoder_width, decoder_depth, decoder_heads, pixels)
        self.predictor: Decoder | None = None
        if depth:
            self.predictor = Decoder(decoder_width, depth, decoder_heads, 1, mean_of=pixels)
        self.standardise = standardise

    @property
    def patches(self) -> int:
        """N, patches of an image."""
        return self.positions.shape[1]

    def targets(self, images: Tensor, split: Split) -> Tensor:
        """(B, M, E) pixels of the hidden patches, as the model is compared with them; without a graph."""
        hidden = take(patch_vectors(images.detach(), self.encoder.patch_size), split.hidden)
        return standardised_patches(hidden) if self.standardise else hidden

    def forward(self, images: Tensor, split: Split) -> Prediction:
        """What the hidden patches are.

        Args:
            images: (B, C, H, W).
            split: which patches are visible and which hidden; of a mask made elsewhere
                :func:`~regularized.mechanisms.patches.split_of`.
        """
        tokens = self._decoder_tokens(images, split)
        hidden = split.hidden.shape[1]
        predicted = None if self.predictor is None else self.predictor(tokens, hidden).squeeze(-1)
        return Prediction(self.reconstructor(tokens, hidden), predicted)

    def scores(self, images: Tensor) -> Tensor:
        """(B, N) expected difficulty of each patch, the whole image seen. The reconstructor does not run.

        The predictor has been trained on hidden patches and is asked about visible ones: so it is in the paper.

        Raises:
            ValueError: the model has no loss predictor.
        """
        if self.predictor is None:
            raise ValueError("this model has no loss predictor; build it with predictor_depth of 1 or more")
        tokens = self._decoder_tokens(images, None)
        scores: Tensor = self.predictor(tokens, self.patches).squeeze(-1)
        return scores

    def _decoder_tokens(self, images: Tensor, split: Split | None) -> Tensor:
        """(B, K + N, F): the prefix, the visible patches, then the hidden ones; each group in raster order."""
        encoder, prefix = self.encoder, self.encoder.prefix
        tokens = encoder.embed(images)
        if split is None:
            seen = self.bridge(encoder.encode(tokens))
            return torch.cat([seen[:, :prefix], seen[:, prefix:] + self.positions], dim=1)
        seen = self.bridge(encoder.encode(take(tokens, split.visible)))
        return torch.cat(
            [
                seen[:, :prefix],
                seen[:, prefix:] + take(self.positions, split.visible),
                (self.mask_token + take(self.positions, split.hidden)).to(seen.dtype),
            ],
            dim=1,
        )
