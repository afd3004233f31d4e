"""What a conditional generator makes of each prompt, in the eyes of a classifier.

Look at it before and during forgetting: a generator that also loses kept classes has forgotten nothing in particular.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, count
from regularized.mechanisms.tables import html_table

__all__ = ["PromptReport", "prompt_report"]


@dataclass(frozen=True, slots=True)
class PromptReport:
    """Which class the samples of each prompt are taken for.

    Args:
        shares: (C, C), prompts in rows, classes of the judge in columns; rows sum to one.
        forget: the class that was to be forgotten; None for none.
        override: the class in its place; None where it is random.

    Raises:
        IndexError: ``forget`` or ``override`` is no class of ``shares``, once it is asked for.

    Examples:
        >>> report = PromptReport(torch.tensor([[0.1, 0.9], [0.0, 1.0]]), forget=0, override=1)
        >>> round(report.forgotten_class_share, 2), round(report.override_share, 2)
        (0.1, 0.9)
    """

    shares: Tensor
    forget: int | None = None
    override: int | None = None

    @property
    def forgotten_class_share(self) -> float:
        """How often the forgotten prompt still gives its class, from 0 to 1; NaN where none was to be forgotten."""
        return float("nan") if self.forget is None else float(self.shares[self.forget, self.forget])

    @property
    def override_share(self) -> float:
        """How often it gives the class in its place; NaN where there is no such class."""
        if self.forget is None or self.override is None:
            return float("nan")
        return float(self.shares[self.forget, self.override])

    @property
    def kept_class_accuracy(self) -> float:
        """How often the other prompts give their own class, from 0 to 1."""
        own = self.shares.diagonal()
        kept = torch.arange(len(own)) != (-1 if self.forget is None else self.forget)
        return float(own[kept].mean())

    def __str__(self) -> str:
        """A line for each prompt, in percent."""
        head = "prompt" + "".join(f"{label:>6}" for label in range(len(self.shares)))
        lines = [
            f"{label:>6}" + "".join(f"{100 * x:6.1f}" for x in row) for label, row in enumerate(self.shares.tolist())
        ]
        return "\n".join([head, *lines])

    def _repr_html_(self) -> str:
        rows = ([label, *(f"{100 * x:.1f} %" for x in row)] for label, row in enumerate(self.shares.tolist()))
        return html_table(["prompt", *map(str, range(len(self.shares)))], rows)


@torch.no_grad()
@allowed(num_classes=count(1), per_class=count(1), batch_size=count(1))
def prompt_report(
    sample: Callable[[Tensor], Tensor],
    classify: Callable[[Tensor], Tensor],
    *,
    num_classes: int,
    forget: int | None = None,
    override: int | None = None,
    per_class: int = 100,
    batch_size: int = 1000,
    device: torch.device | str = "cpu",
) -> PromptReport:
    """Draw samples for every prompt and let a classifier judge them.

    Args:
        sample: labels (B,) to samples (B, ...), such as ``sfd.sampler.sample``.
        classify: samples to logits (B, C), in evaluation mode.
        num_classes: C.
        forget: the class that was to be forgotten.
        override: the class in its place.
        per_class: samples of each prompt; default 100.
        batch_size: samples at a time; default 1000.
        device: of the labels.

    Examples:
        >>> classify = lambda x: torch.nn.functional.one_hot(x, 3)
        >>> report = prompt_report(lambda c: c.clamp(min=1), classify, num_classes=3, forget=0, override=1)
        >>> report.forgotten_class_share, report.override_share, report.kept_class_accuracy
        (0.0, 1.0, 1.0)
        >>> print(report)
        prompt     0     1     2
             0   0.0 100.0   0.0
             1   0.0 100.0   0.0
             2   0.0   0.0 100.0
    """
    labels = torch.arange(num_classes, device=device).repeat_interleave(per_class)
    judged = torch.cat([classify(sample(part)).argmax(dim=1) for part in labels.split(batch_size)])
    counts = torch.bincount(labels * num_classes + judged, minlength=num_classes**2)
    return PromptReport(counts.view(num_classes, -1).double().cpu() / per_class, forget, override)
