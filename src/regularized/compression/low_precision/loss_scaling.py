"""Scaling of the loss, so that gradients in half precision do not vanish: torch's GradScaler, for any device."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from regularized.mechanisms.ranges import allowed, between, count, positive

__all__ = ["LossScaler"]


class LossScaler:
    """Multiply the loss, divide the gradients, leave out a step whose gradients are not finite.

    The scale is halved after a step that was left out, and doubled after ``interval`` good ones in a row. State for
    state it is ``torch.amp.GradScaler``; unlike that it also says whether a step was made, and can be static.

    Args:
        scale: at the start; default 65,536, GradScaler's.
        growth: factor after good steps; default 2.
        backoff: factor after a step that was left out; default 0.5.
        interval: good steps in a row before the scale grows; default 2,000. None keeps the scale as it is.

    Raises:
        ValueError: a number outside its range.

    Examples:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> scaler = LossScaler(scale=8.0)
        >>> scaler(layer(torch.tensor([[1.0, float("inf")]])).sum()).backward()
        >>> scaler.step(optimizer), scaler.scale
        (False, 4.0)
    """

    @allowed(
        scale=positive(),
        growth=between(1.0, math.inf, "[)"),
        backoff=between(0.0, 1.0, "(]"),
        interval=count(1).or_none("a static scale"),
    )
    def __init__(
        self, *, scale: float = 65536.0, growth: float = 2.0, backoff: float = 0.5, interval: int | None = 2000
    ) -> None:
        self.scale: float = float(scale)
        self.growth = growth
        self.backoff = backoff
        self.interval = interval
        self.good_steps: int = 0
        self.skipped: int = 0

    def __call__(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * self.scale

    def step(self, optimizer: Optimizer) -> bool:
        """Divide the gradients by the scale; make the step if all of them are finite; adapt the scale.

        One answer of the device is waited for, as in torch.

        Args:
            optimizer: its gradients come from the scaled loss.

        Returns:
            Whether the step was made.

        Raises:
            ValueError: a gradient is float16: divided by the scale it would vanish after all.
        """
        fine = self.unscale(optimizer)
        if fine:
            optimizer.step()
        else:
            self.skipped += 1
        self.update(fine)
        return fine

    @torch.no_grad()
    def unscale(self, optimizer: Optimizer) -> bool:
        """Divide the gradients by the scale, for what must see them as they are, such as clipping.

        Call the optimizer yourself then, if the answer is True, and :meth:`update`.

        Returns:
            Whether all are finite.
        """
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(g.dtype == torch.float16 for g in grads):
            raise ValueError(
                "a gradient is float16: divided by the scale it would vanish after all. Keep the weights in float32 "
                "and compute in float16 under autocast"
            )
        if any(g.dtype == torch.bfloat16 for g in grads):
            warnings.warn(
                "loss scaling does nothing for bfloat16, whose exponents are those of float32; leave it out",
                stacklevel=2,
            )
        if not grads:
            return True
        # As in torch, it is the scaled gradients that must be finite. The norms of all devices come together once.
        largest = torch.stack([norm.to(grads[0].device) for norm in torch._foreach_norm(grads, math.inf)])
        torch._foreach_mul_(grads, 1.0 / self.scale)
        return bool(torch.isfinite(largest).all())

    def update(self, fine: bool) -> None:
        """Adapt the scale.

        Args:
            fine: whether the gradients were finite.
        """
        if self.interval is None:
            return
        if not fine:
            self.scale *= self.backoff
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            grown = self.scale * self.growth
            if grown <= torch.finfo(torch.float32).max:
                self.scale = grown
            self.good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Scale, good steps, and how many were left out."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        self.scale = float(state["scale"])
        self.good_steps = int(state["good_steps"])
        self.skipped = int(state["skipped"])
