"""The sum of named terms, divided by what they count: the one definition that our loop and both adapters share.

For an optimizer step over micro-batches ``m`` on processes ``r``, with terms ``t`` of coefficient ``w_t``::

    loss = sum_t  w_t * ( sum_m sum_r  value_t(m, r) ) / ( sum_m sum_r  count_t(m, r) )

Counts depend on the batches alone, so they are known before the first backward pass, and each micro-batch can be
back-propagated by itself. A ``per_step`` term enters once, with the first micro-batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularized.training.mistakes import FirstStep, check_terms
from regularized.training.progress import Coefficient, Schedule, as_schedule, is_always
from regularized.training.step import Batch, Step

__all__ = ["Objective", "coefficients", "reweigh", "term_means"]


class Entry(NamedTuple):
    """A term that contributes to the loss, with what the sum asks of it at each step looked up once."""

    name: str
    term: nn.Module
    weight: Schedule
    per_step: bool
    counter: Callable[[Batch], int | Tensor] | None


class Objective(nn.Module):
    """Named terms and their weighted, normalised sum.

    Args:
        terms: terms by name, in the order in which their moments are called. The names appear in logs and errors.

    Raises:
        ValueError: no term, or a name that is not a Python identifier.
        TypeError: a term is not an ``nn.Module``, or is a loss of logits and targets.

    Warns:
        UserWarning: two terms are each the task; at the first step: none is, or labels equal the inputs, see
            :mod:`regularized.training.mistakes`.

    Examples:
        >>> from regularized.training.terms import CrossEntropy
        >>> from regularized.training.progress import Progress
        >>> objective = Objective({"task": CrossEntropy()})
        >>> batch = Batch.of((torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
        >>> loss = objective.loss(Step(nn.Linear(3, 2), batch, Progress(0, 1)), objective.counts([batch]))
        >>> loss.backward()
    """

    def __init__(self, terms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not terms:
            raise ValueError('an objective needs at least one term, for example {"task": CrossEntropy()}')
        for name, term in terms.items():
            if not name.isidentifier():
                raise ValueError(f"the name of a term must be a Python identifier, got {name!r}")
            if hasattr(nn.ModuleDict, name):
                raise ValueError(f"{name!r} cannot name a term: modules have an attribute of that name; choose another")
            if not isinstance(term, nn.Module):
                raise TypeError(
                    f"term {name!r} must be an nn.Module with forward(step), got {type(term).__name__}; "
                    "wrap a plain loss function as regularized.training.Loss(function)"
                )
        check_terms(terms)
        self.terms: nn.ModuleDict = nn.ModuleDict(terms)
        self.entries: list[Entry] = [
            Entry(
                name,
                term,
                as_schedule(getattr(term, "weight", 1.0), name=f"weight of term {name!r}"),
                per_step=bool(getattr(term, "per_step", False)),
                counter=getattr(term, "count", None),
            )
            for name, term in terms.items()
            if getattr(term, "contributes", True)
        ]
        if not self.entries:
            raise ValueError(f"none of the terms {list(terms)} contributes a loss; add one such as CrossEntropy()")
        self._values: dict[str, Tensor] = {}
        self._coefficients: dict[str, float] = {}  # of the last step
        self._is_new = True  # until the first micro-batch has been looked at

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms, in order."""
        return tuple(self.terms)

    @property
    def taps(self) -> tuple[str, ...]:
        """Submodules that some term wants to read, each once."""
        return tuple(dict.fromkeys(tap for t in self.terms.values() for tap in getattr(t, "taps", ())))

    def moments(self, name: str) -> list[Any]:
        """Bound methods ``name`` of the terms that have one, in order."""
        return [getattr(term, name) for term in self.terms.values() if callable(getattr(term, name, None))]

    def own_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameter groups that terms ask for by ``param_groups``; ``params`` is a list in each."""
        groups = [dict(group) for ask in self.moments("param_groups") for group in ask(model)]
        for group in groups:
            group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        return groups

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All trainable parameters of model and terms: first those that no term claims, then :meth:`own_groups`."""
        groups = self.own_groups(model)
        grouped = {id(p) for group in groups for p in group["params"]}
        every = {id(p): p for p in [*model.parameters(), *self.parameters()] if p.requires_grad}
        rest = [p for key, p in every.items() if key not in grouped]
        return [{"params": rest}, *groups] if rest else groups

    def counts(self, batches: Sequence[Batch], *, device: torch.device | None = None) -> dict[str, float | Tensor]:
        """Global count of each term over the micro-batches of one optimizer step and over all processes.

        Args:
            batches: the micro-batches of this process, after every ``transform``.
            device: where counts are summed over processes; needed in a distributed run only.
        """
        counts: dict[str, float | Tensor] = {}
        for entry in self.entries:
            if not entry.per_step:
                count = entry.counter
                counts[entry.name] = sum(batch.size if count is None else count(batch) for batch in batches)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and counts:
            local = torch.stack(
                [torch.as_tensor(value, dtype=torch.float64, device=device) for value in counts.values()]
            )
            dist.all_reduce(local)
            counts = dict(zip(counts, local.to(torch.float32).unbind()))
        return counts

    def loss(
        self, step: Step, counts: Mapping[str, float | Tensor], *, first: bool = True, scale: float = 1.0
    ) -> Tensor:
        """This micro-batch's share of the optimizer step's loss; back-propagate it.

        Args:
            step: the micro-batch.
            counts: from :meth:`counts`.
            first: whether it is the first micro-batch of its optimizer step (``per_step`` terms enter with it).
            scale: factor on the batch terms that undoes an averaging done elsewhere: the number of processes under DDP.

        Raises:
            ValueError: a term did not return a scalar tensor; or, at the first step, a model of causal language is
                taught to copy its input.
        """
        if self._is_new and self.training:
            self._is_new = False
            watch = FirstStep({entry.name: entry.term for entry in self.entries}, step)
            share = self._share(step, counts, first=first, scale=scale)
            watch.close()
            return share
        return self._share(step, counts, first=first, scale=scale)

    def _share(self, step: Step, counts: Mapping[str, float | Tensor], *, first: bool, scale: float) -> Tensor:
        total: Tensor | None = None
        for name, term, weight, per_step, _ in self.entries:
            if per_step and not first:
                continue
            coefficient = self._coefficients[name] = weight(step.progress)
            if coefficient == 0.0:
                # State must go on as if the term were there, but 0 * inf must not become nan, nor the graph grow.
                with torch.no_grad():
                    value = term(step)
            else:
                value = term(step)
            if not isinstance(value, Tensor) or value.ndim != 0:
                raise ValueError(
                    f"term {name!r} must return a scalar tensor (the sum over its items), got "
                    + (f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__)
                )
            if not per_step:
                # An empty count (every label ignored) gives an empty sum: 0 / 1.
                count = counts[name]
                value = value / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
                if scale != 1.0:
                    value = value * scale
            seen = value.detach()
            self._values[name] = seen if first or name not in self._values else self._values[name] + seen
            if coefficient != 0.0:
                if coefficient != 1.0:
                    value = value * coefficient
                total = value if total is None else total + value
        if total is None:  # every coefficient is 0: a zero that still reaches the model
            total = step.logits.sum() * 0.0
        return total

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, losses leave no trace: the terms are in eval mode, so their state stays; :meth:`values` does, too.

        For a further pass over batches that have been counted already.
        """
        modes = [(module, module.training) for module in self.modules()]
        values, coefficients = dict(self._values), dict(self._coefficients)
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            self._values, self._coefficients = values, coefficients

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Unweighted mean of each term in the last optimizer step, detached, on the device (this process's share)."""
        yield from self._values.items()

    def active(self) -> Iterator[tuple[str, Tensor]]:
        """Those of :meth:`values` that entered the loss: terms of coefficient 0 may be anything."""
        return ((name, value) for name, value in self._values.items() if self._coefficients[name] != 0.0)

    def unruly(self) -> tuple[str, float] | None:
        """A term whose coefficient in the last step was NaN or infinite, and that coefficient; None as it should be."""
        return next((pair for pair in self._coefficients.items() if not math.isfinite(pair[1])), None)


# The loss as a function of its coefficients, for who differentiates by them.


def term_means(objective: Objective, step: Step, counts: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """Value of each term that contributes, divided by its count: with their coefficients they sum to the loss.

    Args:
        objective: the objective; nothing is recorded in it.
        step: the whole batch of an optimizer step.
        counts: from :meth:`Objective.counts`.

    Returns:
        Scalars by name, with their graph.

    Raises:
        ValueError: a term did not return a scalar tensor.
    """
    means = {}
    for name, term, _, per_step, _ in objective.entries:
        value = term(step)
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise ValueError(f"term {name!r} must return a scalar tensor, the sum over its items; got {value!r:.80}")
        if not per_step:
            count = counts[name]
            value = value / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        means[name] = value
    return means


def coefficients(objective: Objective) -> dict[str, Coefficient]:
    """The coefficient of each term that contributes: a number where it is constant, otherwise its schedule.

    Examples:
        >>> from regularized.training.terms import CrossEntropy
        >>> coefficients(Objective({"task": CrossEntropy(weight=0.5)}))
        {'task': 0.5}
    """
    found: dict[str, Coefficient] = {}
    for entry in objective.entries:
        value = getattr(entry.weight, "value", None)
        constant = isinstance(value, float) and is_always(entry.weight, value)
        found[entry.name] = value if constant and value is not None else entry.weight
    return found


def reweigh(objective: Objective, weights: Mapping[str, Coefficient]) -> None:
    """Give terms other coefficients, in place: in this objective and, as ``weight``, in the terms themselves.

    A trainer that is built of the terms afterwards uses them, too.

    Args:
        objective: the objective.
        weights: new coefficients by the names of terms that contribute.

    Raises:
        ValueError: there is no such term.

    Examples:
        >>> from regularized.training.terms import CrossEntropy
        >>> objective = Objective({"task": CrossEntropy()})
        >>> reweigh(objective, {"task": 0.25})
        >>> coefficients(objective), objective.terms["task"].weight
        ({'task': 0.25}, 0.25)
    """
    known = [entry.name for entry in objective.entries]
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(f"the objective has no term {unknown} that contributes; it has {known}")
    schedules = {name: as_schedule(value, name=f"weight of term {name!r}") for name, value in weights.items()}
    for place, entry in enumerate(objective.entries):
        if entry.name in schedules:
            cast(Any, entry.term).weight = weights[entry.name]
            objective.entries[place] = entry._replace(weight=schedules[entry.name])
