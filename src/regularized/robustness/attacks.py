"""Attacks on inputs: what an attacker may change, one step of gradient sign for training, and many steps to judge by.

All of them bound each number of an input by itself (the l-infinity norm) and stay in the range of the data::

    threat = Threat.normalised(8 / 255, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    attack = OneStep.rs_fgsm(threat)                    training: one more forward and half a backward pass
    found = attack(model, x, y)                         found.inputs, and logits and losses before the attack
    worst = pgd(model, x, y, threat)                    evaluation

One-step accuracy proves nothing: a network can learn to be wrong only off the one step that it was trained on. Judge by
:func:`pgd`, and in the end by :func:`~regularized.robustness.evaluation.auto_attack`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Self, TypeAlias
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.frozen import constant_parameters
from regularized.mechanisms.ranges import above, allowed, at_least, check_fields, count

__all__ = ["Attacked", "Bounds", "OneStep", "Threat", "cross_entropies", "input_gradient", "pgd"]

# Shapes: B samples of a batch, C channels (dimension 1 of the inputs), K classes.

Numbers: TypeAlias = float | Sequence[float]
SampleLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, K) and targets (B,) to one loss a sample, (B,)."""


class Bounds(NamedTuple):
    """What :class:`Threat` allows, in a form that broadcasts against inputs: numbers, or (C, 1, ...) tensors."""

    radius: float | Tensor
    low: float | Tensor
    high: float | Tensor


