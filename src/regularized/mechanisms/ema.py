"""A copy of a network whose weights follow it slowly: the exponential moving average, as a teacher or for evaluation.

torch's own ``swa_utils.AveragedModel`` has a fixed decay and treats the first update apart; here the decay may depend
on the number of the update, and buffers (the statistics of batch normalisation) have three ways.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.mechanisms.distributed import whole
from regularized.mechanisms.ranges import Choice, allowed, count, share

__all__ = ["EMA", "Decay", "ramped_decay", "running_mean_decay"]

Decay: TypeAlias = float | Callable[[int], float]
"""Share of the average that stays: a number, or a function of the number of the update, counted from 1."""

_DECAY = share()


class EMA(nn.Module):
    """An averaged copy of a model: ``average <- decay * average + (1 - decay) * model`` at each :meth:`update`.

    The copy starts equal to the model and needs no gradient. Calling the EMA calls the copy. One update costs one fused
    operation over all parameters, and the copy takes the memory of the model once more.

    Args:
        model: the model to follow; it is copied, not kept.
        decay: share of the average that stays, in [0, 1]; a number or a function of the number of the update.
        buffers: what happens to floating-point buffers: ``"copy"`` takes over the model's (default: right for a copy
            that is used in ``eval()`` mode), ``"average"`` averages them like parameters, ``"own"`` leaves them to the
            copy's own forward passes (right for a copy that runs in ``train()`` mode). Integer buffers are copied, or
            left with ``"own"``.

    Attributes:
        module: the averaged copy.
        updates: number of updates so far; part of the ``state_dict``.

    Raises:
        ValueError: ``decay`` outside [0, 1], an unknown ``buffers``, a model in shards (FSDP2); a model of another
            structure at an update.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average = EMA(model, decay=0.9)
        >>> _ = nn.init.ones_(model.weight)
        >>> average.update(model)
        >>> [round(w, 4) for w in average.module.weight.flatten().tolist()]
        [0.1, 0.1]
    """

    @allowed(decay=_DECAY.or_schedule(), buffers=Choice("copy", "average", "own"))
    def __init__(self, model: nn.Module, *, decay: Decay, buffers: Literal["copy", "average", "own"] = "copy") -> None:
        super().__init__()
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError(
                "the weights of the model are in shards, of which no averaged copy can be made; make the EMA before, "
                "in a term's attach(model): the copy is whole in every process, and follows the shards"
            )
        self.module: nn.Module = copy.deepcopy(model)
        self.module.requires_grad_(False)
        self.decay = decay
        self.buffer_mode = buffers
        self.updates: int = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged copy returns; its weights need no gradient, but gradients reach its inputs."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards the model; call it after each step of the optimizer.

        Args:
            model: the model, of the same structure as the copied one (a DDP wrapper of it serves too).
        """
        self.updates += 1
        decay = self.decay
        if callable(decay):
            decay = decay(self.updates)
            _DECAY("decay", decay)
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = [whole(p) for p in model.parameters()]
        our_buffers, their_buffers = list(self.module.buffers()), list(model.buffers())
        if [t.shape for t in (*ours, *our_buffers)] != [t.shape for t in (*theirs, *their_buffers)]:
            raise ValueError(
                "the model does not have the structure of the one that the EMA was made from; change the model "
                "(attach, replace layers) before making the EMA"
            )
        copies: list[tuple[Tensor, Tensor]] = []
        if self.buffer_mode != "own":
            for our, their in zip(our_buffers, their_buffers):
                if self.buffer_mode == "average" and our.is_floating_point():
                    ours.append(our)
                    theirs.append(their)
                else:
                    copies.append((our, their))
        if ours:
            torch._foreach_lerp_(ours, theirs, 1.0 - decay)
        if copies:
            torch._foreach_copy_([a for a, _ in copies], [b for _, b in copies])

    def get_extra_state(self) -> Tensor:
        """Number of updates, for the ``state_dict``."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Number of updates, from the ``state_dict``."""
        self.updates = int(state)


@dataclass(frozen=True, slots=True)
class _Ramped:
    value: float
    steps: int

    def __call__(self, update: int) -> float:
        if self.steps == 0:
            return self.value
        missing = 1.0 - min(update + 1, self.steps) / self.steps
        return self.value * math.exp(-5.0 * missing * missing)


@allowed(steps=count(0))
def ramped_decay(value: float = 0.997, *, steps: int = 40000) -> Decay:
    """The decay rises to ``value`` as ``value * exp(-5 (1 - (n + 1) / steps)^2)``, n the number of the update.

    While training is fast, the average forgets fast. Defaults: the CIFAR configurations of ELR+
    (github.com/shengliu66/ELR at 934af53), which count ``n + 1`` too.

    Examples:
        >>> rule = ramped_decay(0.997, steps=100)
        >>> round(rule(1), 4), rule(99)
        (0.0082, 0.997)
    """
    _DECAY("decay", value)
    return _Ramped(value, steps)


@dataclass(frozen=True, slots=True)
class _RunningMean:
    value: float

    def __call__(self, update: int) -> float:
        return min(1.0 - 1.0 / (update + 1), self.value)


def running_mean_decay(value: float = 0.9999) -> Decay:
    """The plain mean of all weights so far, ``1 - 1 / (n + 1)``, until that exceeds ``value``.

    Default: the Clothing1M configuration of ELR+.

    Examples:
        >>> rule = running_mean_decay(0.9)
        >>> rule(1), rule(1000)
        (0.5, 0.9)
    """
    _DECAY("decay", value)
    return _RunningMean(value)
