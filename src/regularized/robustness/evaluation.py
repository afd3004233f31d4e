"""How much of the accuracy is left under attack, and the ensemble of attacks that papers are judged by."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import Choice, allowed, count
from regularized.mechanisms.two_networks import evaluating
from regularized.robustness.attacks import Threat

__all__ = ["Attack", "auto_attack", "robust_accuracy"]

Attack: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From model, inputs and targets to perturbed inputs; ``partial(pgd, threat=threat)``, say."""


@allowed(batch_size=count(1))
def robust_accuracy(
    model: nn.Module, inputs: Tensor, targets: Tensor, attack: Attack | None = None, *, batch_size: int = 500
) -> float:
    """Share of samples that are classified right after the attack.

    Args:
        model: from inputs to logits (B, K); looked at in evaluation mode, its modes are put back.
        inputs: (N, ...).
        targets: (N,) class labels.
        attack: what changes the inputs; default none, the natural accuracy.
        batch_size: samples at a time; default 500.

    Returns:
        In [0, 1].

    Raises:
        ValueError: no sample.

    Examples:
        >>> from functools import partial
        >>> from regularized.robustness.attacks import pgd
        >>> model = nn.Linear(2, 2, bias=False).requires_grad_(False)
        >>> _ = model.weight.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 0])
        >>> robust_accuracy(model, x, y), robust_accuracy(model, x, y, partial(pgd, threat=Threat(0.15), steps=4))
        (1.0, 0.5)
    """
    if not len(inputs):
        raise ValueError("robust_accuracy needs at least one sample, got none")
    right: list[Tensor] = []
    with evaluating(model):
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            found = x if attack is None else attack(model, x, y)
            with torch.no_grad():
                right.append(model(found).argmax(dim=1) == y)
    return torch.cat(right).double().mean().item()


@allowed(version=Choice("standard", "plus", "rand"))
def auto_attack(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    threat: Threat,
    *,
    attacks: list[str] | None = None,
    version: Literal["standard", "plus", "rand"] = "standard",
    seed: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """AutoAttack by its authors' package: APGD on two losses, FAB and Square, without a step size to be tuned.

    The package knows pixels in [0, 1] and one radius; the inputs are mapped there and back, so normalised ones are
    right, too. It needs four classes or more for its standard version.

    Args:
        model: from inputs to logits (B, K); in evaluation mode.
        inputs: (N, C, H, W), in the range of the data.
        targets: (N,) class labels.
        threat: what is allowed.
        attacks: some of ``"apgd-ce"``, ``"apgd-dlr"``, ``"apgd-t"``, ``"fab"``, ``"fab-t"`` and ``"square"``; default
            those of the version.
        version: ``"standard"`` (default), the one of the leaderboards, ``"plus"``, or ``"rand"`` for random networks.
        seed: of its random starts; default 0.
        batch_size: samples at a time; default 250.

    Returns:
        Perturbed inputs.

    Raises:
        ImportError: the package is not installed.
        ValueError: an unknown version, or a radius that differs between channels of equal range.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
        >>> auto_attack(model, x, y, Threat(0.1), attacks=["apgd-ce"]).shape
        torch.Size([3, 1, 2, 2])
    """
    try:
        from pyautoattack import AutoAttack
    except ModuleNotFoundError as error:
        if error.name != "pyautoattack":
            raise
        raise ImportError("auto_attack needs the authors' package: pip install pyautoattack") from error
    threat.check(inputs)
    radius, low, high = (torch.as_tensor(b, dtype=inputs.dtype, device=inputs.device) for b in threat.bounds(inputs))
    radii = (radius / (high - low)).flatten()
    if float(radii.max() - radii.min()) > 1e-4 * float(radii.max()):
        raise ValueError(
            f"AutoAttack has one radius for pixels in [0, 1], but this threat's differ: {radii.tolist()}; give "
            "Threat.normalised one radius"
        )
    settings: dict[str, Any] = {"version": version} if attacks is None else {"version": "custom", "attacks": attacks}
    adversary = AutoAttack(
        _OnPixels(model, low, high), eps=float(radii[0]), norm="Linf", seed=seed, device=inputs.device, **settings
    )
    pixels = ((inputs - low) / (high - low)).clamp(0.0, 1.0)
    with torch.random.fork_rng(devices=[inputs.device] if inputs.device.type == "cuda" else []):
        found, _ = adversary.run_standard_evaluation(pixels, targets, batch_size=batch_size)
    return threat.add(found.detach() * (high - low) + low, torch.zeros_like(inputs))


class _OnPixels(nn.Module):
    """The model, fed with pixels in [0, 1]."""

    def __init__(self, model: nn.Module, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.model = model
        self.low = low
        self.high = high

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixels * (self.high - self.low) + self.low)
        return logits
