"""The weight of a mixture of two losses, fixed or by a schedule: what a learned one has to be compared with."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from regularized.alignment.amft.mixing import Moved, set_gradient, weighted
from regularized.mechanisms.ranges import allowed
from regularized.mechanisms.ranges import share as a_share
from regularized.training.progress import Coefficient, Progress, Schedule, as_schedule

__all__ = ["ScheduledWeight"]

_SHARE = a_share("the share of the first loss")


class ScheduledWeight:
    """A share of the first loss that is fixed or follows a schedule: what a learned one has to be compared with.

    A loss without weight takes no part in the step, not even with its backward pass: ``1.0`` is imitation alone,
    ``0.0`` reward alone, and ``piecewise({0.5: 0.0})`` imitation first and then reward, the pipeline of two stages.

    Args:
        share: mu, a number in [0, 1] or a function of :class:`~regularized.training.progress.Progress`.

    Raises:
        ValueError: the number, or later what the function gives, is outside of [0, 1].

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> moved = ScheduledWeight(0.25).backward(sft=4.0 * w, rl=8.0 * w, params=[w])
        >>> w.grad.item(), moved.mu.item()
        (7.0, 0.25)
    """

    @allowed(share=_SHARE.or_schedule())
    def __init__(self, share: Coefficient) -> None:
        self.schedule: Schedule = as_schedule(share, name="share")

    @property
    def uses_entropy(self) -> bool:
        """No."""
        return False

    def set_target_entropy(self, entropy: Tensor | float) -> None:
        """A schedule has no use for it."""

    def needs(self, progress: Progress) -> tuple[bool, bool]:
        """Whether the step at a position needs the first loss, and the second one.

        Args:
            progress: the position.
        """
        mu = self.share_at(progress)
        return mu > 0.0, mu < 1.0

    def share_at(self, progress: Progress | None) -> float:
        """mu at a position.

        Raises:
            ValueError: the schedule left [0, 1].
        """
        value = float(self.schedule(Progress(0, 1) if progress is None else progress))
        _SHARE("share", value)
        return value

    def backward(
        self,
        *,
        sft: Tensor | None,
        rl: Tensor | None,
        params: Iterable[Tensor],
        entropy: Tensor | float | None = None,
        val_loss: Callable[[], Tensor] | None = None,
        lr: float | None = None,
        progress: Progress | None = None,
    ) -> Moved:
        """Set ``.grad`` to the gradient of the mixture, see :meth:`MetaWeightController.backward`.

        Args:
            sft: the loss that mu multiplies; None where mu is 0.
            rl: the other one; None where mu is 1.
            params: what is trained.
            entropy: not used.
            val_loss: not used.
            lr: not used.
            progress: position in the training; default its start.
        """
        mu = self.share_at(progress)
        weight = torch.tensor(mu, dtype=torch.float64)
        loss = weighted(sft, rl, weight, imitate=mu > 0.0, explore=mu < 1.0)
        set_gradient(loss, list(params))
        nothing = torch.zeros((), dtype=torch.float64)
        return Moved(weight, nothing, nothing, loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a schedule is a function of the position."""
        return {}

    def check_state(self, state: Mapping[str, Any], path: str = "controller") -> None:
        """Refuse the state of something that learns.

        Raises:
            ValueError: there is anything in it.
        """
        if state:
            raise ValueError(
                f"{path} is a ScheduledWeight here, and the state holds {sorted(state)}; build it as it was"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take over."""
        self.check_state(state)
