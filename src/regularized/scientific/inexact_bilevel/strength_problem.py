"""A training objective as a function of parameters and coefficients, without touching model or terms.

For :func:`~regularized.scientific.inexact_bilevel.learn_strengths`:

    h(x, theta) = sum of the other terms + sum_i exp(theta_i) term_i      (training data, one full batch)
    g(x)        = validation loss

x holds everything that is trained, of the model and of the terms, in float64; theta the logarithms of the strengths.
"""

import copy
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from regularized.mechanisms.taps import Taps
from regularized.training.data import TensorData
from regularized.training.objective import Objective, coefficients, reweigh, term_means
from regularized.training.progress import Progress
from regularized.training.randomness import preserved, seed_all
from regularized.training.step import Batch, Step

__all__ = ["StrengthProblem", "whole_batch"]

_NOW = Progress(0, 1)
_MOMENTS = ("transform", "before_step", "after_step")  # what a sum of terms cannot show
_TERMS = "objective.terms."
_SHORT = 1e-5  # of a step for differences, in float64

Parameters = dict[str, Tensor]


def whole_batch(data: Any, *, device: torch.device) -> Batch:
    """All samples as one batch in float64, each with its index.

    Args:
        data: a ``TensorData``, or one batch: ``(x, y)``, ``(x, y, index)`` or a mapping.
        device: where to put it.

    Raises:
        TypeError: mini-batches.

    Examples:
        >>> whole_batch((torch.zeros(3, 2), torch.tensor([0, 1, 0])), device=torch.device("cpu")).index
        tensor([0, 1, 2])
    """
    if isinstance(data, TensorData):
        batch = Batch(data.inputs, data.targets, None, dict(data.extras))
    elif isinstance(data, DataLoader) or not isinstance(data, Batch | Tensor | Mapping | Sequence):
        raise TypeError(
            f"all samples are needed at once, got {type(data).__name__}: with mini-batches the training objective is "
            "another function in every step, and the line search needs one. Give (x, y) with the whole set, or a "
            "TensorData"
        )
    else:
        batch = Batch.of(data)
    if not (batch.targets is None or isinstance(batch.targets, Tensor)):
        raise TypeError("this looks like several batches; give all samples as one, (x, y)")
    if batch.index is None:
        batch = Batch(batch.inputs, batch.targets, torch.arange(batch.size), batch.extras)
    return batch.map(lambda t: t.to(device, torch.float64 if t.is_floating_point() else t.dtype))