@dataclass(frozen=True)
class Threat:
    """What an attacker may do: change each number of an input by at most ``radius``, and stay in the data's range.

    All three are in the units of what the network is fed with, and each is one number or one for each channel. For
    inputs that were normalised, :meth:`normalised` computes them.

    Args:
        radius: > 0.
        low: smallest value that an input can have; default 0.
        high: largest; default 1.

    Raises:
        ValueError: a radius that is not positive, a range that is empty, or different numbers of channels.

    Examples:
        >>> Threat(0.1).project(torch.tensor([[0.95, 0.5]]), torch.tensor([[0.2, -0.3]]))
        tensor([[ 0.0500, -0.1000]])
    """

    radius: Numbers
    low: Numbers = 0.0
    high: Numbers = 1.0
    _cached: dict[tuple[torch.device, torch.dtype, int], Bounds] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for radius, low, high in self._by_channel():
            if not 0.0 < radius < float("inf"):
                raise ValueError(f"radius must be positive and finite, got {self.radius}; 8 / 255 is a usual one")
            if not low < high:
                raise ValueError(f"low must be below high, got {self.low} and {self.high}")
            if radius > high - low:
                warn(
                    f"a radius of {radius:g} lets every input become every other one: the data's range is {low:g} to "
                    f"{high:g}. Is it in other units? 8 of 255 is a radius of 8 / 255",
                    UserWarning,
                    stacklevel=3,
                )
                break

    @classmethod
    def normalised(
        cls, radius: float, *, mean: Numbers = 0.0, std: Numbers = 1.0, low: float = 0.0, high: float = 1.0
    ) -> Self:
        """For inputs ``(pixel - mean) / std``.

        Args:
            radius: in units of the pixel, such as 8 / 255.
            mean: what was subtracted; one number or one for each channel.
            std: what was divided by.
            low: smallest value of a pixel; default 0.
            high: largest; default 1.

        Raises:
            ValueError: different numbers of channels, or a ``std`` that is not positive.

        Examples:
            >>> Threat.normalised(0.1, mean=0.5, std=0.25)
            Threat(radius=0.4, low=-2.0, high=2.0)
        """
        rows = _together(mean=mean, std=std)
        if not all(deviation > 0.0 for _, deviation in rows):
            raise ValueError(f"std must be positive, got {std}")
        of_channels = isinstance(mean, Sequence) or isinstance(std, Sequence)
        parts: list[tuple[float, ...]] = [
            tuple(radius / deviation for _, deviation in rows),
            tuple((low - centre) / deviation for centre, deviation in rows),
            tuple((high - centre) / deviation for centre, deviation in rows),
        ]
        return cls(*parts) if of_channels else cls(*(part[0] for part in parts))

    def bounds(self, inputs: Tensor) -> Bounds:
        """Radius, low and high, as they broadcast against inputs.

        Args:
            inputs: (B, C, ...).

        Raises:
            ValueError: another number of channels.
        """
        rows = self._by_channel()
        if not any(isinstance(numbers, Sequence) for numbers in (self.radius, self.low, self.high)):
            return Bounds(*rows[0])
        if inputs.ndim < 2 or inputs.shape[1] != len(rows):
            raise ValueError(
                f"the threat has numbers of shape ({len(rows)},), one for each channel, but the inputs have shape "
                f"{tuple(inputs.shape)} with channels in dimension 1"
            )
        key = (inputs.device, inputs.dtype, inputs.ndim)
        if key not in self._cached:  # made once, so that no step waits for a copy to the device
            shape = (len(rows),) + (1,) * (inputs.ndim - 2)
            columns = zip(*rows, strict=True)
            self._cached[key] = Bounds(*(inputs.new_tensor(column).view(shape) for column in columns))
        return self._cached[key]

    def project(self, inputs: Tensor, perturbation: Tensor, *, ball: bool = True) -> Tensor:
        """The nearest perturbation that is allowed.

        Args:
            inputs: (B, C, ...) what is attacked.
            perturbation: of the same shape, what is added.
            ball: bound it by the radius, too; False keeps the range of the data alone.
        """
        radius, low, high = self.bounds(inputs)
        if ball:
            perturbation = _clamp(perturbation, -radius, radius)
        return _clamp(perturbation, low - inputs, high - inputs)

    def add(self, inputs: Tensor, perturbation: Tensor) -> Tensor:
        """Perturbed inputs, in the range of the data to the last bit."""
        _, low, high = self.bounds(inputs)
        return _clamp(inputs + perturbation, low, high)

    def check(self, inputs: Tensor) -> None:
        """Refuse inputs outside the range, which a projection would move. Looks at values that are on the CPU only.

        Raises:
            TypeError: inputs that are no floating-point tensor.
            ValueError: they are outside the range by more than a thousandth of it, or not finite.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(f"an attack needs inputs as one floating-point tensor, got {kind}; divide bytes by 255")
        if inputs.device.type != "cpu" or not inputs.numel() or torch.compiler.is_compiling():
            return
        _, low, high = self.bounds(inputs)
        slack = 1e-3 * (high - low)
        if not bool(((inputs >= low - slack) & (inputs <= high + slack)).all()):
            raise ValueError(
                f"inputs must be in the range of the threat, {self.low} to {self.high}, but they go from "
                f"{float(inputs.min()):.4g} to {float(inputs.max()):.4g}; for normalised inputs use "
                "Threat.normalised(radius, mean=..., std=...)"
            )

    def _by_channel(self) -> list[tuple[float, ...]]:
        return _together(radius=self.radius, low=self.low, high=self.high)


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, in float32 at least.

    Args:
        logits: (B, K).
        targets: (B,) class labels.

    Returns:
        (B,)

    Examples:
        >>> cross_entropies(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def input_gradient(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: SampleLoss = cross_entropies,
    keep_graph: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the summed loss by the inputs, with what the forward pass gave. No parameter gets a gradient.

    The backward pass goes to the inputs alone, which costs half of a whole one.

    Args:
        model: from inputs to logits (B, K).
        inputs: (B, ...).
        targets: (B,).
        loss: one value a sample; default cross-entropy.
        keep_graph: leave logits and losses with their graph, for who differentiates them by the parameters.

    Returns:
        Gradient of the shape of the inputs, logits (B, K) and losses (B,).

    Raises:
        ValueError: the loss does not have one value a sample.
        TypeError: the model returns no tensor.

    Examples:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> gradient, logits, losses = input_gradient(model, torch.zeros(3, 2), torch.tensor([0, 1, 0]))
        >>> gradient.shape, logits.requires_grad, model.weight.grad is None
        (torch.Size([3, 2]), False, True)
    """
    with torch.enable_grad(), nullcontext() if keep_graph else constant_parameters(model):
        leaf = inputs.detach().requires_grad_()
        logits = model(leaf)
        if not isinstance(logits, Tensor):
            raise TypeError(f"the model returned {type(logits).__name__}; an attack needs one that returns its logits")
        losses = loss(logits, targets)
        if losses.shape != targets.shape[:1]:
            raise ValueError(
                f"the loss must have one value a sample, shape ({len(targets)},), got {tuple(losses.shape)}; give a "
                "torch loss reduction='none'"
            )
        # Of the sum: the sign of a mean's gradient is the same, but in half precision it is sooner 0.
        (gradient,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=keep_graph)
    return (gradient, logits, losses) if keep_graph else (gradient, logits.detach(), losses.detach())


