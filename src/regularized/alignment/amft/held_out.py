"""Held-out demonstrations, of which each meta step looks at one batch, the next one at the next."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regularized.alignment.amft.rollouts import Pair
from regularized.training.data import as_source

__all__ = ["HeldOut"]


class HeldOut:
    """A loss on held-out demonstrations.

    Args:
        data: one pair (prompts, answers), or batches of pairs in any form that is trained on.
        pair: gives the two tensors of a batch, on the device.
        loss: of prompts and answers.
        seed: of the order, where the data have none.
    """

    def __init__(
        self, data: Any, *, pair: Callable[[Any], Pair], loss: Callable[[Tensor, Tensor], Tensor], seed: int
    ) -> None:
        if isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data):
            batches: list[Any] = [data]
        else:
            batches = list(as_source(data, seed=seed).batches(0))
        self._batches: list[Pair] = [pair(batch) for batch in batches]
        self._loss = loss
        self._warned = False

    def __call__(self, look: int, trained: Pair) -> Tensor:
        """The loss of a look's batch.

        Args:
            look: counted from 0.
            trained: prompts and answers of the training batch.

        Warns:
            UserWarning: once, when these are the same.
        """
        prompts, answers = self._batches[look % len(self._batches)]
        if not self._warned and _same(prompts, trained[0]) and _same(answers, trained[1]):
            self._warned = True
            warnings.warn(
                "the held-out demonstrations are those that are trained on, which speaks for imitation whatever it is "
                "worth; hold some out",
                stacklevel=2,
            )
        return self._loss(prompts, answers)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