class _Whole(nn.Module):
    """Model and terms under one roof, so that ``functional_call`` exchanges the tensors of both."""

    def __init__(self, model: nn.Module, objective: Objective, taps: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.taps = tuple(taps)

    def forward(self, compute: Callable[[nn.Module, Mapping[str, Tensor] | None], Any]) -> Any:
        """``compute(model, hidden states)``, where the model is the one with exchanged tensors."""
        if not self.taps:
            return compute(self.model, None)
        with Taps(self.model, self.taps) as taps:
            return compute(self.model, taps.states)


class StrengthProblem:
    """Lower and upper objective of learning strengths.

    Args:
        objective: named terms.
        terms: names of those whose strengths are learnt.
        validation: data like ``data``, measured by the other terms of the objective that look at data, in eval mode; or
            a function of the model that returns a scalar.
        model: the model; its modes are those of training.
        data: the training set.
        deterministic: False freezes what model and terms draw at random, instead of refusing it.

    Attributes:
        names: of the learnt terms.
        start: the parameters now, float64.
        strengths: present strengths.

    Raises:
        ValueError: a name is unknown, a strength is not positive or scheduled, a term changes model or batch or its own
            memory, something is random, or a term does not depend on the parameters or is not twice differentiable.
        TypeError: mini-batches, or a name instead of several.
    """

    def __init__(
        self,
        objective: Objective,
        terms: Sequence[str],
        validation: Any,
        *,
        model: nn.Module,
        data: Any,
        deterministic: bool,
    ) -> None:
        self._objective = objective
        self.names: tuple[str, ...] = _checked_names(objective, terms)
        strengths, self._fixed = _weights(objective, self.names)
        self.strengths: dict[str, float] = strengths
        self._frozen = not deterministic
        tensors = next(model.parameters(), None)
        self.device: torch.device = torch.device("cpu") if tensors is None else tensors.device
        self._batch = whole_batch(data, device=self.device)
        self._counts = objective.counts([self._batch])
        self._build(model, objective, {})
        if not self.start:
            raise ValueError("nothing is trained: no parameter of the model or of the terms requires a gradient")
        self._check_pure(model, objective)
        self._validation = self._checked_validation(validation, objective)

    def _build(self, model: nn.Module, objective: Objective, held: Mapping[str, nn.Module]) -> None:
        """Tensors of the user's model and terms, cast to float64; terms in ``held`` stand in for their originals."""
        parts = {name: held.get(name, term) for name, term in objective.terms.items()}
        self._whole = _Whole(model, Objective(parts), objective.taps)
        self.start: Parameters = {}
        self._constants: dict[str, Tensor] = {}
        for name, parameter in self._whole.named_parameters():
            if parameter.requires_grad:
                self.start[name] = parameter.detach().to(torch.float64, copy=True)
            else:  # still a Parameter: terms tell by it what is not trained
                wide = parameter.detach().to(torch.float64) if parameter.is_floating_point() else parameter.detach()
                self._constants[name] = nn.Parameter(wide, requires_grad=False)
        for name, buffer in self._whole.named_buffers():
            dtype = torch.float64 if buffer.is_floating_point() else buffer.dtype
            self._constants[name] = buffer.detach().to(dtype, copy=True)
        self._buffers = [name for name, _ in self._whole.named_buffers()]

    # -- names and vectors ------------------------------------------------------------------------

    def theta(self) -> Tensor:
        """(k,) logarithms of the strengths to start from, float64."""
        return torch.tensor(list(self.strengths.values()), dtype=torch.float64, device=self.device).log()

    def named(self, theta: Tensor) -> dict[str, float]:
        """Strengths by name."""
        return dict(zip(self.names, theta.exp().tolist(), strict=True))

    def public(self, x: Parameters) -> Parameters:
        """Parameters by the names that the user knows."""
        return {name.removeprefix("model.").removeprefix("objective."): value.clone() for name, value in x.items()}

    def apply(self, strengths: Mapping[str, float], parameters: Parameters) -> None:
        """Write strengths and parameters, named as by :meth:`public`, into the user's objective and model."""
        reweigh(self._objective, strengths)
        own = dict(self._whole.named_parameters())
        with torch.no_grad():
            for name, public in zip(self.start, self.public(self.start)):
                own[name].copy_(parameters[public])

    # -- the two objectives -----------------------------------------------------------------------

    def lower(self, x: Parameters, theta: Tensor) -> Tensor:
        """h: the training objective with the strengths exp(theta)."""
        means = self.means(x)
        total = theta.new_zeros(())
        for name, weight in self._fixed.items():
            if weight != 0.0:  # 0 * inf must not become nan
                total = total + weight * means[name]
        for name, strength in zip(self.names, theta.exp().unbind(), strict=True):
            total = total + strength * means[name]
        return total

    def upper(self, x: Parameters) -> Tensor:
        """g: the validation loss."""
        with self._modes(evaluate=True):
            loss: Tensor = self._call(x, self._validation)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"validation must return one number as a tensor, got {loss!r:.80}; take the mean")
        return loss.reshape(())

    def means(self, x: Parameters) -> dict[str, Tensor]:
        """Mean of each term over the training set."""

        def compute(model: nn.Module, hidden: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
            return term_means(self._whole.objective, Step(model, self._batch, _NOW, hidden), self._counts)

        with self._modes(evaluate=False):
            found: dict[str, Tensor] = self._call(x, compute)
        return found

    def strong_convexity(self, strengths: Mapping[str, float]) -> float:
        """What the terms guarantee, if all the rest is convex; 0 where a parameter has no such term."""
        weights = {**self._fixed, **strengths}
        model = self._whole.model
        moduli = dict.fromkeys(self.start, 0.0)
        for name, term in self._whole.objective.terms.items():
            declare = getattr(term, "strong_convexity", None)
            for parameter, modulus in declare(model).items() if callable(declare) else ():
                if f"model.{parameter}" in moduli:
                    moduli[f"model.{parameter}"] += weights.get(name, 0.0) * modulus
        return min(moduli.values())

    def convex_terms(self) -> list[str]:
        """Names of the terms that declare strong convexity."""
        return [name for name, term in self._whole.objective.terms.items() if hasattr(term, "strong_convexity")]

    def _call(self, x: Parameters, compute: Callable[..., Any]) -> Any:
        # What is written into a buffer must reach neither the user's module nor the next evaluation.
        copies = {name: self._constants[name].clone() for name in self._buffers}
        tensors = {**self._constants, **x, **copies}
        if not self._frozen:
            return torch.func.functional_call(self._whole, tensors, (compute,))
        with preserved():
            seed_all(0)
            return torch.func.functional_call(self._whole, tensors, (compute,))

    @contextmanager
    def _modes(self, *, evaluate: bool) -> Iterator[None]:
        """Terms as in training, the model as the user left it; all in eval mode for validation. Put back after."""
        modes = [(module, module.training) for module in self._whole.modules()]
        if evaluate:
            self._whole.eval()
        else:
            models = [(module, module.training) for module in self._whole.model.modules()]
            self._whole.objective.train()
            for module, mode in models:  # a term may hold the model, too
                module.training = mode
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    # -- checks: once, at the start ---------------------------------------------------------------

    def _check_pure(self, model: nn.Module, objective: Objective) -> None:
        """An evaluation must leave no trace, and the next one must give the same."""
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                raise ValueError(
                    "the model has BatchNorm in train mode: its running statistics, which validation uses, would not "
                    "follow the parameters. Train it first, then call model.eval()"
                )
        held: dict[str, nn.Module] = {}
        for name in self._terms_that_write():
            held[name] = copy.copy(objective.terms[name])
            if isinstance(getattr(held[name], "momentum", None), float):
                held[name].momentum = 1.0  # type: ignore[assignment]
        if held:
            self._build(model, objective, held)
            if stubborn := self._terms_that_write():
                raise ValueError(
                    f"terms {stubborn} change their memory whenever they are evaluated, so the training objective is "
                    "no fixed function. A term with a `momentum` is held still by momentum 1; leave others out"
                )
        with torch.no_grad():
            first, second = self.means(self.start), self.means(self.start)
        if random := [name for name in first if not _same(first[name], second[name])]:
            raise ValueError(
                f"two evaluations of the terms {random} at the same parameters differ: dropout, noise or another "
                "random draw. Call model.eval() first; or acknowledge by deterministic=False that one draw is frozen "
                "and the strengths are learnt for it"
            )

    def _terms_that_write(self) -> list[str]:
        """Terms some of whose buffers are other ones after an evaluation."""
        seen: dict[str, Tensor] = {}
        copies = {name: self._constants[name].clone() for name in self._buffers}

        def compute(model: nn.Module, hidden: Mapping[str, Tensor] | None) -> None:
            term_means(self._whole.objective, Step(model, self._batch, _NOW, hidden), self._counts)
            seen.update({name: buffer.clone() for name, buffer in self._whole.named_buffers()})

        with self._modes(evaluate=False), preserved(), torch.no_grad():
            torch.func.functional_call(self._whole, {**self._constants, **self.start, **copies}, (compute,))
        changed = [name for name, buffer in seen.items() if not _same(buffer, self._constants[name])]
        if inside := [name for name in changed if not name.startswith(_TERMS)]:
            raise ValueError(
                f"a forward pass of the model changes its buffers {inside}, so the training objective is no fixed "
                "function; call model.eval() if that stops it"
            )
        return list(dict.fromkeys(name.removeprefix(_TERMS).split(".")[0] for name in changed))

    def _checked_validation(self, validation: Any, objective: Objective) -> Callable[..., Tensor]:
        if callable(validation) and not isinstance(validation, TensorData | Mapping):
            return lambda model, _: validation(model)
        batch = whole_batch(validation, device=self.device)
        measuring = {
            name: weight
            for name, weight in self._fixed.items()
            if weight and not getattr(objective.terms[name], "per_step", False)
        }
        if not measuring:
            raise ValueError(
                "no term is left to measure the validation data by: all that look at data are among those whose "
                f"strengths are learnt, {list(self.names)}. Give validation as a function of the model that returns a "
                "loss"
            )
        parts = {name: self._whole.objective.terms[name] for name in measuring}
        criterion = Objective(parts)
        counts = criterion.counts([batch])

        def loss(model: nn.Module, hidden: Mapping[str, Tensor] | None) -> Tensor:
            means = term_means(criterion, Step(model, batch, _NOW, hidden), counts)
            return torch.stack([weight * means[name] for name, weight in measuring.items()]).sum()

        return loss

    def validation_slope(self) -> float:
        """Norm of the gradient of the validation loss at the start.

        Raises:
            ValueError: there is none.
        """
        x = {name: value.clone().requires_grad_() for name, value in self.start.items()}
        gradient = _derivatives(self.upper(x), list(x.values()), "the validation loss")
        slope = math.sqrt(sum(float(part.detach().square().sum()) for part in gradient or ()))
        if not 0.0 < slope < math.inf:
            raise ValueError(
                f"the validation loss does not change with the parameters at the start (its gradient is {slope:.3g}), "
                "so no strength can be learnt by it; compute it from what the model returns, without detach()"
            )
        return slope

    def check_terms(self) -> None:
        """Each learnt term, and all others together, must bend with the parameters, twice differentiably.

        Raises:
            ValueError: which one does not, and why.
        """
        generator = torch.Generator().manual_seed(0)
        x = {name: value.clone().requires_grad_() for name, value in self.start.items()}
        probe = [torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device) for v in x.values()]
        ahead, behind = self._slopes(x, probe, _SHORT), self._slopes(x, probe, -_SHORT)
        for name, value in self._parts(x).items():
            gradient = _derivatives(value, list(x.values()), name)
            slope = None if gradient is None else _along(gradient, probe)
            bend = None if slope is None else _derivatives(slope, list(x.values()), name)
            found = [*(gradient or ()), *(bend or ())]
            if not all(bool(torch.isfinite(part).all()) for part in found):
                raise ValueError(
                    f"{name} is not twice differentiable at the starting parameters: its gradient or a product with "
                    "its Hessian is not finite (a square root or a norm at 0, for example). Start elsewhere, or smooth "
                    "it, as sqrt(x^2 + 1e-6)"
                )
            measured = (ahead[name] - behind[name]) / (2.0 * _SHORT)
            claimed = 0.0 if bend is None else float(_along(bend, probe).detach())
            if abs(claimed - measured) > 1e-3 * abs(measured) + 1e-6 * (1.0 + abs(ahead[name])):
                raise ValueError(
                    f"the second derivatives of {name} are not those of its gradient: along one direction autograd "
                    f"gives {claimed:.4g}, differences give {measured:.4g}. It has a kink here, or an operation that "
                    "can be differentiated only once (torch then gives 0 without a word); write it with others"
                )
            if not any(bool(part.any()) for part in found):
                raise ValueError(
                    f"{name} does not depend on the parameters at the start, so no strength can be learnt. If it has a "
                    "memory, fill that first: train a little with it"
                )

    def _parts(self, x: Parameters) -> dict[str, Tensor]:
        """Each learnt term, and the sum of the others, by what errors call them."""
        means = self.means(x)
        parts = {f"term {name!r}": means[name] for name in self.names}
        if others := [weight * means[name] for name, weight in self._fixed.items() if weight]:
            parts["the sum of the other terms"] = torch.stack(others).sum()
        return parts

    def _slopes(self, x: Parameters, probe: list[Tensor], distance: float) -> dict[str, float]:
        """Directional derivative of each part, a little away along the same direction."""
        moved = {name: (v + distance * p).detach().requires_grad_() for (name, v), p in zip(x.items(), probe)}
        slopes = {}
        for name, value in self._parts(moved).items():
            gradient = _derivatives(value, list(moved.values()), name)
            slopes[name] = 0.0 if gradient is None else float(_along(gradient, probe).detach())
        return slopes


