"""Annealed weights in a model: surgery, what a layer computes with in training and evaluation, freezing.

A layer keeps its latent weight as ``parametrizations.weight.original``. In training mode its weight is the soft one of
:func:`~regularized.compression.hestia.anneal` at the present pressure and temperature; in evaluation mode it is always
the hard one, so that what is evaluated is what is exported.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regularized.compression.hestia.quantizer import (
    Codebook,
    StraightThrough,
    anneal,
    check_group_size,
    levels_of,
    quantize_weight,
)
from regularized.compression.hestia.schedule import Annealing
from regularized.mechanisms.ranges import Choice, allowed, at_least, count, share
from regularized.mechanisms.surgery import NoEffectWarning, select_modules, tied_parameters

__all__ = [
    "AnnealedWeight",
    "Annealer",
    "anneal_weights",
    "annealed_weights",
    "freeze_weights",
    "latent_weights",
    "soft_evaluation",
]


class AnnealedWeight(nn.Module):
    """The parametrization of one weight, for ``torch.nn.utils.parametrize``.

    Args:
        codebook: see :func:`~regularized.compression.hestia.levels_of`.
        group_size: as in :func:`~regularized.compression.hestia.anneal`.
        straight_through: as there.
        name: of the layer, for messages.

    Attributes:
        pressure: share of the quantized weight, now; 0 at the beginning.
        temperature: of the softmax, now.

    Raises:
        ValueError: the codebook is none; at a call: ``group_size`` does not fit the weight.

    Examples:
        >>> layer = nn.Linear(4, 2)
        >>> weight = AnnealedWeight(group_size=-1)
        >>> _ = parametrize.register_parametrization(layer, "weight", weight)
        >>> weight.set(pressure=1.0, temperature=0.3)
        >>> _ = layer.eval()
        >>> len(layer.weight[0].unique()) <= 3
        True
    """

    def __init__(
        self,
        *,
        codebook: Codebook = "ternary",
        group_size: int = 128,
        straight_through: StraightThrough = "identity",
        name: str = "",
    ) -> None:
        super().__init__()
        self.levels: tuple[float, ...] = levels_of(codebook)
        self.group_size = group_size
        self.straight_through: StraightThrough = straight_through
        self.name = name
        # Python numbers, which no step has to read from a device.
        self.pressure: float = 0.0
        self.temperature: float = 0.0
        self.soft_in_evaluation: bool = False

    @allowed(pressure=share(), temperature=at_least(0.0))
    def set(self, *, pressure: float, temperature: float) -> None:
        """Go to a point of the schedule."""
        self.pressure = pressure
        self.temperature = temperature

    @property
    def is_hard(self) -> bool:
        """Whether the weight in training is the hard one."""
        return self.pressure == 1.0 and self.temperature == 0.0

    def forward(self, weight: Tensor) -> Tensor:
        """Latent weight to weight, same shape.

        Raises:
            ValueError: the latent weight holds NaN or infinite entries. Only on a CPU, where looking costs nothing; on
                an accelerator they reach the loss.
        """
        if self.training or self.soft_in_evaluation:
            out = self.soft(weight)
        else:
            out = quantize_weight(weight, codebook=self.levels, group_size=self.group_size)
        if not torch.compiler.is_compiling() and weight.device.type == "cpu" and not self._is_finite(out):
            raise ValueError(
                f"the weight of layer {self.name!r} holds NaN or infinite entries; lower the learning rate, or look "
                "for a loss that is not finite"
            )
        return out

    def _is_finite(self, weight: Tensor) -> bool:
        """One weight of each group: what is not finite makes the scale so, and with it the whole group."""
        rows = weight.detach().reshape(1, -1) if self.group_size == 0 else weight.detach()
        group = self.group_size if self.group_size > 0 else rows.shape[-1]
        return bool(rows[..., ::group].isfinite().all())

    def soft(self, weight: Tensor) -> Tensor:
        """What the layer computes with in training."""
        return anneal(
            weight,
            temperature=self.temperature,
            pressure=self.pressure,
            codebook=self.levels,
            group_size=self.group_size,
            straight_through=self.straight_through,
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight that is assigned is taken as the latent one."""
        return weight

    def get_extra_state(self) -> Tensor:
        """Pressure and temperature, so that they are saved with the model."""
        return torch.tensor([self.pressure, self.temperature], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what was saved."""
        self.pressure, self.temperature = state.tolist()

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"levels={self.levels}, group_size={self.group_size}, pressure={self.pressure:.3g}, "
            f"temperature={self.temperature:.3g}"
        )


# -- into a model and out of it -----------------------------------------------------------------------


@allowed(straight_through=Choice("identity", "with_scale"))
def anneal_weights(
    model: nn.Module,
    *,
    codebook: Codebook = "ternary",
    group_size: int = 128,
    straight_through: StraightThrough = "identity",
    include: tuple[type[nn.Module], ...] = (nn.Linear,),
    exclude: Iterable[str] = (),
) -> list[str]:
    """Anneal the weight of every linear layer of a model, in place; biases stay as they are.

    The parameters stay the same objects, so an optimizer that was built before goes on. Until an :class:`Annealer` or
    the term :class:`~regularized.compression.hestia.Hestia` moves them, the weights in training are the latent ones.

    Args:
        model: the model.
        codebook: levels, default ternary; see :func:`~regularized.compression.hestia.levels_of`.
        group_size: weights that share a scale; default 128, as in :func:`~regularized.compression.hestia.anneal`.
        straight_through: as there.
        include: types of layers; default linear. Any with a parameter ``weight`` whose last dimension is the input's.
        exclude: names of submodules to leave out, such as ``"lm_head"``, which the paper keeps in full precision.

    Returns:
        Names of the layers.

    Raises:
        ValueError: a layer has a size that ``group_size`` does not divide, is annealed already, is lazy, shares its
            weight with another one, or holds hard weights already, which must not be quantized again.

    Warns:
        NoEffectWarning: no layer matches.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> anneal_weights(model, group_size=-1, exclude=["2"])
        ['0']
        >>> _ = freeze_weights(model, warn=False)
        >>> len(model[0].weight[0].unique()) <= 3
        True
    """
    levels = levels_of(codebook)
    layers = list(select_modules(model, include, exclude))
    if not layers:
        warnings.warn(
            f"no layer of {type(model).__name__} is one of {[kind.__name__ for kind in include]}: nothing is annealed",
            NoEffectWarning,
            stacklevel=3,
        )
    tied = tied_parameters(model)
    for name, layer in layers:  # look at everything first, so that an error leaves the model as it was
        if _annealed(layer) is not None:
            raise ValueError(f"layer {name!r} is annealed already; freeze_weights(model) first")
        weight = layer.weight
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is lazy and has no weight yet; run one batch through the model first")
        if id(weight) in tied:
            raise ValueError(
                f"layer {name!r} shares its weight ({', '.join(tied[id(weight)])}); exclude it, since only one of the "
                "owners would be annealed"
            )
        check_group_size(cast(Tensor, weight).shape, group_size, owner=f"the weight of layer {name!r}")
        _refuse_hard(name, cast(Tensor, weight), levels, group_size)
    for name, layer in layers:
        annealed = AnnealedWeight(
            codebook=levels, group_size=group_size, straight_through=straight_through, name=name
        ).train(layer.training)
        parametrize.register_parametrization(layer, "weight", annealed)
    return [name for name, _ in layers]


def _refuse_hard(name: str, weight: Tensor, levels: tuple[float, ...], group_size: int) -> None:
    """Quantizing a hard weight again would change it, since its zeros make the scale smaller."""
    group = weight.detach().reshape(-1)[: {0: weight.numel(), -1: weight.shape[-1]}.get(group_size, group_size)]
    values = group.unique() if not group.is_meta else group[:0]
    if len(values) != len(levels) or len(group) <= 4 * len(levels):
        return
    like_levels = values.double() / values[-1].double() * levels[-1]
    if torch.allclose(like_levels, torch.tensor(levels, dtype=torch.float64, device=group.device), atol=1e-2):
        raise ValueError(
            f"the weights of layer {name!r} are hard already (its first {len(group)} take {len(values)} values); "
            "quantizing them again would change them. Exclude it, or begin with the latent weights"
        )


def _annealed(layer: nn.Module) -> AnnealedWeight | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((p for p in cast(Any, layer).parametrizations.weight if isinstance(p, AnnealedWeight)), None)


def annealed_weights(model: nn.Module) -> dict[str, AnnealedWeight]:
    """The annealed weights of a model, by the name of their layer.

    Args:
        model: after :func:`anneal_weights`; of another one there are none.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = anneal_weights(model, group_size=-1)
        >>> list(annealed_weights(model))
        ['0']
    """
    found = ((name, _annealed(layer)) for name, layer in model.named_modules())
    return {name: annealed for name, annealed in found if annealed is not None}


def latent_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The latent weights that the optimizer trains, by the name of their layer.

    Args:
        model: after :func:`anneal_weights`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = anneal_weights(model, group_size=-1)
        >>> latent_weights(model)["0"].shape
        torch.Size([4, 8])
    """
    return {
        name: cast(Any, model.get_submodule(name)).parametrizations.weight.original for name in annealed_weights(model)
    }


@contextmanager
def soft_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode computes with the soft weights of training: to see what hardening costs.

    Args:
        model: after :func:`anneal_weights`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4)).eval()
        >>> _ = anneal_weights(model, group_size=-1)
        >>> x = torch.ones(1, 8)
        >>> hard = model(x)
        >>> with soft_evaluation(model):
        ...     torch.equal(model(x), hard)
        False
    """
    weights = list(annealed_weights(model).values())
    for weight in weights:
        weight.soft_in_evaluation = True
    try:
        yield
    finally:
        for weight in weights:
            weight.soft_in_evaluation = False


@torch.no_grad()
def freeze_weights(
    model: nn.Module, *, loss: Callable[[nn.Module], Tensor | float] | None = None, warn: bool = True
) -> list[str]:
    """End: every annealed layer becomes a plain one with its hard weight, bit for bit what evaluation computed with.

    Args:
        model: after :func:`anneal_weights`; without annealed layers it is left as it is.
        loss: ``loss(model)``, evaluated softly and hard if the annealing is not over, for the warning.
        warn: say so where the annealing is not over; default True.

    Returns:
        Names of the layers that were frozen.

    Raises:
        ValueError: a weight holds NaN or infinite entries.

    Warns:
        UserWarning: the annealing is not over, with the gap between the soft and the hard model.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = anneal_weights(model, group_size=-1)
        >>> freeze_weights(model, warn=False), freeze_weights(model)
        (['0'], [])
    """
    weights = annealed_weights(model)
    if warn and any(not weight.is_hard for weight in weights.values()):
        warnings.warn(_unfinished(model, weights, loss), stacklevel=3)
    for name, annealed in weights.items():
        layer = model.get_submodule(name)
        annealed.eval()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return list(weights)


def _unfinished(
    model: nn.Module, weights: Mapping[str, AnnealedWeight], loss: Callable[[nn.Module], Tensor | float] | None
) -> str:
    softest = max(weights, key=lambda name: (1.0 - weights[name].pressure, weights[name].temperature))
    at = weights[softest]
    where = f"layer {softest!r} is at pressure {at.pressure:.3g} and temperature {at.temperature:.3g}"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if loss is not None:
            hard = float(loss(model))
            with soft_evaluation(model):
                soft = float(loss(model))
            gap = f"the loss goes from {soft:.4g} (soft) to {hard:.4g} (hard)"
        else:
            latent = latent_weights(model)[softest]
            hard_weight = quantize_weight(latent, codebook=at.levels, group_size=at.group_size)
            distance = float((at.soft(latent) - hard_weight).norm() / hard_weight.norm())
            gap = f"its weight moves by {distance:.1%}; give loss=... to see what that costs"
    finally:
        for module, mode in modes:
            module.training = mode
    return f"the weights are frozen before the annealing is over: {where}; {gap}"


# -- through the training -----------------------------------------------------------------------------


class Annealer:
    """Moves the annealed weights of a model through their schedule, in a loop of your own.

    Args:
        model: after :func:`anneal_weights`.
        total_steps: optimizer steps of the whole training.
        annealing: the schedule; default :class:`~regularized.compression.hestia.Annealing`.
        factors: factor of each layer on its temperature, from
            :func:`~regularized.compression.hestia.temperature_factors`; default none, one temperature for all.

    Raises:
        ValueError: the model has no annealed layer; a layer has no factor, or one that is not positive.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = anneal_weights(model, group_size=-1)
        >>> annealer = Annealer(model, total_steps=10)
        >>> for step in range(10):
        ...     annealer.step(step)  # before the forward pass; then the training step
        >>> annealer.finish()
        >>> freeze_weights(model)
        ['0']
    """

    @allowed(total_steps=count(1, "the optimizer steps of the whole training"))
    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        annealing: Annealing | None = None,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.annealing: Annealing = Annealing() if annealing is None else annealing
        self.weights: dict[str, AnnealedWeight] = annealed_weights(model)
        if not self.weights:
            raise ValueError("the model has no annealed layer; anneal_weights(model) first")
        self.factors: dict[str, float] = check_factors(factors, self.weights)
        self._starts = {name: self.annealing.start(weight.levels) for name, weight in self.weights.items()}

    def step(self, step: int) -> None:
        """Go to the point of an optimizer step, before its forward pass.

        Args:
            step: optimizer steps done, 0 to ``total_steps``.

        Raises:
            ValueError: it is outside.
        """
        if not 0 <= step <= self.total_steps:
            raise ValueError(
                f"step {step} is outside a training of {self.total_steps} steps; give Annealer the total_steps that "
                "the training really has"
            )
        done = step / self.total_steps
        pressure = self.annealing.pressure(done)
        for name, weight in self.weights.items():
            weight.set(
                pressure=pressure,
                temperature=self._starts[name] * self.annealing.cooling(done, self.factors[name]),
            )

    def finish(self) -> None:
        """Go to the end, where all weights are hard; after the last step."""
        self.step(self.total_steps)


def check_factors(factors: Mapping[str, float] | None, layers: Iterable[str]) -> dict[str, float]:
    """A factor for each layer.

    Args:
        factors: by the name of the layer; None is 1 for all.
        layers: names of the layers.

    Raises:
        ValueError: some are missing, or not positive.
    """
    names = list(layers)
    if factors is None:
        return dict.fromkeys(names, 1.0)
    if missing := [name for name in names if name not in factors]:
        raise ValueError(
            f"there is no factor for {len(missing)} of {len(names)} annealed layers: {missing}; take the traces of "
            "this model with the same include and exclude"
        )
    if wrong := {name: factors[name] for name in names if not 0.0 < factors[name] < float("inf")}:
        raise ValueError(f"factors on the temperature must be positive and finite, got {wrong}")
    return {name: float(factors[name]) for name in names}
