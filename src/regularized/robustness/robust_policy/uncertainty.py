"""The worst case of an expectation over what the dynamics might be: five kinds of uncertainty, each by its dual.

Symbols, as in the paper's family of d-rectangular linear problems:

====================  ====================================================================================
``phi(s, a)``         features of a state and an action, d numbers >= 0 that sum to 1
``mu_i``              distribution of the next state that belongs to feature i; ``P(.|s,a) = sum_i phi_i mu_i``
``V``                 values of next states, in [0, cap]
``Z``                 ``(d, k)`` weights with ``E_i[g(V)] ~ sum_tau Z_i,tau g(V_tau)``: probabilities where mu is
                      known, or those of ridge regression on logged transitions, which may be negative
``nu_i``              worst case of ``E_i[V]``
``rho_i``, ``sigma``  radius of a ball around mu_i; price that an adversary pays for leaving mu_i
``alpha``             variable of the dual
``m``                 least value that the adversary can reach; 0 where a fail state is worth nothing
====================  ====================================================================================

An adversary chooses each mu_i on its own, inside a ball (``TVBall``, ``KLBall``) or at a price (``TVPenalty``,
``KLPenalty``, ``Chi2Penalty``)::

    TV ball       max over alpha in [0, cap] of  E[min(V, alpha)] - rho (alpha - m)
    KL ball       sup over alpha > 0 of          -alpha log E[exp(-V / alpha)] - alpha rho
    TV penalty    E[min(V, m + sigma)]
    KL penalty    -sigma log E[exp(-V / sigma)]
    chi2 penalty  max over alpha in [0, cap] of  E[V_a] - (E[V_a^2] - E[V_a]^2) / (4 sigma),  V_a = min(V, alpha)

The two of total variation and the one of chi2 are found exactly, among the values of V and, for chi2, the vertices of
the parabolas between them. With weights of ridge regression the first need not be concave, so that a local search (the
sibling's code has Nelder-Mead, coordinate by coordinate) can miss its maximum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Interval, at_least, check_fields, positive, share

__all__ = [
    "Chi2Penalty",
    "KLBall",
    "KLPenalty",
    "NoUncertainty",
    "TVBall",
    "TVPenalty",
    "Uncertainty",
    "WorstCase",
    "robust_expectation",
]

Radius: TypeAlias = float | tuple[float, ...]

# The search for the dual variable of the KL ball: a geometric grid, then golden sections around its best point.
_LEAST_ALPHA, _GRID, _SECTIONS = 1e-3, 128, 45
_LEAST_MASS = 1e-6


class WorstCase(NamedTuple):
    """What the adversary leaves.

    Attributes:
        value: (d,) worst expectations ``nu``.
        alpha: (d,) variables of the dual at which they are taken; None where there is no dual variable.
    """

    value: Tensor
    alpha: Tensor | None = None


class Uncertainty(Protocol):
    """What the adversary may do to each factor of the transitions."""

    def worst(self, weights: Tensor, values: Tensor, *, cap: float, lowest: float | None) -> WorstCase:
        """Worst case of the expectation of each factor.

        Args:
            weights: (d, k) weights ``Z`` of the values.
            values: (k,) values of next states in [0, cap], k at least 1.
            cap: the largest value that there can be.
            lowest: the least value that the adversary can reach; None for the least of ``values``.
        """
        ...


def robust_expectation(
    weights: Tensor, values: Tensor, uncertainty: Uncertainty, *, cap: float | None = None, lowest: float | None = 0.0
) -> Tensor:
    """Worst case of expectations under an uncertainty; differentiable in values and weights.

    What ridge regression makes of little data is not clipped here; an agent clips it to [0, cap].

    Args:
        weights: (d, k) weights of the values: rows of probabilities, or of ridge regression.
        values: (k,) values of next states in [0, cap].
        uncertainty: what the adversary may do.
        cap: the largest value that there can be; default the largest of ``values``.
        lowest: the least value that the adversary can reach, where that matters (total variation). Default 0: a fail
            state is worth nothing, as the theory of the paper's group assumes. None takes the least of ``values``.

    Returns:
        (d,) worst expectations; zeros where there are no values.

    Raises:
        ValueError: shapes do not fit, or there is not one radius for each factor.

    Examples:
        A coin whose value is 1 with probability 0.7. With a tenth of the mass moved:

        >>> coin, worth = torch.tensor([[0.3, 0.7]]), torch.tensor([0.0, 1.0])
        >>> robust_expectation(coin, worth, TVBall(0.1))
        tensor([0.6000])
        >>> robust_expectation(coin, worth, TVPenalty(0.5))
        tensor([0.3500])
        >>> robust_expectation(coin, worth, NoUncertainty())
        tensor([0.7000])
    """
    if weights.dim() != 2 or values.shape != weights.shape[1:]:
        raise ValueError(
            f"weights are (factors, values) and values (values,), got {tuple(weights.shape)} and {tuple(values.shape)}"
        )
    if not len(values):
        return weights.new_zeros(len(weights))
    top = float(values.detach().max()) if cap is None else cap
    return uncertainty.worst(weights, values, cap=top, lowest=lowest).value


@dataclass(frozen=True, slots=True)
class NoUncertainty:
    """The dynamics are those of the simulator: ``nu`` is the expectation itself, and the agent is not robust."""

    def worst(self, weights: Tensor, values: Tensor, *, cap: float, lowest: float | None) -> WorstCase:
        """The expectation, see :meth:`Uncertainty.worst`."""
        return WorstCase(weights @ values)


@dataclass(frozen=True, slots=True)
class TVBall:
    """A share of the mass of each factor may go wherever the adversary likes: total variation at most ``radius``.

    Args:
        radius: rho in [0, 1], one for all factors or a tuple with one for each. 0 is no uncertainty, as far as the
            weights are probabilities.

    Raises:
        ValueError: a radius is outside [0, 1].

    Examples:
        >>> row, values = torch.tensor([[0.5, 0.5]]), torch.tensor([1.0, 2.0])
        >>> robust_expectation(row, values, TVBall(0.2)), robust_expectation(row, values, TVBall(0.2), lowest=None)
        (tensor([1.1000]), tensor([1.3000]))
    """

    radius: Radius

    def __post_init__(self) -> None:
        _check_radius("TVBall", self.radius, share("a share of the probability"))

    def worst(self, weights: Tensor, values: Tensor, *, cap: float, lowest: float | None) -> WorstCase:
        """The exact maximum among the kinks, see :meth:`Uncertainty.worst`; of equals that with the smallest alpha."""
        radius = _radius(self.radius, weights)
        least = values.min() if lowest is None else values.new_tensor(lowest)
        below, above, knots = _sorted_sums(weights, values.clamp(max=cap))
        # Between two kinks the objective is a line: E[min(V, alpha)] = below + alpha * above.
        dual = below + knots * above - radius[:, None] * (knots - least)
        best = dual.detach().argmax(dim=1, keepdim=True)
        return WorstCase(dual.gather(1, best).squeeze(1), knots.detach()[best.squeeze(1)])


@dataclass(frozen=True, slots=True)
class KLBall:
    """Each factor may become any distribution whose Kullback-Leibler divergence from it is at most ``radius``.

    Args:
        radius: rho >= 0 in nats, one for all factors or a tuple with one for each; 0 is no uncertainty.
        centred: whether the mass that ridge regression lacks counts as value 0, ``1 + E[exp(-V/alpha) - 1]``, as the
            sibling's code has it for balls (default), or is left out, ``E[exp(-V/alpha)]``. For probabilities the same.
        up_to_cap: whether alpha is sought between 0.001 and ``cap`` only, as in the sibling's code, where a small ball
            costs too much, and one of radius 0 something. Default False: up to ``cap / radius``, beyond which it cannot
            lie, and down to 0.

    Raises:
        ValueError: a radius is negative or infinite.

    Examples:
        >>> robust_expectation(torch.tensor([[0.5, 0.5]]), torch.tensor([1.0, 2.0]), KLBall(0.1))
        tensor([1.2802])
    """

    radius: Radius
    centred: bool = True
    up_to_cap: bool = False

    def __post_init__(self) -> None:
        _check_radius("KLBall", self.radius, at_least(0.0, "nats"))

    def worst(self, weights: Tensor, values: Tensor, *, cap: float, lowest: float | None) -> WorstCase:
        """The best point of a grid, improved by golden sections to eight digits, see :meth:`Uncertainty.worst`.

        The expectation of the exponential is kept above 1e-6, as in the sibling's code. Where negative weights push it
        there, the result can be above ``cap``.
        """
        radius = _radius(self.radius, weights)[:, None]
        least = _least_value(weights, values, centred=self.centred)
        limit = max(cap, _LEAST_ALPHA)
        if not self.up_to_cap and bool((radius > 0).any()):
            limit = max(limit, cap / float(radius[radius > 0].min()))
        # In front of the logarithm, so that a small alpha does not push all mass below its bound.
        front = torch.zeros_like(least) if self.up_to_cap else least.detach()

        def dual(alpha: Tensor, weights: Tensor, values: Tensor) -> Tensor:
            """(d, points) objective at (d or 1, points) variables."""
            powers = torch.exp((front[None, :, None] - values[:, None, None]) / alpha)
            mass = _expectation(weights, powers, centred=self.centred).clamp(min=_LEAST_MASS)
            return front[:, None] - alpha * mass.log() - alpha * radius

        alpha = _maximiser(lambda alpha: dual(alpha, weights.detach(), values.detach()), weights, limit)
        found = dual(alpha[:, None], weights, values)
        if not self.up_to_cap:
            # The ends that the search does not reach: alpha of infinity, where there is no ball, and of 0.
            found = torch.where(radius == 0, weights @ values[:, None], found)
            found = torch.maximum(found, least[:, None])
        return WorstCase(found.squeeze(1), alpha)


@dataclass(frozen=True, slots=True)
class TVPenalty:
    """The adversary moves any mass, and pays ``strength`` for a unit of total variation.

    Args:
        strength: sigma, in the unit of values; infinity is no uncertainty.

    Raises:
        ValueError: it is not positive.

    Examples:
        >>> robust_expectation(torch.tensor([[0.5, 0.5]]), torch.tensor([1.0, 2.0]), TVPenalty(0.6), lowest=None)
        tensor([1.3000])
    """

    strength: float

    def __post_init__(self) -> None:
        check_fields(self, strength=positive("the price of a unit of total variation", infinity=True))

    def worst(self, weights: Tensor, values: Tensor, *, cap: float, lowest: float | None) -> WorstCase:
        """Values above ``lowest + strength`` are worth no more than that, see :meth:`Uncertainty.worst`."""
        least = values.min() if lowest is None else values.new_tensor(lowest)
        return WorstCase(weights @ torch.minimum(values, least + self.strength))


@dataclass(frozen=True, slots=True)
class KLPenalty:
    """The adversary becomes any distribution, and pays ``strength`` for a nat of Kullback-Leibler divergence.

    Args:
        strength: sigma, in the unit of values; infinity is no uncertainty.
        centred: as in :class:`KLBall`. Default True: with False, the sibling's code for penalties, the mass that ridge
            regression lacks makes ``nu`` grow without bound in sigma, where it should come near the expectation.

    Raises:
        ValueError: the strength is not positive.

    Examples:
        >>> robust_expectation(torch.tensor([[0.5, 0.5]]), torch.tensor([1.0, 2.0]), KLPenalty(1.0))
        tensor([1.3799])
    """

    strength: float
    centred: bool = True

    def __post_init__(self) -> None:
        check_fields(self, strength=positive("the price of a nat", infinity=True))

    def worst(self, weights: Tensor, values: Tensor, *, cap: float, lowest: float | None) -> WorstCase:
        """A soft minimum, at most ``cap``, see :meth:`Uncertainty.worst`."""
        if math.isinf(self.strength):
            return WorstCase(weights @ values)
        # In front of the logarithm, since powers of a small sigma would all be 0.
        least = _least_value(weights, values, centred=self.centred).detach()
        powers = torch.exp((least - values[:, None]) / self.strength)
        mass = _expectation(weights, powers[..., None], centred=self.centred).squeeze(1)
        tiny = torch.finfo(mass.dtype).tiny
        return WorstCase((least - self.strength * mass.clamp(min=tiny).log()).clamp(max=cap))


@dataclass(frozen=True, slots=True)
class Chi2Penalty:
    """The adversary pays ``strength`` for a unit of chi-squared divergence: value is lost in proportion to variance.

    Args:
        strength: sigma, in the unit of values; infinity is no uncertainty.

    Raises:
        ValueError: it is not positive.

    Examples:
        >>> robust_expectation(torch.tensor([[0.5, 0.5]]), torch.tensor([1.0, 2.0]), Chi2Penalty(1.0))
        tensor([1.4375])
    """

    strength: float

    def __post_init__(self) -> None:
        check_fields(self, strength=positive("the price of a unit of chi-squared divergence", infinity=True))

    def worst(self, weights: Tensor, values: Tensor, *, cap: float, lowest: float | None) -> WorstCase:
        """The exact maximum among kinks and vertices, see :meth:`Uncertainty.worst`."""
        clipped = values.clamp(max=cap)
        below, above, knots = _sorted_sums(weights, clipped)
        squares, _, _ = _sorted_sums(weights, clipped, power=2)

        def dual(alpha: Tensor) -> Tensor:
            """Behind each knot ``E[V_a] = below + alpha above`` and ``E[V_a^2] = squares + alpha^2 above``."""
            mean = below + alpha * above
            return mean - (squares + alpha.square() * above - mean.square()) / (4.0 * self.strength)

        ends = torch.cat([knots[1:], knots[-1:]])
        with torch.no_grad():
            vertex = ((2.0 * self.strength + below) / (1.0 - above)).clamp(knots, ends)
            # Of a segment that is convex, or a constant, the vertex says nothing: its ends are knots.
            vertex = torch.where(vertex.isfinite(), vertex, knots)
        candidates = torch.cat([dual(knots.expand_as(vertex)), dual(vertex)], dim=1)
        best = candidates.detach().argmax(dim=1, keepdim=True)
        alphas = torch.cat([knots.detach().expand_as(vertex), vertex], dim=1)
        return WorstCase(candidates.gather(1, best).squeeze(1), alphas.gather(1, best).squeeze(1))


# -- shared -------------------------------------------------------------------------------------


def _check_radius(owner: str, radius: Radius, range_: Interval) -> None:
    for one in radius if isinstance(radius, Sequence) else (radius,):
        range_(f"{owner}.radius", one)


def _radius(radius: Radius, weights: Tensor) -> Tensor:
    """(d,) radii."""
    if isinstance(radius, tuple) and len(radius) != len(weights):
        raise ValueError(f"there are {len(weights)} factors and {len(radius)} radii; give one for each, or one for all")
    return weights.new_tensor(radius).expand(len(weights))


def _sorted_sums(weights: Tensor, values: Tensor, *, power: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Knots ``0, V sorted, cap``, without the cap; and at each the sums below (of Z V^power) and above it (of Z).

    Behind the last value nothing is above, so that a further knot would change nothing but a constant of the radius.
    """
    knots, order = values.sort()
    first = knots[:1].clamp(max=0.0)  # 0, or the least value where that is negative
    sorted_weights = weights[:, order]
    zero = weights.new_zeros(len(weights), 1)
    below = torch.cat([zero, (sorted_weights * knots**power).cumsum(dim=1)], dim=1)
    mass = torch.cat([zero, sorted_weights.cumsum(dim=1)], dim=1)
    return below, mass[:, -1:] - mass, torch.cat([first, knots])