class Attacked(NamedTuple):
    """What one step found.

    Attributes:
        inputs: (B, C, ...) perturbed inputs, in the range of the data.
        logits: (B, K) before the step, at the starting point.
        losses: (B,) there.
        perturbation: what was added.
    """

    inputs: Tensor
    logits: Tensor
    losses: Tensor
    perturbation: Tensor


@dataclass(frozen=True)
class OneStep:
    """One step of gradient sign from a starting point around each input: the attack of fast adversarial training.

    The three that people train with differ in three numbers:

    ==============================  =====  ====  =======
    attack                          start  step  project
    ==============================  =====  ====  =======
    FGSM, :meth:`fgsm`                  0     1      yes
    RS-FGSM, :meth:`rs_fgsm`            1  1.25      yes
    N-FGSM, :meth:`n_fgsm`              2     1       no
    ==============================  =====  ====  =======

    Draws its starting points from torch's global generator.

    Args:
        threat: what is allowed.
        start: half-width of the uniform starting noise, in radii, >= 0.
        step: length of the step, in radii, > 0.
        project: bring the result back into the radius; the range of the data is kept in any case.

    Raises:
        ValueError: a number outside its range; at the call, inputs outside the range of the data.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> found = OneStep.rs_fgsm(Threat(0.1))(model, x, y)
        >>> bool(((found.inputs - x).abs() <= 0.1 + 1e-6).all()), found.logits.shape
        (True, torch.Size([5, 3]))
    """

    threat: Threat
    start: float = 1.0
    step: float = 1.25
    project: bool = True

    def __post_init__(self) -> None:
        check_fields(self, start=at_least(0.0), step=above(0.0))

    @classmethod
    def fgsm(cls, threat: Threat) -> Self:
        """From the inputs themselves (Goodfellow et al., 2014)."""
        return cls(threat, start=0.0, step=1.0)

    @classmethod
    def rs_fgsm(cls, threat: Threat) -> Self:
        """From a random start, with a longer step and a projection (Wong et al., 2020)."""
        return cls(threat, start=1.0, step=1.25)

    @classmethod
    def n_fgsm(cls, threat: Threat) -> Self:
        """From stronger noise, without a projection (de Jorge et al., 2022)."""
        return cls(threat, start=2.0, step=1.0, project=False)

    def noise(self, inputs: Tensor) -> Tensor:
        """A starting perturbation, in the range of the data."""
        if self.start == 0.0:
            return torch.zeros_like(inputs)
        radius, _, _ = self.threat.bounds(inputs)
        drawn = torch.empty_like(inputs).uniform_(-1.0, 1.0) * (self.start * radius)
        return self.threat.project(inputs, drawn, ball=False)

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        noise: Tensor | None = None,
        loss: SampleLoss = cross_entropies,
        keep_graph: bool = False,
    ) -> Attacked:
        """Attack a batch; the model stays in its mode, and its parameters get no gradient.

        Args:
            model: from inputs to logits (B, K).
            inputs: (B, C, ...), in the range of the data.
            targets: (B,) class labels.
            noise: the starting perturbation; default :meth:`noise`.
            loss: one value a sample; default cross-entropy.
            keep_graph: see :func:`input_gradient`.
        """
        self.threat.check(inputs)
        start = self.noise(inputs) if noise is None else self.threat.project(inputs, noise, ball=False)
        gradient, logits, losses = input_gradient(model, inputs + start, targets, loss=loss, keep_graph=keep_graph)
        with torch.no_grad():
            _warn_of_underflow(gradient)
            radius, _, _ = self.threat.bounds(inputs)
            moved = self.threat.project(inputs, start + self.step * radius * gradient.sign(), ball=self.project)
            return Attacked(self.threat.add(inputs, moved), logits, losses, moved)


