"""The loss of a micro-batch as one graph: the forward pass, the terms, and so the backward pass, by ``torch.compile``.

What is Python in a step stays outside: coefficients and counts come into the graph as tensors, so that a schedule
compiles nothing anew, and moments (``transform``, ``before_step``, ``after_step``) are called as always. A term that
breaks the graph is computed between its pieces, with the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from regularized.training.objective import Objective
from regularized.training.progress import is_always
from regularized.training.step import Step

__all__ = ["CompiledObjective", "check_traceable"]

Weight: TypeAlias = float | Tensor | None


class CompiledObjective(Objective):
    """An :class:`~regularized.training.objective.Objective` whose loss is compiled, the model's forward pass included.

    The first optimizer step of each run is computed as always: what terms lay out at their first batch, and the
    mistakes that are told there, stay out of the graph.

    Args:
        terms: as of ``Objective``.
        backend: of ``torch.compile``.

    Examples:
        >>> from regularized.training import Batch, CrossEntropy, Progress
        >>> objective = CompiledObjective({"task": CrossEntropy()}, backend="eager")
        >>> model, batch = nn.Linear(3, 2), Batch.of((torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
        >>> counts = objective.counts([batch])
        >>> first, second = (objective.loss(Step(model, batch, Progress(i, 2)), counts) for i in range(2))
        >>> torch.equal(first, second)
        True
    """

    def __init__(self, terms: Mapping[str, nn.Module], *, backend: str) -> None:
        super().__init__(terms)
        # torch keeps a few graphs for each code object: with one of its own, no other training takes their place.
        own = FunctionType(_share.__code__.replace(), globals(), _share.__name__)
        # Dropout draws what it draws without compiling.
        options: Any = {"fallback_random": True} if backend == "inductor" else None
        self._compiled: Callable[..., tuple[Tensor, list[Tensor]]] = torch.compile(
            own, backend=backend, options=options
        )

    def _share(self, step: Step, counts: Mapping[str, float | Tensor], *, first: bool, scale: float) -> Tensor:
        if step.progress.step == 0:
            return super()._share(step, counts, first=first, scale=scale)
        entries = [entry for entry in self.entries if first or not entry.per_step]
        weights: list[Weight] = []
        for name, _, weight, *_ in entries:
            coefficient = self._coefficients[name] = weight(step.progress)
            changes = not is_always(weight, coefficient)
            weights.append(
                None
                if coefficient == 0.0
                else torch.tensor(coefficient, dtype=torch.float64)
                if changes
                else coefficient
            )
        divisors = [None if entry.per_step else _divisor(counts[entry.name]) for entry in entries]
        terms = [entry.term for entry in entries]
        try:
            total, values = self._compiled(step, terms, divisors, weights, scale)
        except Exception as error:
            error.add_note('in a step that torch.compile took over; Compute(compile="no") goes without')
            raise
        for (name, *_), value in zip(entries, values, strict=True):
            self._values[name] = value if first or name not in self._values else self._values[name] + value
        return total


def check_traceable() -> None:
    """Make sure that nothing looks for single operations, of which a compiled step has none.

    Raises:
        ValueError: autograd's anomaly detection is on.

    Examples:
        >>> check_traceable()
    """
    if torch.is_anomaly_enabled():
        raise ValueError(
            "autograd's anomaly detection names the operation whose gradient is NaN, and a compiled step is one "
            'operation; look for it with Compute(compile="no"), or leave torch.autograd.set_detect_anomaly(False)'
        )


def _divisor(count: float | Tensor) -> Tensor:
    """A count as a tensor; an empty one as 1."""
    return count.clamp(min=1) if isinstance(count, Tensor) else torch.tensor(max(count, 1), dtype=torch.float64)


def _share(
    step: Step,
    terms: Sequence[nn.Module],
    divisors: Sequence[Tensor | None],
    weights: Sequence[Weight],
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """The sum of ``Objective``, with all that is chosen in Python chosen before; and the value of each term."""
    total: Tensor | None = None
    values: list[Tensor] = []
    for term, divisor, weight in zip(terms, divisors, weights):
        if weight is None:
            with torch.no_grad():
                value = term(step)
        else:
            value = term(step)
        if divisor is not None:
            value = value / divisor.to(value.dtype)
            if scale != 1.0:
                value = value * scale
        values.append(value.detach())
        if weight is not None:
            if isinstance(weight, Tensor):
                value = value * weight.to(value.dtype)
            elif weight != 1.0:
                value = value * weight
            total = value if total is None else total + value
    if total is None:
        total = step.logits.sum() * 0.0
    return total, values
