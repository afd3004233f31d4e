"""Self-regularisation as a term of our loop and of its adapters to other trainers."""

from torch import Tensor, nn

from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE
from regularized.fine_tuning.sae_regularization.judging import FeatureMask
from regularized.fine_tuning.sae_regularization.penalty import SelfReg, Similarity
from regularized.mechanisms.ranges import allowed, at_least
from regularized.training.progress import Coefficient
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["SelfRegularization"]


class SelfRegularization(Term):
    """The penalty as a term of the loop, once a step; ``weight`` is the paper's beta.

    Cleaning is not part of it, because evaluation must clean too: train on ``removal(z)``, computed once, or make
    :class:`~regularized.fine_tuning.sae_regularization.FeatureRemoval` the model's first layer.

    Args:
        sae: the autoencoder, frozen.
        unintended: mask of the features that the task must not use.
        layer: name of the classifier's first linear layer in the model; default ``""``, the model itself.
        similarity: see :class:`~regularized.fine_tuning.sae_regularization.SelfReg`.
        weight: beta, a number >= 0 or a schedule; default 1.

    Raises:
        ValueError: see :class:`~regularized.fine_tuning.sae_regularization.SelfReg`; in the first step: the layer's
            weight is not (R, d).
        TypeError: the layer is not linear.

    Examples:
        >>> import torch
        >>> from regularized.training import CrossEntropy, Trainer
        >>> sae = TopKSAE(8, 32, k=4).requires_grad_(False)
        >>> terms = {"task": CrossEntropy(), "features": SelfRegularization(sae, torch.arange(32) < 3)}
        >>> trainer = Trainer(nn.Linear(8, 2), terms=terms, optimizer=torch.optim.AdamW)
        >>> _ = trainer.fit([(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))], epochs=1)
    """

    sharding = "weights"

    per_step = True

    @allowed(weight=at_least(0.0).or_schedule())
    def __init__(
        self,
        sae: TopKSAE,
        unintended: FeatureMask | Tensor,
        *,
        layer: str = "",
        similarity: Similarity = "preactivation",
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        self.reg: SelfReg = SelfReg(sae, unintended, similarity=similarity)
        self.layer = layer

    def forward(self, step: Step) -> Tensor:
        """The penalty of the present weights; a scalar."""
        layer = step.model.get_submodule(self.layer)
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"layer {self.layer or 'the model itself'!r} is a {type(layer).__name__}, not a linear layer; name the "
                "first linear layer on the embeddings"
            )
        return self.reg.penalty(layer.weight)
