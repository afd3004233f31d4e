"""Terms: what a step's loss is the sum of.

A term is an ``nn.Module`` with ``forward(step) -> Tensor``, the *sum* of its loss over the items of the batch, as a
scalar. The loop divides the sums once by the global count of the items, so that gradient accumulation, an uneven last
batch and several processes give the result of one process with the whole batch.

Optional attributes:

- ``weight``: a number or a schedule; default 1.
- ``count(batch) -> int | Tensor``: what is counted; default the number of samples.
- ``per_step``: True for a penalty that does not look at the batch (on weights, say). Its ``forward`` returns the value
  itself; it is computed once an optimizer step, whatever the accumulation.
- ``contributes``: False for a term that only operates on the model or the batch; its ``forward`` is not called.
- ``taps``: names of submodules whose outputs the term reads by ``step.hidden(name)``.

Optional moments, found by name and called in the order of the terms:

- ``attach(model)``: surgery on the model, before the optimizer is built; idempotent.
- ``param_groups(model)``: parameter groups of its own (dictionaries as an optimizer takes them).
- ``transform(batch) -> batch``: before the forward pass.
- ``before_step(step)``: once an optimizer step, gradients unscaled and clipped.
- ``after_step(step)``: once an optimizer step, parameters updated.
- ``epoch_start(progress)``; ``task_start(task)``, ``task_end(task)`` (continual learning).
- ``merge(model)``: leave a plain model behind.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Batch, Step

__all__ = ["CrossEntropy", "Loss", "Term"]


class Term(nn.Module):
    """Base class for terms; a convenience, not a condition: any module of the same form is a term.

    Args:
        weight: coefficient of the term in the loss; a number or a function of
            :class:`~regularized.training.progress.Progress`.

    Examples:
        >>> class Confidence(Term):
        ...     def forward(self, step):
        ...         p = step.log_probabilities.exp()
        ...         return (p * step.log_probabilities).sum()
        >>> from regularized.training.progress import Progress
        >>> round(Confidence()(Step(nn.Identity(), Batch.of(torch.zeros(2, 2)), Progress(0, 1))).item(), 4)
        -1.3863
    """

    per_step: bool = False
    contributes: bool = True
    taps: tuple[str, ...] = ()

    def __init__(self, *, weight: Coefficient = 1.0) -> None:
        super().__init__()
        as_schedule(weight, name="weight")
        self.weight = weight

    def count(self, batch: Batch) -> int | Tensor:
        """Number of items that ``forward`` sums over; the number of samples unless a term says otherwise."""
        return batch.size

    def forward(self, step: Step) -> Tensor:
        """Sum of the loss over the items of the batch; a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(step)")


class CrossEntropy(Term):
    """Cross-entropy of the logits with class labels.

    Logits (B, C) with targets (B,), or (B, L, C) with (B, L), over the last dimension; targets may be soft, with the
    shape of the logits. Counted are the targets that are not ``ignore_index``.

    Args:
        label_smoothing: share of the target mass spread evenly over the classes, in [0, 1); default 0.
        ignore_index: label that is left out; default -100, as in torch.
        shift: predict the *next* position, as causal language models do; default False.
        weight: coefficient; default 1.

    Examples:
        >>> from regularized.training.progress import Progress
        >>> model, batch = nn.Linear(3, 2), Batch.of((torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
        >>> term = CrossEntropy()
        >>> mean = term(Step(model, batch, Progress(0, 1))) / term.count(batch)
        >>> torch.allclose(mean, F.cross_entropy(model(batch.inputs), batch.targets))
        True
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        shift: bool = False,
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.shift = shift

    def _labels(self, targets: Tensor) -> Tensor:
        return targets[:, 1:] if self.shift else targets

    def count(self, batch: Batch) -> int | Tensor:
        """Number of labels that are not ignored."""
        if batch.targets is None:
            raise ValueError("CrossEntropy needs targets; yield (x, y), or a mapping with `targets` or `labels`")
        targets = self._labels(batch.targets)
        if targets.is_floating_point():
            return targets.numel() // targets.shape[-1]
        return (targets != self.ignore_index).sum()

    def forward(self, step: Step) -> Tensor:
        """Sum of the cross-entropy over the labels; logits and targets as in the class."""
        targets = self._labels(step.targets)
        log_p = step.log_probabilities
        if self.shift:
            log_p = log_p[:, :-1]
        classes = log_p.shape[-1]
        if targets.is_floating_point() or self.label_smoothing:
            # cross_entropy of log-probabilities: log_softmax leaves what is normalised unchanged up to rounding.
            soft = targets.is_floating_point()
            return F.cross_entropy(
                log_p.reshape(-1, classes),
                targets.reshape(-1, classes) if soft else targets.reshape(-1),
                reduction="sum",
                label_smoothing=self.label_smoothing,
                ignore_index=self.ignore_index if not soft else -100,
            )
        return F.nll_loss(
            log_p.reshape(-1, classes), targets.reshape(-1), ignore_index=self.ignore_index, reduction="sum"
        )


class Loss(Term):
    """Any per-sample loss of logits and targets as a term.

    Args:
        function: called as ``function(logits, targets)``; returns one value a sample, shape (B,), such as a torch loss
            with ``reduction="none"``.
        weight: coefficient; default 1.

    Raises:
        ValueError: the function returned another shape, for example a mean.

    Examples:
        >>> from regularized.training.progress import Progress
        >>> term = Loss(lambda z, y: (z.squeeze(-1) - y).square())
        >>> step = Step(nn.Linear(3, 1), Batch.of((torch.zeros(2, 3), torch.zeros(2))), Progress(0, 1))
        >>> term(step).shape
        torch.Size([])
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, weight: Coefficient = 1.0) -> None:
        super().__init__(weight=weight)
        self.function = function

    def forward(self, step: Step) -> Tensor:
        """Sum of the per-sample losses."""
        values = self.function(step.logits, step.targets)
        if values.shape != (step.batch.size,):
            raise ValueError(
                f"the loss of a term must return one value a sample, shape ({step.batch.size},); got "
                f"{tuple(values.shape)}. Give a torch loss reduction='none' and take the mean over further dimensions "
                "yourself"
            )
        return torch.sum(values)