def _lacks_mass(weights: Tensor) -> Tensor:
    """(d,) whether weights do not sum to 1, up to rounding."""
    missing = 1.0 - weights.detach().sum(dim=1)
    return missing.abs() > 10 * weights.shape[1] * torch.finfo(weights.dtype).eps


def _least_value(weights: Tensor, values: Tensor, *, centred: bool) -> Tensor:
    """(d,) least value that has mass: 0 where ridge regression lacks some, and that counts."""
    return torch.where(_lacks_mass(weights) & centred, 0.0, values.min())


def _expectation(weights: Tensor, powers: Tensor, *, centred: bool) -> Tensor:
    """(d, points) ``E[g]`` of (k, d or 1, points) values of g; what the weights lack counts as g = 1 where centred."""
    found = torch.einsum("ik,kip->ip", weights, powers.expand(-1, len(weights), -1))
    if not centred:
        return found
    missing = torch.where(_lacks_mass(weights), 1.0 - weights.sum(dim=1), 0.0)
    return found + missing[:, None]


def _maximiser(dual: "_Dual", like: Tensor, limit: float) -> Tensor:
    """(d,) where the objective of each factor is largest between the least alpha and ``limit``."""
    grid = torch.logspace(math.log10(_LEAST_ALPHA), math.log10(limit), _GRID, dtype=like.dtype, device=like.device)
    best = dual(grid[None]).argmax(dim=1)
    low, high = grid[(best - 1).clamp(min=0)], grid[(best + 1).clamp(max=_GRID - 1)]
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = dual(left[:, None]).squeeze(1), dual(right[:, None]).squeeze(1)
    for _ in range(_SECTIONS):
        leftwards = at_left >= at_right
        low, high = torch.where(leftwards, low, left), torch.where(leftwards, right, high)
        new = torch.where(leftwards, high - golden * (high - low), low + golden * (high - low))
        at_new = dual(new[:, None]).squeeze(1)
        left, right = torch.where(leftwards, new, right), torch.where(leftwards, left, new)
        at_left, at_right = torch.where(leftwards, at_new, at_right), torch.where(leftwards, at_left, at_new)
    # An end of the range can be the best of all.
    candidates = torch.stack([left, right, low, high], dim=1)
    best = dual(candidates).argmax(dim=1, keepdim=True)
    return candidates.gather(1, best).squeeze(1)


class _Dual(Protocol):
    def __call__(self, alpha: Tensor, /) -> Tensor: ...
