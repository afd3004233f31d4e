"""Stop when a measured quantity no longer improves."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regularized.mechanisms.distributed import whole
from regularized.mechanisms.ranges import Choice, allowed, at_least, count
from regularized.training.sharded import placed

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Stop after ``patience`` evaluations without improvement, and go back to the best weights.

    Args:
        metric: name of one of the numbers that ``evaluate`` returns.
        direction: whether ``"higher"`` or ``"lower"`` is better.
        patience: evaluations in a row without improvement that are allowed, at least 1; default 5.
        min_delta: change that counts as an improvement, at least 0; default 0.
        restore_best: load the model's weights of the best evaluation when the run ends, also where it ends by itself.
            They are kept on the CPU, whole in every process. Terms keep their last state. Default True.

    Raises:
        ValueError: an argument is outside its range.

    Examples:
        >>> stopping = EarlyStopping("accuracy", "higher", patience=2)
        >>> model = nn.Linear(2, 2)
        >>> [stopping.update({"accuracy": a}, model) for a in (0.5, 0.7, 0.6, 0.7)]
        [False, False, False, True]
    """

    @allowed(direction=Choice("higher", "lower"), patience=count(1, "a number of evaluations"), min_delta=at_least(0.0))
    def __init__(
        self,
        metric: str,
        direction: Literal["higher", "lower"],
        *,
        patience: int = 5,
        min_delta: float = 0.0,
        restore_best: bool = True,
    ) -> None:
        self.metric = metric
        self.direction = direction
        self.patience = patience
        self.min_delta = min_delta
        self.restore_best = restore_best
        self.reset()

    def reset(self) -> None:
        """Forget everything; a new run begins."""
        self.best: float | None = None
        self._waited = 0
        self._weights: dict[str, Any] | None = None

    def update(self, metrics: Mapping[str, float], model: nn.Module) -> bool:
        """Take in an evaluation; True when it is time to stop. A NaN is never an improvement.

        Raises:
            KeyError: the metric is not among them.
        """
        if self.metric not in metrics:
            raise KeyError(f"early stopping watches {self.metric!r}, but evaluate returned {sorted(metrics)}")
        value = metrics[self.metric]
        gain = math.inf if self.best is None else value - self.best if self.direction == "higher" else self.best - value
        if not math.isnan(value) and gain > self.min_delta:
            self.best = value
            self._waited = 0
            if self.restore_best:
                self._weights = {
                    name: whole(v.detach()).to("cpu", copy=True) if isinstance(v, Tensor) else v
                    for name, v in model.state_dict().items()
                }
        else:
            self._waited += 1
        return self._waited >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Load the best weights, if there are any."""
        if self._weights is not None:
            own = model.state_dict()
            with torch.no_grad():
                model.load_state_dict({name: placed(value, own[name]) for name, value in self._weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best, "waited": self._waited, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.best, self._waited, self._weights = state["best"], state["waited"], state["weights"]
