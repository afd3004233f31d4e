"""Two pulls on weights, as terms of any training: away from references, and towards where they were.

Neither needs a graph. :meth:`Repulsion.add_gradient` and :meth:`ElasticAnchor.add_gradient` add to ``.grad`` by fused
operations, with scalars that stay on the device.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.anchors import add_anchor_gradient, anchor_penalty, gradients_of
from regularized.mechanisms.ranges import Choice, allowed, at_least, positive
from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Step
from regularized.training.terms import Term
from regularized.unlearning.adapt_unlearn.penalty import (
    Collapsed,
    Distance,
    Kind,
    repel,
    repel_slope,
    squared_distance,
    tensor_scales,
)

__all__ = ["ElasticAnchor", "Repulsion", "trainable"]

_REMEDY = "a negative one would attract to the references"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that need a gradient, by name.

    Raises:
        ValueError: there is none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient: is it frozen, or the averaged copy (EMA) of "
            "a generator? Give the generator that is trained"
        )
    return found


def _matched(names: Sequence[str], weights: Sequence[Tensor], given: nn.Module | Mapping[str, Tensor]) -> list[Tensor]:
    """The given tensors in the order of the names.

    Raises:
        ValueError: some are missing, or of another shape.
    """
    there: Mapping[str, Tensor] = dict(given.named_parameters()) if isinstance(given, nn.Module) else given
    wrong = [(n, w) for n, w in zip(names, weights, strict=True) if n not in there or there[n].shape != w.shape]
    if wrong:
        told = [
            f"{n} {tuple(there[n].shape) if n in there else 'is missing'} (here {tuple(w.shape)})" for n, w in wrong
        ]
        raise ValueError(
            f"a reference does not fit the model: {', '.join(told[:6])}{' ...' if len(told) > 6 else ''}; it must be "
            "of the same network, a module or its state dict"
        )
    return [there[n].detach() for n in names]


class _Pull(Term):
    """A term that adds to the gradients of a model's trainable weights."""

    contributes = False
    unsharded = "it pulls at the parameters that it found when it was attached, which shards replace"

    def __init__(self, *, weight: Coefficient) -> None:
        super().__init__(weight=weight)
        self._schedule = as_schedule(weight, name="weight")
        self.names: list[str] = []
        self._weights: list[nn.Parameter] = []

    def _take(self, weights: Mapping[str, nn.Parameter]) -> bool:
        """Remember the weights; False where it has its buffers already."""
        if self.names and self.names != list(weights):
            raise ValueError(
                f"{type(self).__name__} belongs to {self.names[:4]} ..., the model has {list(weights)[:4]} ...; make "
                "another one for another model"
            )
        new = not self.names
        self.names, self._weights = list(weights), list(weights.values())
        return new

    def _keep(self, kind: str, tensors: Sequence[Tensor]) -> None:
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(f"{kind}:{name.replace('.', '/')}", tensor)

    def _kept(self, kind: str) -> list[Tensor]:
        self._attached()
        return [self.get_buffer(f"{kind}:{name.replace('.', '/')}") for name in self.names]

    def before_step(self, step: Step) -> None:
        """Add the gradient, with the coefficient of this step; with 0 nothing is touched."""
        self._attached()
        strength = self._schedule(step.progress)
        if strength:
            self.add_gradient(strength)

    def add_gradient(self, strength: float) -> None:
        """Add ``strength`` times the gradient of the term's value to ``.grad``."""
        raise NotImplementedError

    def _attached(self) -> None:
        if not self._weights:
            raise RuntimeError(f"{type(self).__name__} belongs to no model yet: call attach(model) first")

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no model yet."""
        return {**self.__dict__, "_weights": []}


class Repulsion(_Pull):
    """Keeps weights away from references: the weights of copies that do what must not be done.

    It is a term (``attach``, then ``before_step`` once a step, as :class:`~regularized.training.Trainer` calls them),
    or stands in any loop: ``repulsion.add_gradient(weight)`` between backward pass and optimizer. All trainable
    parameters of the model are repelled; buffers are not.

    Args:
        references: modules of the same structure, or their state dicts; more may follow by :meth:`add_reference`.
        kind: ``"exponential"`` (default: bounded), ``"inverse"``, ``"negative_square"``; see
            :func:`~regularized.unlearning.adapt_unlearn.penalty.repel`.
        alpha: of the exponential; default 1, with relative distances.
        weight: coefficient >= 0, a number or a schedule; default 1. The authors' code has 100 for the exponential.
        distance: ``"relative"`` (default) divides by the distance at :meth:`start`, so that alpha and weight do not
            depend on the network; ``"sum"`` is the paper's formula, ``"official"`` that of the authors' code.
        cap: distance beyond which nothing repels; default None. ``"negative_square"`` needs one to have a lower bound.

    Attributes:
        names: parameters that are repelled.

    Raises:
        ValueError: an argument is outside its range; a reference does not fit; the distance at the start is zero where
            it divides; no parameter is trainable.

    Warns:
        UserWarning: ``"negative_square"`` without a cap.

    Examples:
        >>> model, bad = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 3.0), nn.init.constant_(bad.weight, 1.0)
        >>> repulsion = Repulsion([bad], kind="inverse", distance="sum")
        >>> repulsion.attach(model)
        >>> repulsion.value().item()  # 1 / (3 - 1)^2
        0.25
        >>> repulsion.add_gradient(1.0)
        >>> model.weight.grad.item()  # -2 (3 - 1) / 4^2
        -0.25
    """

    @allowed(
        kind=Choice("exponential", "inverse", "negative_square", meaning="EL2, IL2 and NL2 of the paper"),
        alpha=positive(),
        weight=at_least(0.0, remedy=_REMEDY).or_schedule(),
        distance=Choice("relative", "sum", "official"),
        cap=positive().or_none("no cap"),
    )
    def __init__(
        self,
        references: Sequence[nn.Module | Mapping[str, Tensor]] = (),
        *,
        kind: Kind = "exponential",
        alpha: float = 1.0,
        weight: Coefficient = 1.0,
        distance: Distance = "relative",
        cap: float | None = None,
    ) -> None:
        super().__init__(weight=weight)
        if kind == "negative_square" and cap is None:
            warnings.warn(
                "the negative square is unbounded below: weights run away unless the task holds them. Give a cap, such "
                "as cap=10 for ten times the distance at the start, or use kind='exponential'",
                stacklevel=3,
            )
        self.kind: Kind = kind
        self.alpha = alpha
        self.distance: Distance = distance
        self.cap = cap
        self._given: list[nn.Module | Mapping[str, Tensor]] = list(references)
        self.num_references: int = 0
        self.spread: Tensor
        self.scales: Tensor

    def attach(self, model: nn.Module) -> None:
        """Belong to a model; with references, note how far away they are. Attaching it again changes nothing."""
        if not self._take(trainable(model)):
            return
        wide = [torch.promote_types(w.dtype, torch.float32) for w in self._weights]
        self._keep("mean", [torch.zeros_like(w, dtype=d).detach() for w, d in zip(self._weights, wide, strict=True)])
        empty = torch.zeros(len(self._weights), dtype=wide[0], device=self._weights[0].device)
        self.register_buffer("spread", empty)
        self.register_buffer("scales", torch.zeros_like(empty))
        for reference in self._given:
            self.add_reference(reference)
        self._given = []
        if self.num_references:
            self.start()

    def add_reference(self, reference: nn.Module | Mapping[str, Tensor]) -> None:
        """Take in one reference more; call :meth:`start` after the last one.

        Args:
            reference: a module of the same structure, or its state dict; not kept.
        """
        self._attached()
        known = Collapsed(self._kept("mean"), self.spread, self.num_references)
        known.add(_matched(self.names, self._weights, reference))
        self.num_references = known.count

    @torch.no_grad()
    def start(self) -> None:
        """Take the present distance as that of the start, for ``"relative"``.

        Raises:
            ValueError: it is zero, where that divides.
            RuntimeError: there is no reference.
        """
        known = self._collapsed()
        self.scales.copy_(tensor_scales(self._weights, self.distance, count=known.count))
        first = squared_distance(self._weights, known, self.scales)
        if (self.kind == "inverse" or self.distance == "relative") and not bool(first > 0.0):
            raise ValueError(
                "the distance is zero: the model has the very weights of its references, so nothing says where to go. "
                "Start from the weights before the adaptation"
            )
        if self.distance == "relative":
            self.scales.div_(first)

    def squared_distance(self) -> Tensor:
        """The squared distance at present, in the units of ``distance``; differentiable in the weights."""
        return squared_distance(self._weights, self._collapsed(), self.scales)

    def value(self) -> Tensor:
        """The repulsion at present, without its coefficient; differentiable in the weights."""
        return repel(self.squared_distance(), self.kind, alpha=self.alpha, cap=self.cap)

    @torch.no_grad()
    def add_gradient(self, strength: float = 1.0) -> None:
        """Add the gradient of ``strength`` times :meth:`value` to ``.grad``; a weight without one gets one.

        Args:
            strength: coefficient >= 0; default 1.
        """
        known, scales = self._collapsed(), self.scales
        offsets = torch._foreach_sub(list[Tensor](self._weights), known.mean)
        squares = torch.stack(torch._foreach_norm(offsets)).square()
        slope = repel_slope(((squares + known.spread) * scales).sum(), self.kind, alpha=self.alpha, cap=self.cap)
        factors = 2.0 * strength * slope * scales
        if self.distance == "official":  # a factor for each tensor
            torch._foreach_mul_(offsets, list(factors.unbind()))
        else:
            torch._foreach_mul_(offsets, factors[0])
        gradients = gradients_of(self._weights)
        torch._foreach_add_(gradients, [o.to(g.dtype) for o, g in zip(offsets, gradients, strict=True)])

    def _collapsed(self) -> Collapsed:
        mean = self._kept("mean")
        if not self.num_references:
            raise RuntimeError("there is no reference to be repelled from: give references, or call add_reference")
        return Collapsed(mean, self.spread, self.num_references)

    def get_extra_state(self) -> Tensor:
        """Number of references."""
        return torch.tensor(self.num_references)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a saved number."""
        self.num_references = int(state)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"kind={self.kind!r}, alpha={self.alpha}, weight={self.weight}, distance={self.distance!r}, "
            f"cap={self.cap}, references={self.num_references}"
        )


