"""Learning from the Undesirable as a term of our loop and of its adapters to other trainers."""

from typing import Any

import torch
from torch import Tensor, nn

from regularized.fine_tuning.lfu.penalty import REDUCTION, Reduction
from regularized.fine_tuning.lfu.regularizer import (
    ALPHA,
    CLIP_NORM,
    IGNORED,
    Layers,
    LfU,
    labels_mask,
    warn_of_long_step,
)
from regularized.fine_tuning.lfu.steps import Aux, auxiliary, published_strength
from regularized.mechanisms.ranges import allowed, at_least
from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Batch, Step
from regularized.training.terms import Term

__all__ = ["LfUTerm"]


class LfUTerm(Term):
    """The regularizer in our loop and its adapters: ``terms={"task": CrossEntropy(), "lfu": LfUTerm()}``.

    The direction is the gradient of the whole loss of the optimizer step: the task and whatever other terms there are.
    The penalty's gradient is added after the loop has clipped; to bound both together leave the loop's clipping out
    (``clip_norm=None``, transformers' ``max_grad_norm=0``) and use ``clip_norm`` here. What the loop logs of this term
    is the penalty of the optimizer step *before*: that of the present one is not known when the loss is computed.

    Args:
        layers: see :class:`LfU`; default ``"all"``.
        aux: see :class:`LfU`; default ``"self"``.
        alpha: see :class:`LfU`; default 0.1.
        weight: lambda, a number or a schedule; default 5, or 0.1 with ``"steering"``.
        reduction: see :class:`LfU`; default ``"mean"``.
        clip_norm: see :class:`LfU`; default none.

    Attributes:
        consistency: () buffer, the penalty of the last optimizer step, without lambda.
        aux: what takes the step; an :class:`~regularized.fine_tuning.lfu.AuxiliaryLoRA` keeps its A here.

    Raises:
        ValueError: an argument is outside its range; at ``attach``, no hidden states are found.
        RuntimeError: the model was not called in the way that the loop calls it.

    Examples:
        >>> from functools import partial
        >>> from regularized.training import CrossEntropy, TensorData, Trainer
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> trainer = Trainer(
        ...     model,
        ...     terms={"task": CrossEntropy(), "lfu": LfUTerm(layers=["1"])},
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ... )
        >>> history = trainer.fit(TensorData(torch.randn(32, 3), torch.randint(2, (32,)), batch_size=8), epochs=1)
        >>> bool(trainer.objective.terms["lfu"].consistency > 0)
        True
    """

    unsharded = "its gradients are those of hooks on parameters, which never fire on shards"

    consistency: Tensor

    @allowed(
        alpha=ALPHA,
        weight=at_least(0.0).or_schedule().or_none("the published one"),
        reduction=REDUCTION,
        clip_norm=CLIP_NORM,
    )
    def __init__(
        self,
        *,
        layers: Layers = "all",
        aux: Aux = "self",
        alpha: float = 0.1,
        weight: Coefficient | None = None,
        reduction: Reduction = "mean",
        clip_norm: float | None = None,
    ) -> None:
        warn_of_long_step(alpha)
        own = auxiliary(aux)
        weight = published_strength(own) if weight is None else weight
        super().__init__(weight=weight)
        self.aux = own
        self.alpha = alpha
        self._settings: dict[str, Any] = {"layers": layers, "reduction": reduction, "clip_norm": clip_norm}
        self._schedule = as_schedule(weight, name="weight")
        self._lfu: LfU | None = None
        self.register_buffer("consistency", torch.zeros(()))

    def attach(self, model: nn.Module) -> None:
        """Look at the model; nothing is changed in it."""
        if self._lfu is None or self._lfu.model is not model:
            self._lfu = LfU(model, aux=self.aux, alpha=self.alpha, **self._settings)

    def reset(self) -> None:
        """Forget the passes of a step that was interrupted."""
        if self._lfu is not None:
            self._lfu.reset()

    def transform(self, batch: Batch) -> Batch:
        """The batch as it is; from here on forward passes are watched, until the optimizer step."""
        if self.weight != 0:
            self._attached().listen()
        return batch

    def count(self, batch: Batch) -> int | Tensor:
        """Number of valid positions: labels that are not -100 where there is one for each token, else samples."""
        targets = batch.targets
        if targets is None or targets.ndim != 2 or targets.is_floating_point():
            return batch.size
        return (targets != IGNORED).sum()

    def forward(self, step: Step) -> Tensor:
        """The penalty of the last optimizer step times the count: a constant, for the log; 0 in evaluation."""
        lfu = self._attached()
        if not self.training:
            return torch.zeros_like(self.consistency)
        step.output  # noqa: B018  the shared forward pass
        if self.weight == 0:
            return torch.zeros_like(self.consistency)
        passes = lfu.take()
        if torch.is_grad_enabled():  # else the coefficient of this step is 0
            recorded = next((p for p in passes if p.is_of(step.inputs)), passes[0] if passes else None)
            if recorded is None:
                raise RuntimeError(
                    "the forward pass of the step was not seen: the model must be in training mode, the loop must call "
                    "`transform` before it, and torch.compile must not have replaced the model; compile its layers"
                )
            if recorded.mask is None and step.batch.targets is not None:
                recorded.mask = labels_mask(step.batch.targets, next(iter(recorded.hidden.values())))
            lfu.keep(recorded)
        return self.consistency * self.count(step.batch)

    def before_step(self, step: Step) -> None:
        """The displaced passes of all micro-batches; their gradient is added to that of the loss."""
        lfu = self._attached()
        coefficient = self._schedule(step.progress)
        if coefficient == 0:
            lfu.reset()
        else:
            lfu.take()  # passes that are not of a step: of another term, or of an optimizer that looks around
            self.consistency.copy_(lfu.backward(strength=coefficient))

    def _attached(self) -> LfU:
        if self._lfu is None:
            raise RuntimeError("LfUTerm belongs to no model yet: the loop must call attach(model) first")
        return self._lfu

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no model yet."""
        return {**self.__dict__, "_lfu": None}