@allowed(steps=count(1), step=above(0.0), restarts=count(1))
def pgd(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    threat: Threat,
    *,
    steps: int = 50,
    step: float = 0.25,
    restarts: int = 10,
    seed: int = 0,
    loss: SampleLoss = cross_entropies,
) -> Tensor:
    """Projected gradient descent (Madry et al., 2018): the usual attack to judge a network by.

    A sample that is misclassified on the way is left there, as in the code of fast adversarial training. Of several
    restarts the first that fools the network counts, else the one with the highest loss. The defaults are PGD-50-10.

    Args:
        model: from inputs to logits (B, K); in evaluation mode.
        inputs: (B, C, ...), in the range of the data.
        targets: (B,) class labels.
        threat: what is allowed.
        steps: of each restart; default 50.
        step: length of a step in radii; default a quarter.
        restarts: random starts; default 10.
        seed: of the starting points; the global generator is left alone.
        loss: one value a sample; default cross-entropy.

    Returns:
        Perturbed inputs.

    Raises:
        ValueError: a number outside its range, or inputs outside the range of the data.

    Examples:
        >>> model = nn.Linear(2, 2, bias=False).requires_grad_(False).eval()
        >>> _ = model.weight.copy_(torch.eye(2))
        >>> found = pgd(model, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), Threat(0.15))
        >>> model(found).argmax(dim=1)
        tensor([1])
    """
    threat.check(inputs)
    if model.training:
        warn(
            "pgd attacks a network in training mode: one sample's answer may hang on the others there, and the attack "
            "moves running statistics. Call model.eval() before",
            UserWarning,
            stacklevel=2,
        )
    generator = torch.Generator(inputs.device).manual_seed(seed)
    worst, highest = inputs.clone(), torch.full(targets.shape, -torch.inf, device=inputs.device)
    rows = torch.arange(len(inputs), device=inputs.device)  # that no restart has fooled
    for _ in range(restarts):
        if not len(rows):
            break
        x, y = inputs[rows], targets[rows]
        radius, _, _ = threat.bounds(x)
        drawn = torch.empty_like(x).uniform_(-1.0, 1.0, generator=generator)
        moved = threat.project(x, drawn * radius)
        for _ in range(steps):
            gradient, logits, _ = input_gradient(model, threat.add(x, moved), y, loss=loss)
            right = (logits.argmax(dim=1) == y).view(-1, *(1,) * (x.ndim - 1))
            further = threat.project(x, moved + step * radius * gradient.sign())
            moved = torch.where(right, further, moved)
        with torch.no_grad():
            found = threat.add(x, moved)
            logits = model(found)
            value, fooled = loss(logits, y).to(highest.dtype), logits.argmax(dim=1) != y
        higher = fooled | (value > highest[rows])
        worst[rows[higher]], highest[rows[higher]] = found[higher], value[higher]
        rows = rows[~fooled]
    return worst


def _together(**values: Numbers) -> list[tuple[float, ...]]:
    """A row for each channel; what is one number stands in every row."""
    lengths = {name: len(value) for name, value in values.items() if isinstance(value, Sequence)}
    if len(set(lengths.values())) > 1:
        shapes = ", ".join(f"{name} ({length},)" for name, length in lengths.items())
        raise ValueError(f"one number or one for each channel is needed, got the shapes {shapes}")
    channels = max(lengths.values(), default=1)
    parts = [value if isinstance(value, Sequence) else (value,) * channels for value in values.values()]
    return list(zip(*(map(float, part) for part in parts), strict=True))


def _clamp(values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return torch.clamp(values, low, high)  # type: ignore[arg-type]


def _warn_of_underflow(gradient: Tensor) -> None:
    """Half-precision gradients that are 0 where they should be small: the step would leave these pixels alone."""
    half = gradient.dtype in (torch.float16, torch.bfloat16)
    if half and gradient.device.type == "cpu" and not torch.compiler.is_compiling() and gradient.numel():
        zeros = float((gradient == 0).float().mean())
        if zeros > 0.5:
            warn(
                f"{zeros:.0%} of the gradient by the inputs are 0 in {gradient.dtype}: they may have underflowed, and "
                "the attack leaves such pixels alone. Give it a loss that is scaled up, "
                "loss=lambda z, y: 1024 * cross_entropies(z, y), or run it in float32",
                UserWarning,
                stacklevel=3,
            )
