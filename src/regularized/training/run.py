"""Where a run stands in its data."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from regularized.training.checkpoint import CheckpointError
from regularized.training.data import Source
from regularized.training.history import History
from regularized.training.progress import Progress
from regularized.training.randomness import rng_state, set_rng_state
from regularized.training.step import Batch

__all__ = ["Run"]

logger = logging.getLogger(__name__)


class Run:
    """The position of one ``fit`` in its data.

    Args:
        source: the batches.
        epochs: epochs of the whole run.
        batches: micro-batches in an epoch.
        accumulate: micro-batches in an optimizer step; the last step of an epoch may have fewer.
        seed: what the order of the data was seeded with; kept to recognise the run.

    Examples:
        >>> import torch
        >>> from regularized.training.data import TensorData
        >>> run = Run(TensorData(torch.zeros(10, 2), batch_size=2), epochs=3, batches=5, accumulate=2, seed=0)
        >>> run.total_steps  # the third step of an epoch has one batch
        9
    """

    def __init__(self, source: Source, epochs: int, batches: int, accumulate: int, seed: int) -> None:
        self.source = source
        self.epochs = epochs
        self.batches = batches
        self.accumulate = accumulate
        self.seed = seed
        self.total_steps: int = epochs * -(-batches // accumulate)
        self.step = 0  # optimizer steps done
        self.epoch = 0  # epochs done
        self.micro = 0  # micro-batches done in the present epoch
        self.stopped = False  # by early stopping
        self.history = History()
        self.epoch_rng: dict[str, Any] = {}  # random state at the start of the epoch, when its order was drawn

    @property
    def progress(self) -> Progress:
        """Position of the next optimizer step."""
        return Progress(self.step, self.total_steps, self.epoch, self.epochs)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.stopped or self.step >= self.total_steps

    def open(self, rank: int, world: int) -> Iterator[Batch]:
        """The batches that are left of the present epoch."""
        if self.micro == 0:
            self.epoch_rng = rng_state()
            return self.source.batches(self.epoch, rank=rank, world=world)
        # In the middle of an epoch the data must be drawn as at its start, and the training go on as if it had been.
        now = rng_state()
        set_rng_state(self.epoch_rng)
        batches = self.source.batches(self.epoch, start=self.micro, rank=rank, world=world)
        set_rng_state(now)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """All but the random state, which every process has for itself."""
        source = self.source.state_dict() if hasattr(self.source, "state_dict") else {}
        names = ("step", "epoch", "micro", "stopped", "history", "epochs", "batches", "accumulate", "seed")
        return {"source": source, **{name: getattr(self, name) for name in names}}

    def identity(self) -> dict[str, Any]:
        """What tells the data of the run from others; looks at it, which for much data takes a moment."""
        return (
            dict(self.source.identity()) if hasattr(self.source, "identity") else {"kind": type(self.source).__name__}
        )

    def check(self, state: Mapping[str, Any]) -> None:
        """Make sure that the position of a checkpoint means the same in this run.

        Raises:
            CheckpointError: it was made with other batches.
        """
        for name in ("batches", "accumulate", "seed"):
            if state[name] != getattr(self, name):
                raise CheckpointError(
                    f"the checkpoint was made with {name}={state[name]}, this run has {getattr(self, name)}: its "
                    "position means something else here. Use the same data, batch size, accumulation and seed, or "
                    "start anew in another folder"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a checkpoint; :meth:`check` it before."""
        if state["epochs"] != self.epochs:
            logger.warning(
                "the checkpoint is of a run of %d epochs, this one has %d, which counts: schedules change from here on",
                state["epochs"],
                self.epochs,
            )
        for name in ("step", "epoch", "micro", "stopped", "history"):
            setattr(self, name, state[name])
        self.history = History(self.history)
        if state["source"] and hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state["source"])