def _along(vectors: Iterable[Tensor], probe: Iterable[Tensor]) -> Tensor:
    return torch.stack([torch.sum(v * p) for v, p in zip(vectors, probe)]).sum()


def _derivatives(value: Tensor, x: list[Tensor], name: str) -> tuple[Tensor, ...] | None:
    """Derivatives of a scalar by x with their graph; None where it does not depend on x."""
    if not value.requires_grad:
        return None
    try:
        found = torch.autograd.grad(value, x, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            f"{name} cannot be differentiated twice, which hypergradients need ({error}). Leave it out, or write it "
            "with operations that have second derivatives"
        ) from error
    return tuple(torch.zeros_like(t) if part is None else part for part, t in zip(found, x))


def _checked_names(objective: Objective, terms: Sequence[str]) -> tuple[str, ...]:
    if isinstance(terms, str):
        raise TypeError(f"terms must be several names, for example [{terms!r}], got one string")
    if not terms:
        raise ValueError("terms must name at least one term whose strength is learnt")
    known = list(coefficients(objective))
    for name in terms:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"the objective has no term {name!r} that adds to the loss; it has {known}{hint}")
    if len(set(terms)) < len(terms):
        raise ValueError(f"a term occurs twice in {list(terms)}")
    if set(terms) == set(known):
        raise ValueError(
            "every term of the objective is to be learnt; then nothing fixes their common scale, and no data need be "
            "fitted. Leave out the one that fits the data"
        )
    for name, term in objective.terms.items():
        if does := [moment for moment in _MOMENTS if callable(getattr(term, moment, None))]:
            raise ValueError(
                f"term {name!r} does more than add to the loss ({', '.join(does)}), so minimising a sum of terms is "
                "not what training with it does; leave it out here"
            )
    return tuple(terms)


def _weights(objective: Objective, names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Strengths to start from, and the coefficients of the other terms."""
    learnt: dict[str, float] = {}
    fixed: dict[str, float] = {}
    for name, weight in coefficients(objective).items():
        if callable(weight):
            raise ValueError(
                f"the coefficient of term {name!r} is a schedule, but the inner problem is solved to its end, without "
                "steps; give it a number as `weight`"
            )
        if name not in names:
            fixed[name] = weight
        elif not (weight > 0.0 and math.isfinite(weight)):
            raise ValueError(
                f"the strength of term {name!r} is learnt as exp(theta), so it must be positive at the start; its "
                f"weight is {weight}. Give it a small one, such as 1e-3"
            )
        else:
            learnt[name] = weight
    return {name: learnt[name] for name in names}, fixed


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))) if one.numel() else True
