"""How pressure and temperature go over a training, and how fast each tensor cools, from its Hessian trace.

At the share u of the training::

    pressure     p = min(1, u / compress)
    temperature  t = start                                          while u <= 1 - anneal
                     start * (1 + cos(pi v)) / 2  or start (1 - v)  then, v = (u - (1 - anneal)) / anneal

so that what comes out of the training is exactly hard. A tensor of sensitivity s, from the traces chi of all
tensors by ``s = sigmoid(kappa (log chi - mean) / std)``, has the factor ``f = exp(-alpha s)``.

Text and code of the paper disagree on what the factor does. The text says that sensitive tensors (of a large trace)
stay soft for longer; the code multiplies the temperature by f, so that they are *colder*. The published ablation
(alpha > 0 is better than 0 and than alpha < 0) was made with the code, which is the default here: see
:attr:`Annealing.factor_on`.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from regularized.compression.hestia.quantizer import Codebook, optimal_temperature
from regularized.mechanisms.ranges import Choice, allowed, at_least, between, check_fields, finite, share

__all__ = ["Annealing", "FactorOn", "sensitivities", "temperature_factors"]

FactorOn: TypeAlias = Literal["temperature", "progress", "plateau"]

_SMALLEST_TRACE = 1e-8


@dataclass(frozen=True, slots=True)
class Annealing:
    """Pressure and temperature as functions of the share of the training that is done.

    Args:
        compress: share of the training in which pressure rises from 0 to 1; default 0.2, the paper's best perplexity
            and accuracy together. 0 quantizes from the first step on.
        anneal: last share of the training, in which the temperature falls to 0; default 0.8, the code's.
        temperature: at the beginning; default :func:`~regularized.compression.hestia.optimal_temperature` of the
            codebook, for ternary weights 0.35089, as in the code. 0 is hard rounding throughout: plain
            straight-through training.
        decay: ``"cosine"`` (default, the code's) or ``"linear"``.
        factor_on: what a tensor's factor f acts on: ``"temperature"`` (default, the code's style ``hessian``):
            multiplied by f throughout, so a large trace makes a tensor colder; ``"progress"`` (the paper's text): v
            becomes ``v^(1 / f)``, so a large trace keeps a tensor soft for longer, and all end together; ``"plateau"``
            (the code's styles ``cosine`` and ``linear``, for parity): only before the decay, where the temperature
            then jumps up.

    Raises:
        ValueError: a share is out of range, ``anneal`` is 0, or the two together are above 1; the temperature is
            negative; an unknown word.

    Examples:
        >>> annealing = Annealing(temperature=0.3)
        >>> [round(annealing.pressure(u), 2) for u in (0.0, 0.1, 0.2, 1.0)]
        [0.0, 0.5, 1.0, 1.0]
        >>> [round(annealing.cooling(u), 2) for u in (0.0, 0.2, 0.6, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """

    compress: float = 0.2
    anneal: float = 0.8
    temperature: float | None = None
    decay: Literal["cosine", "linear"] = "cosine"
    factor_on: FactorOn = "temperature"

    def __post_init__(self) -> None:
        check_fields(
            self,
            compress=share("of the training; the paper uses 0.2"),
            anneal=between(0.0, 1.0, "(]", "a share of the training", "without annealing nothing ends hard"),
            temperature=at_least(0.0, "0 is hard rounding").or_none("the optimal one"),
            decay=Choice("cosine", "linear"),
            factor_on=Choice("temperature", "progress", "plateau"),
        )
        if self.compress + self.anneal > 1.0 + 1e-12:
            raise ValueError(
                f"compress={self.compress:g} and anneal={self.anneal:g} are more than the whole training together: the "
                "temperature would fall before all of the weight is quantized"
            )

    def pressure(self, done: float) -> float:
        """Share of the quantized weight.

        Args:
            done: share of the training, 0 to 1.
        """
        return done / self.compress if done < self.compress else 1.0

    def cooling(self, done: float, factor: float = 1.0) -> float:
        """Temperature of a tensor as a share of that at the beginning; exactly 0 at the end.

        Args:
            done: share of the training, 0 to 1.
            factor: the tensor's, from :func:`temperature_factors`; default 1.
        """
        if done >= 1.0:
            return 0.0
        plateau = 1.0 - self.anneal
        if done <= plateau:
            return 1.0 if self.factor_on == "progress" else factor
        gone = (done - plateau) / self.anneal
        if self.factor_on == "progress":
            gone = gone ** (1.0 / factor)
        left = 0.5 * (1.0 + math.cos(math.pi * gone)) if self.decay == "cosine" else 1.0 - gone
        return max(left, 0.0) * (factor if self.factor_on == "temperature" else 1.0)

    def start(self, codebook: Codebook = "ternary") -> float:
        """The temperature at the beginning, of a tensor with this codebook and factor 1."""
        return optimal_temperature(codebook) if self.temperature is None else self.temperature


# -- factors ------------------------------------------------------------------------------------------


@allowed(kappa=at_least(0.0, "gain of the sigmoid"))
def sensitivities(traces: Mapping[str, float], *, kappa: float = 1.0) -> dict[str, float]:
    """How sensitive each tensor is beside the others, in (0, 1): a sigmoid of the standardised log trace.

    Args:
        traces: Hessian trace of each tensor, by name. Those below 1e-8, negative ones too, count as 1e-8.
        kappa: gain; default 1, the paper's.

    Returns:
        By name; 0.5 for all where all traces are equal.

    Raises:
        ValueError: there are no traces, or one is NaN or infinite.

    Warns:
        UserWarning: traces are negative: too few probes, or a model that is far from a minimum.

    Examples:
        >>> sensitivities({"q": 1.0, "k": 1.0})
        {'q': 0.5, 'k': 0.5}
    """
    if not traces:
        raise ValueError("there are no traces; hessian_traces(model, ...) gives one for each layer")
    if wrong := [name for name, trace in traces.items() if not math.isfinite(trace)]:
        raise ValueError(f"the traces of {wrong} are not finite: the calibration met NaN or infinite losses or weights")
    if negative := [name for name, trace in traces.items() if trace < 0.0]:
        warnings.warn(
            f"{len(negative)} of {len(traces)} traces are negative, such as that of {negative[0]!r}, and count as "
            f"{_SMALLEST_TRACE:g}: take more probes or batches, or a model that is trained",
            stacklevel=3,
        )
    logs = torch.tensor([math.log(max(trace, _SMALLEST_TRACE)) for trace in traces.values()], dtype=torch.float64)
    standard = (logs - logs.mean()) / (logs.std(correction=0) + 1e-8)
    return dict(zip(traces, torch.sigmoid(kappa * standard).tolist(), strict=True))


@allowed(alpha=finite("strength of the Hessian part; 0 switches it off"))
def temperature_factors(traces: Mapping[str, float], *, alpha: float = 0.4, kappa: float = 1.0) -> dict[str, float]:
    """The factor ``exp(-alpha s)`` of each tensor, from its Hessian trace.

    Args:
        traces: by name, see :func:`sensitivities`.
        alpha: strength; default 0.4, the paper's best. At 0 all tensors share one temperature.
        kappa: gain of the sensitivity; default 1.

    Returns:
        Factors by name, between ``exp(-alpha)`` and 1 for a positive alpha.

    Raises:
        ValueError: as :func:`sensitivities`; ``alpha`` is not finite.

    Examples:
        >>> factors = temperature_factors({"q": 10.0, "k": 0.1})
        >>> {name: round(factor, 3) for name, factor in factors.items()}
        {'q': 0.746, 'k': 0.898}
    """
    return {name: math.exp(-alpha * s) for name, s in sensitivities(traces, kappa=kappa).items()}
