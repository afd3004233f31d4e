"""Stop before a loss that is not a number reaches the weights, and say whose it was."""

import math

import torch
from torch import Tensor

from regularized.training.objective import Objective

__all__ = ["FiniteCheck", "NonFiniteLoss"]


class NonFiniteLoss(FloatingPointError):
    """The loss, or the gradient norm where it is clipped, was NaN or infinite."""


class FiniteCheck:
    """One check for each optimizer step over all terms that enter the loss.

    On the CPU it looks at once, and the weights are still those of before the step. On an accelerator looking would
    make the host wait: there the flags are copied to pinned memory asynchronously and read just before the *next*
    optimizer step and before every checkpoint. The weights of the guilty step are then already changed, but no
    checkpoint holds them.

    Args:
        objective: whose terms are watched.
        deferred: look one step later, without waiting for the device.

    Examples:
        >>> from regularized.training.terms import CrossEntropy
        >>> check = FiniteCheck(Objective({"task": CrossEntropy()}), deferred=False)
        >>> check.watch([torch.tensor(0.5)], None, step=0)
        >>> try:
        ...     check.watch([torch.tensor(torch.nan)], None, step=1)
        ... except NonFiniteLoss as error:
        ...     str(error).split(":")[0]
        'not finite in optimizer step 1'
    """

    def __init__(self, objective: Objective, *, deferred: bool) -> None:
        self._objective = objective
        self._deferred = deferred
        self._pending: tuple[list[str], Tensor, torch.cuda.Event | None, int] | None = None

    def watch(self, losses: list[Tensor], norm: Tensor | None, step: int) -> None:
        """Take in the losses of an optimizer step's micro-batches, and the norm of the gradient if it is known.

        Raises:
            NonFiniteLoss: this step (at once) or the step before (deferred) was not finite.
        """
        if not self._deferred:
            total = sum(loss.item() for loss in losses) + (0.0 if norm is None else norm.item())
            if not math.isfinite(total):
                raise _error(self._objective.guilty(), step)
            return
        self.settle()
        names, values = zip(*self._objective.active(), strict=True)
        extra = [losses[-1].detach()] if norm is None else [losses[-1].detach(), norm.detach()]
        flags = torch.stack([value.to(torch.float32) for value in (*values, *extra)]).isfinite()
        event = None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = ([f"term {name!r}" for name in names], flags, event, step)

    def settle(self) -> None:
        """Read what is still on its way.

        Raises:
            NonFiniteLoss: it was not finite.
        """
        if self._pending is None:
            return
        (names, flags, event, step), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        if not bool(flags.all()):
            guilty = [name for name, fine in zip(names, flags.tolist()) if not fine]
            raise _error(guilty[0] if guilty else "no single term: their sum or its gradient", step)


def _error(guilty: str, step: int) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"not finite in optimizer step {step}: {guilty}. Usual causes: a learning rate or coefficient that is too high "
        "(lower it, or warm it up: warmup(...)), an exploding gradient (clip_norm=1.0), or NaN in the data"
    )
