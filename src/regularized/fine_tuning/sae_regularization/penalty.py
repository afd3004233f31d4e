"""Self-regularisation with a sparse autoencoder: for classifiers on embeddings that must not use certain concepts.

You train a classifier on embeddings of a language model, and it must not rely on a sensitive attribute or a shortcut
for which there are no labels. A sparse autoencoder names the features inside an embedding, a judge says which are
unintended; these are subtracted from every embedding, and the weights are pushed away from their directions.

    Wu, Yu, Zhai, Liu, "Self-Regularization with Sparse Autoencoders for Controllable LLM-based Classification",
    KDD 2025, arXiv 2502.14133. Official code: JacksonWuxs/SelfReg-Achieving_Controllable_LLM_Classifier_with_SAE at
    60f3c07 (Apache-2.0).

=========  =================  ==============================================================================
paper      here               meaning
=========  =================  ==============================================================================
z          ``embeddings``     (B, d)
S          ``unintended``     (C,) bool, features that the task must not use
W_j        ``encoder``        (|S|, d) directions of these features, ``decoder`` where they are untied
A          ``activations``    (B, |S|) relu(pre(z)) on S: all positive ones, no top-k
z~         ``removal(z)``     (B, d) z - A W_S^T
w          ``weight``         (R, d) first linear layer of the classifier
beta       ``strength``       coefficient of the penalty, >= 0
=========  =================  ==============================================================================

Paper and code differ. The paper penalises the *similarity* of weights and directions; the code penalises the
autoencoder's pre-activation of the weights, biases included, so that zero weights have a penalty too and the minimum is
not at w orthogonal to W_S. ``similarity="preactivation"`` is the code's, our default because the published strengths
belong to it; ``"dot"`` is |w . W_j|, clean and recommended; ``"cosine"`` does not depend on any scale. The code also
subtracts b_d from every embedding (its decoder adds it); we subtract A W_S^T alone, ``compat=True`` gives the code's.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE
from regularized.fine_tuning.sae_regularization.judging import FeatureMask, binary_mask, fingerprint, warn_if_empty
from regularized.mechanisms.ranges import Choice, allowed, at_least

__all__ = ["FeatureRemoval", "SelfReg", "Similarity", "feature_penalty"]

# Shapes: B rows of a batch, d width of an embedding, C features, |S| unintended ones, R rows of the head's weight.

Similarity: TypeAlias = Literal["preactivation", "dot", "cosine"]


def feature_penalty(weight: Tensor, directions: Tensor, offset: Tensor | None = None) -> Tensor:
    """How much a weight matrix looks at given directions: ``mean_{r, j} |w_r . W_j + offset_j|``.

    Its gradient by w is the mean of ``sign(.) W_j``. The mean makes a strength independent of how many features were
    judged unintended.

    Args:
        weight: (R, d).
        directions: (|S|, d).
        offset: (|S|,); default zeros.

    Returns:
        Scalar; 0 where there is no direction.

    Examples:
        >>> feature_penalty(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        tensor(3.5000)
    """
    if len(directions) == 0:  # the mean of nothing would be nan
        return weight.new_zeros(())
    return F.linear(weight, directions, offset).abs().mean()


class _Unintended(nn.Module):
    """The autoencoder's weights at the unintended features, sliced once: everything that cleaning and penalty need."""

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    threshold: Tensor | None

    def __init__(self, sae: TopKSAE, unintended: FeatureMask | Tensor) -> None:
        super().__init__()
        if not isinstance(sae, TopKSAE):
            raise TypeError(
                f"sae must be a TopKSAE, got {type(sae).__name__}; take others in with TopKSAE.from_tensors or "
                "TopKSAE.from_sae_lens"
            )
        if any(p.requires_grad for p in sae.parameters()):
            raise ValueError(
                "the autoencoder is trainable, but cleaning and penalty are made for a frozen one: call "
                "sae.requires_grad_(False) first"
            )
        if isinstance(unintended, FeatureMask):
            known = unintended.provenance.get("sae")
            if known is not None and known != fingerprint(sae):
                raise ValueError(
                    f"the mask was made for another autoencoder (weights {known}, these are {fingerprint(sae)}), whose "
                    "features have other meanings; judge the features of this one with select_features"
                )
        mask = unintended.mask if isinstance(unintended, FeatureMask) else binary_mask(unintended)
        if len(mask) != sae.num_features:
            raise ValueError(
                f"the mask has {len(mask)} entries, the autoencoder {sae.num_features} features; it must name each one"
            )
        if bool(mask.all()):
            raise ValueError(
                f"all {len(mask)} features are unintended, so that nothing would be left to classify by; look at the "
                "judgements"
            )
        warn_if_empty(mask)
        rows = mask.to(sae.encoder.device).nonzero().flatten()
        self.register_buffer("encoder", sae.encoder.detach()[rows])
        self.register_buffer("encoder_bias", sae.encoder_bias.detach()[rows])
        self.register_buffer("decoder", sae.directions.detach()[rows])
        self.register_buffer("decoder_bias", sae.decoder_bias.detach().clone())
        self.register_buffer("threshold", None if sae.threshold is None else sae.threshold.detach()[rows])


class FeatureRemoval(_Unintended):
    """Takes unintended features out of embeddings: ``z - A W_S^T``.

    Clean the training set once, before training, and put this module before the classifier for use:
    ``nn.Sequential(removal, head)``. It is nonlinear (a relu decides what is active), so it cannot be folded into the
    head. Costs 2 x B x d x |S| multiplications and |S| x d numbers.

    It does not promise that an unintended feature is silent afterwards: where directions overlap, taking one out moves
    the others. Only for orthonormal directions the cleaned embedding activates none of S.

    Args:
        sae: the autoencoder, frozen.
        unintended: mask of the features to take out, from
            :func:`~regularized.fine_tuning.sae_regularization.select_features`, or (C,) of zeros and ones.
        compat: subtract b_d too, as the official code does; default False. No difference for a head with a bias that is
            trained on cleaned embeddings.

    Raises:
        ValueError: the autoencoder is trainable; a mask of another length, of other values than 0 and 1, of all
            features, or of another autoencoder; embeddings of another width.
        TypeError: not a TopKSAE.

    Warns:
        UserWarning: no feature is unintended.

    Examples:
        >>> sae = TopKSAE.from_tensors(torch.eye(3))
        >>> removal = FeatureRemoval(sae, torch.tensor([0, 1, 0]))
        >>> removal(torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0]]))
        tensor([[ 1.,  0.,  3.],
                [ 1., -2.,  3.]])
    """

    def __init__(self, sae: TopKSAE, unintended: FeatureMask | Tensor, *, compat: bool = False) -> None:
        super().__init__(sae, unintended)
        self.compat = compat

    def activations(self, embeddings: Tensor) -> Tensor:
        """(..., d) embeddings to (..., |S|) how much of each unintended feature is in them, >= 0."""
        width = self.encoder.shape[1]
        if embeddings.shape[-1] != width:
            raise ValueError(
                f"the autoencoder was made for embeddings of width {width}, got {tuple(embeddings.shape)}; are they "
                "from the same model and layer?"
            )
        pre = F.linear(embeddings - self.decoder_bias, self.encoder, self.encoder_bias)
        return pre.relu() if self.threshold is None else pre.relu() * (pre > self.threshold)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(..., d) embeddings to cleaned ones of the same shape."""
        removed = F.linear(self.activations(embeddings), self.decoder.T, self.decoder_bias if self.compat else None)
        return embeddings - removed

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"features={len(self.encoder)}, width={self.encoder.shape[1]}, compat={self.compat}"


class SelfReg(nn.Module):
    """Cleaning and penalty in one: ``loss = bce(head(reg.clean(z)), y) + reg(head.weight)``.

    The penalty is a plain function of a weight matrix, so it goes with any loss, optimizer and head whose first layer
    is linear. With several classes and a mask for each, take one object a row of the weight, add their penalties, and
    clean with the features that all of them forbid.

    A step costs R x d x |S| multiplications, whatever the batch: nothing beside the forward pass of a real batch.

    Not where the unintended concept is labelled (concept erasure is simpler) or true to the task. In our experiment
    cleaning alone does nearly all of it: start with ``strength=0`` and see what the penalty adds.

    Args:
        sae: the autoencoder, frozen.
        unintended: mask of the features that the task must not use.
        strength: beta >= 0; default 1 (the authors' for three classes; 3 for reward models, 31 for toxicity, which
            over-regularises small problems).
        similarity: ``"preactivation"`` (official), ``"dot"`` (recommended) or ``"cosine"``; see the module's text. With
            an untied decoder ``"dot"`` and ``"cosine"`` take its rows.
        compat: see :class:`FeatureRemoval`; default False.

    Attributes:
        removal: the :class:`FeatureRemoval`, to put before the head.

    Raises:
        ValueError: a negative strength, an unknown similarity, a bad mask or a trainable autoencoder (see
            :class:`FeatureRemoval`); at the call a weight that is not (R, d).

    Examples:
        >>> sae = TopKSAE(8, 32, k=4).requires_grad_(False)
        >>> reg = SelfReg(sae, torch.arange(32) < 3, strength=0.5, similarity="dot")
        >>> z, y, head = torch.randn(6, 8), torch.tensor([0.0, 1, 0, 1, 1, 0]), nn.Linear(8, 1)
        >>> clean = reg.clean(z)                                     # once, before training
        >>> loss = F.binary_cross_entropy_with_logits(head(clean)[:, 0], y) + reg(head.weight)
        >>> loss.backward()
        >>> model = nn.Sequential(reg.removal, head)                 # for use
    """

    directions: Tensor
    offset: Tensor | None

    @allowed(strength=at_least(0.0), similarity=Choice("preactivation", "dot", "cosine"))
    def __init__(
        self,
        sae: TopKSAE,
        unintended: FeatureMask | Tensor,
        *,
        strength: float = 1.0,
        similarity: Similarity = "preactivation",
        compat: bool = False,
    ) -> None:
        super().__init__()
        self.removal: FeatureRemoval = FeatureRemoval(sae, unintended, compat=compat)
        self.strength = strength
        self.similarity: Similarity = similarity
        chosen = self.removal
        offset = None
        if similarity == "preactivation":
            directions = chosen.encoder.clone()
            # (w - b_d) . W_j + b_e = w . W_j + (b_e - b_d . W_j): one product a step.
            offset = chosen.encoder_bias - directions @ chosen.decoder_bias
        elif similarity == "dot":
            directions = chosen.decoder.clone()
        else:
            directions = F.normalize(chosen.decoder, dim=1)
        self.register_buffer("directions", directions)
        self.register_buffer("offset", offset)

    def clean(self, embeddings: Tensor) -> Tensor:
        """(..., d) embeddings without the unintended features; evaluation needs it as training does."""
        cleaned: Tensor = self.removal(embeddings)
        return cleaned

    def penalty(self, weight: Tensor) -> Tensor:
        """The penalty without its strength; a scalar >= 0."""
        width = self.directions.shape[1]
        if weight.ndim != 2 or weight.shape[1] != width:
            raise ValueError(
                f"SelfReg needs the weight of a linear layer on the embeddings, shape (R, {width}), got "
                f"{tuple(weight.shape)}; pass head.weight of the first layer"
            )
        if self.similarity == "cosine":
            weight = F.normalize(weight, dim=1)
        return feature_penalty(weight, self.directions, self.offset)

    def forward(self, weight: Tensor) -> Tensor:
        """(R, d) weight to ``strength * penalty``."""
        if self.strength == 0.0:
            with torch.no_grad():
                return self.penalty(weight) * 0.0
        return self.penalty(weight) * self.strength

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"strength={self.strength}, similarity={self.similarity!r}"
