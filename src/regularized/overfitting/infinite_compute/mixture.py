"""Data of a student: the teacher's text and the real text side by side, the real one still seen E times."""

import math
import warnings
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import torch

from regularized.mechanisms.ranges import allowed, between, count, positive
from regularized.training.data import TensorData, epoch_order, share
from regularized.training.randomness import mix
from regularized.training.step import Batch

__all__ = ["MixtureLoader", "mixture_steps"]

_WEIGHT = between(0.0, 1.0, "[)", remedy="the paper tries 0.75 and 0.9; with 1 no real text would be left")


@allowed(base_steps=count(1), epochs=positive(), teacher_weight=_WEIGHT)
def mixture_steps(base_steps: int, epochs: float, teacher_weight: float = 0.0) -> int:
    """Steps of a training in which real data are seen ``epochs`` times beside the teacher's.

    ``floor(base_steps * epochs / (1 - w))``, in decimal fractions: 1 - 0.9 is a tenth here, and nothing is lost to
    rounding.

    Args:
        base_steps: steps of one epoch of real data alone.
        epochs: E, how often real data are seen.
        teacher_weight: w, the share of teacher's text in each step, in [0, 1); default 0, no teacher.

    Warns:
        UserWarning: the epochs are no whole number of steps; it says how often a sample is really seen.

    Examples:
        >>> mixture_steps(800, 16, 0.75), mixture_steps(800, 16, 0.9)
        (51200, 128000)
    """
    exact = Fraction(Decimal(repr(float(epochs)))) * base_steps
    real = Fraction(1) - Fraction(Decimal(repr(float(teacher_weight))))
    steps = math.floor(exact / real)
    if exact.denominator != 1:
        warnings.warn(
            f"{epochs:g} epochs of {base_steps} steps are no whole number of steps: with {steps} steps each sample is "
            f"seen {float(steps * real / base_steps):.4g} times on average",
            stacklevel=3,
        )
    return steps


class MixtureLoader:
    """Batches with a share of teacher's samples among the real ones; an epoch is one pass over the real data.

    Each epoch has every real sample once and ``round(n w / (1 - w))`` of the teacher's, in one random order. The
    teacher's are taken in turn, shuffled anew whenever all of them have been seen.

    Args:
        real: the fixed data set; its batch size counts for the mixture.
        teacher: samples drawn from a teacher, with targets of the same kind.
        teacher_weight: w, in [0, 1).
        seed: of the order; default 0.

    Attributes:
        teacher_samples: samples of the teacher an epoch.

    Raises:
        ValueError: w is outside [0, 1), or the two sets differ in what a sample is.

    Examples:
        >>> real, teacher = (TensorData(torch.full((n, 1), v), batch_size=4) for n, v in ((4, 0.0), (20, 1.0)))
        >>> loader = MixtureLoader(real, teacher, teacher_weight=0.75)
        >>> len(loader), sum(float(batch.inputs.sum()) for batch in loader.batches(epoch=0))
        (4, 12.0)
    """

    @allowed(teacher_weight=_WEIGHT)
    def __init__(self, real: TensorData, teacher: TensorData, *, teacher_weight: float, seed: int = 0) -> None:
        if not isinstance(real.inputs, torch.Tensor) or not isinstance(teacher.inputs, torch.Tensor):
            raise ValueError("a mixture needs inputs that are one tensor, not mappings of several")
        same = real.inputs.shape[1:] == teacher.inputs.shape[1:] and real.inputs.dtype == teacher.inputs.dtype
        if not same or (real.targets is None) != (teacher.targets is None):
            raise ValueError(
                f"real and teacher's samples must be of one kind: inputs {tuple(real.inputs.shape[1:])} of "
                f"{real.inputs.dtype} and {tuple(teacher.inputs.shape[1:])} of {teacher.inputs.dtype}, targets in both "
                "or in none; cut both into windows of one length"
            )
        exact = Fraction(Decimal(repr(float(teacher_weight))))
        self.teacher_samples: int = round(real.size * exact / (1 - exact))
        self._sizes = (real.size, teacher.size)
        targets = None
        if real.targets is not None and teacher.targets is not None:
            targets = torch.cat([real.targets, teacher.targets])
        self._samples = TensorData(
            torch.cat([real.inputs, teacher.inputs]), targets, batch_size=real.batch_size, shuffle=False
        )
        self.seed = seed

    def __len__(self) -> int:
        """Number of batches an epoch."""
        return -(-(self._sizes[0] + self.teacher_samples) // self._samples.batch_size)

    def identity(self) -> dict[str, Any]:
        """What tells these data and their order from others."""
        own = {"kind": "MixtureLoader", "teacher_samples": self.teacher_samples, "seed": self.seed}
        return {**own, "samples": self._samples.identity()}

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on, of each the part of process ``rank`` of ``world``."""
        inputs, targets = self._samples.inputs, self._samples.targets
        assert isinstance(inputs, torch.Tensor)
        order = self._order(epoch).to(inputs.device)
        for rows in order.split(self._samples.batch_size)[start:]:
            mine = rows[share(len(rows), rank, world)] if world > 1 else rows
            drawn = None if targets is None else targets.index_select(0, mine)
            yield Batch(inputs.index_select(0, mine), drawn, mine, whole=len(rows) if world > 1 else None)

    def _order(self, epoch: int) -> torch.Tensor:
        """Rows of an epoch: every real one, and the next ones of the teacher's endless shuffled sequence."""
        real, teacher = self._sizes
        first = epoch * self.teacher_samples
        last = first + self.teacher_samples
        passes = range(first // teacher, -(-last // teacher))
        rows = [torch.arange(real)]
        if self.teacher_samples:
            sequence = torch.cat([epoch_order(teacher, seed=mix(self.seed, 1), epoch=number) for number in passes])
            begin = first - passes.start * teacher
            rows.append(real + sequence[begin : begin + self.teacher_samples])
        together = torch.cat(rows)
        return together[epoch_order(len(together), seed=mix(self.seed, 0), epoch=epoch)]
