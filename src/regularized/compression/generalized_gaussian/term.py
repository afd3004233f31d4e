"""BackSlash as terms of our loop and of its adapters: in the loss, or as a step after the optimizer's."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from regularized.compression.generalized_gaussian.distribution import ratio_table
from regularized.compression.generalized_gaussian.penalty import EPS, SHAPE, STRENGTH, rate
from regularized.compression.generalized_gaussian.shrinking import Shrinker
from regularized.mechanisms.ranges import allowed
from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["BackSlash", "DecoupledBackSlash"]


class BackSlash(Term):
    """The paper's form: ``lambda R`` in the loss, with the shape of the weights at each step.

    Args:
        weight: lambda, a number >= 0 or a schedule. It belongs to the number N of weights, since R is their mean; the
            authors' runs used up to 10,000 at 10^8 weights and more. End with some plain epochs, as they do:
            ``weight=piecewise({0.8: 0.0}, initial=...)``.
        parameters: dotted names as in ``model.named_parameters()``; default all that are trained, as the authors.
        shape: nu, for L1 (1) or L2 (2) with everything else the same; default that of the weights at each step.
        eps: see :func:`~regularized.compression.generalized_gaussian.rate`; default 1e-3.

    Raises:
        ValueError: an option is out of range; when it runs: the model has no such parameter.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from regularized.training import CrossEntropy, TensorData, Trainer
        >>> trainer = Trainer(
        ...     nn.Linear(3, 2),
        ...     terms={"task": CrossEntropy(), "rate": BackSlash(weight=0.1)},
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ... )
        >>> history = trainer.fit(TensorData(torch.randn(32, 3), torch.randint(2, (32,)), batch_size=8), epochs=1)
    """

    sharding = "weights"
    per_step = True
    _table: Tensor

    @allowed(weight=STRENGTH.or_schedule(), shape=SHAPE, eps=EPS)
    def __init__(
        self,
        *,
        weight: Coefficient,
        parameters: Iterable[str] | None = None,
        shape: float | None = None,
        eps: float = 1e-3,
    ) -> None:
        super().__init__(weight=weight)
        self.parameter_names: tuple[str, ...] | None = _names(parameters)
        self.shape: float | None = shape
        self.eps: float = eps
        self.register_buffer("_table", ratio_table(), persistent=False)

    def forward(self, step: Step) -> Tensor:
        """The rate of the weights now; nothing with the batch."""
        weights = _covered(step.model, self.parameter_names)
        return rate(weights, shape=self.shape, eps=self.eps, table=self._table.to(weights[0].device))


class DecoupledBackSlash(Term):
    """The form of the authors' repository: weights are shrunk after each optimizer step, without the learning rate.

    Args:
        strength: lambda, a number >= 0 or a schedule; see
            :class:`~regularized.compression.generalized_gaussian.Shrinker`.
        parameters: dotted names as in ``model.named_parameters()``; default all that are trained.
        shape: nu; default that of the weights at each step.
        eps: default 1, the repository's ``clip``.

    Raises:
        ValueError: an option is out of range; when it is attached: the model has no such parameter.

    Warns:
        UserWarning: when it is attached: a step would move half of the weights by more than their size.

    Examples:
        >>> term = DecoupledBackSlash(strength=1e-3)
        >>> term.attach(nn.Linear(3, 2))
    """

    unsharded = "it shrinks the parameters that it found when it was attached, which shards replace"

    contributes = False

    @allowed(strength=STRENGTH.or_schedule(), shape=SHAPE, eps=EPS)
    def __init__(
        self,
        *,
        strength: Coefficient,
        parameters: Iterable[str] | None = None,
        shape: float | None = None,
        eps: float = 1.0,
    ) -> None:
        super().__init__()
        self.strength: Coefficient = strength
        self.parameter_names: tuple[str, ...] | None = _names(parameters)
        self.shape: float | None = shape
        self.eps: float = eps
        self._schedule = as_schedule(strength, name="strength")
        self._shrinker: Shrinker | None = None

    def attach(self, model: nn.Module) -> None:
        """Look at the model; nothing is changed in it."""
        weights = _covered(model, self.parameter_names)
        constant = 0.0 if callable(self.strength) else self.strength
        self._shrinker = Shrinker(weights, constant, eps=self.eps, shape=self.shape)

    def after_step(self, step: Step) -> None:
        """Shrink."""
        strength = self._schedule(step.progress)
        if strength == 0.0:
            return
        if self._shrinker is None:
            raise RuntimeError("DecoupledBackSlash belongs to no model yet: the loop must call attach(model) first")
        self._shrinker.step(strength)

    def forward(self, step: Step) -> Tensor:
        """Nothing is added to the loss."""
        return step.logits.new_zeros(())

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no model yet."""
        return {**self.__dict__, "_shrinker": None}


def _names(parameters: Iterable[str] | None) -> tuple[str, ...] | None:
    if isinstance(parameters, str):
        raise ValueError(f"parameters must be several names, for example [{parameters!r}], got one string")
    return None if parameters is None else tuple(parameters)


def _covered(model: nn.Module, names: tuple[str, ...] | None) -> list[Tensor]:
    named = dict(model.named_parameters())
    if names is None:
        # A tensor that functional_call put in place of a parameter is trained, too.
        return [p for p in named.values() if p.requires_grad or not isinstance(p, nn.Parameter)]
    if unknown := [name for name in names if name not in named]:
        raise ValueError(f"the model has no parameter {unknown}; it has {list(named)}")
    return [named[name] for name in names]