class ElasticAnchor(_Pull):
    """Holds weights where they are, each as firmly as it matters: elastic weight consolidation.

    Kirkpatrick et al. 2017. The value is ``1/2 sum_i F_i (theta_i - theta_G,i)^2``, as in the authors' code;
    the paper's text has no 1/2.

    Args:
        fisher: importance >= 0 of parameters by name, as from
            :func:`~regularized.unlearning.adapt_unlearn.fisher.generator_fisher`; what is not in it is not held.
        weight: coefficient >= 0, a number or a schedule. It goes with the size of F: 5e8 in the authors' code, for
            StyleGAN2; 20 held a small perceptron.

    Raises:
        ValueError: the weight is negative; a shape does not fit, or no name is a parameter of the model.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> anchor = ElasticAnchor({"weight": torch.tensor([[2.0]])}, weight=1.0)
        >>> anchor.attach(model)
        >>> _ = model.weight.data.add_(3.0)
        >>> round(anchor.value().item(), 4)  # 1/2 * 2 * 3^2
        9.0
    """

    @allowed(weight=at_least(0.0, remedy="0 does not hold at all").or_schedule())
    def __init__(self, fisher: Mapping[str, Tensor], *, weight: Coefficient) -> None:
        super().__init__(weight=weight)
        self._fisher = dict(fisher)

    def attach(self, model: nn.Module) -> None:
        """Hold the model's weights where they are now. Attaching the same model again changes nothing."""
        found = trainable(model)
        held = {name: w for name, w in found.items() if name in self._fisher}
        if not held:
            raise ValueError(
                f"no importance is of a trainable parameter: it is given for {list(self._fisher)[:4]}, the model has "
                f"{list(found)[:4]}; compute it by generator_fisher of this model"
            )
        if not self._take(held):
            return
        self._keep("anchor", [w.detach().clone() for w in self._weights])
        self._keep("fisher", [f.clone() for f in _matched(self.names, self._weights, self._fisher)])

    def value(self) -> Tensor:
        """The penalty at present, without its coefficient; differentiable in the weights."""
        return 0.5 * anchor_penalty(self._weights, self._kept("anchor"), self._kept("fisher"))

    def add_gradient(self, strength: float) -> None:
        """Add the gradient of ``strength`` times :meth:`value` to ``.grad``; a weight without one gets one.

        Args:
            strength: lambda.
        """
        add_anchor_gradient(self._weights, self._kept("anchor"), self._kept("fisher"), strength=0.5 * strength)
