"""The regulariser of ELR, and the running average of the predictions that it looks at.

:mod:`regularized.noisy_labels.early_learning.loss` has the paper and its symbols.
"""

import torch
from torch import Tensor, nn

from regularized.mechanisms.distributed import gather_rows
from regularized.mechanisms.ranges import allowed, at_least, between, count, share
from regularized.mechanisms.sample_history import store_rows

__all__ = ["PredictionHistory", "Regulariser", "early_learning_penalty"]

# Shapes: B samples of a batch, N samples of the training set, C classes.

# Below 0 it would push predictions away from their history.
STRENGTH = at_least(0.0, remedy="0 switches the regulariser off")


def early_learning_penalty(probabilities: Tensor, history: Tensor) -> Tensor:
    """The regulariser of each sample, ``log(1 - <t, p>)``.

    Its gradient lowers the loss where the prediction agrees with the history: with t fixed and p = softmax(z), the
    derivative by ``z_c`` is ``p_c (<t, p> - t_c) / (1 - <t, p>)``, negative for the class that t favours. Late in
    training it cancels the pull of cross-entropy towards a wrong label.

    Args:
        probabilities: (B, C) predictions p, below 1; float32 or wider, since ``1 - <t, p>`` is 0 in half precision.
        history: (B, C) rows t of the running average, constant.

    Returns:
        (B,) values in [log(1 - max p), 0]: negative by nature.

    Examples:
        >>> p = torch.tensor([[0.5, 0.5]])
        >>> early_learning_penalty(p, history=p).exp()
        tensor([0.5000])
    """
    return torch.log1p(-(history * probabilities).sum(dim=1))


class PredictionHistory(nn.Module):
    """Running average of the predictions for each training sample.

    Args:
        num_samples: N, length of the data set that the index counts in.
        num_classes: C.
        momentum: share of the old average that stays at each visit, in [0, 1]; 0 keeps the last prediction only, 1
            never learns anything.

    Attributes:
        history: (N, C) buffer, float32; zero at the start. After k visits a row sums to ``1 - momentum**k``.

    Raises:
        ValueError: ``num_samples`` < 1, ``num_classes`` < 2, or ``momentum`` outside [0, 1].

    Examples:
        >>> average = PredictionHistory(num_samples=3, num_classes=2, momentum=0.5)
        >>> average.update(torch.tensor([2]), torch.tensor([[0.2, 0.8]]))
        tensor([[0.1000, 0.4000]])
        >>> average.suspected_label_errors(torch.tensor([0, 0, 0]))
        tensor([False, False,  True])
    """

    history: Tensor

    @allowed(num_samples=count(1, "the length of the data set"), num_classes=count(2), momentum=share())
    def __init__(self, num_samples: int, num_classes: int, *, momentum: float) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.momentum = momentum
        self.register_buffer("history", torch.zeros(num_samples, num_classes))

    @torch.no_grad()
    def update(self, index: Tensor, probabilities: Tensor) -> Tensor:
        """Average new predictions into the rows of a batch; of a sample that occurs twice the last one counts.

        With several processes all of them learn all new rows, so that every process holds the same table.

        Args:
            index: (B,) integers, positions in the training set.
            probabilities: (B, C) predictions; they are normalised to sum 1 here.

        Returns:
            (B, C) the rows after the update.
        """
        index = index.to(self.history.device, torch.int64)
        share = probabilities / probabilities.sum(dim=1, keepdim=True)
        new = self.history.index_select(0, index).to(share.dtype).lerp_(share, 1.0 - self.momentum)
        every_index, every_row = gather_rows(index, new)
        stored = store_rows(self.history, every_index, every_row)
        return stored if every_index is index else self.history.index_select(0, index)

    def suspected_label_errors(self, labels: Tensor) -> Tensor:
        """Which training labels the model's own history contradicts: ``argmax t != label``. For use after training.

        Args:
            labels: (N,) class labels that the model was trained with, in the order of the index.

        Returns:
            (N,) bool on the device of ``labels``; False for samples that were never visited.

        Raises:
            ValueError: ``labels`` is not of shape (N,).
        """
        if labels.shape != (self.num_samples,):
            raise ValueError(
                f"suspected_label_errors needs the labels of the whole training set, shape ({self.num_samples},), "
                f"got {tuple(labels.shape)}"
            )
        best, predicted = self.history.max(dim=1)
        return ((predicted != labels.to(predicted.device)) & (best > 0)).to(labels.device)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"num_samples={self.num_samples}, num_classes={self.num_classes}, momentum={self.momentum}"

    def check_logits(self, logits: Tensor) -> None:
        """Refuse logits of another shape, or on another device, than the history.

        Raises:
            ValueError: with what was given and what is needed.
        """
        owner = type(self).__name__
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{owner} was built with num_classes={self.num_classes} and needs logits of shape "
                f"(B, {self.num_classes}), got {tuple(logits.shape)}"
            )
        if logits.device != self.history.device:
            raise ValueError(
                f"the logits are on {logits.device}, the history of {owner} is on {self.history.device}; "
                f"move it once with .to({str(logits.device)!r})"
            )


class Regulariser(PredictionHistory):
    """The part that the loss and the term share: log-probabilities and index to the penalty of each sample."""

    def __init__(self, num_samples: int, num_classes: int, *, momentum: float, eps: float) -> None:
        super().__init__(num_samples, num_classes, momentum=momentum)
        check_eps(eps, num_classes)
        self.eps = eps

    def penalties(self, log_probabilities: Tensor, index: Tensor) -> Tensor:
        """(B, C) log-probabilities, float32 or wider, to (B,) penalties; the history is updated first, then used."""
        p = log_probabilities.exp().clamp(self.eps, 1.0 - self.eps)
        return early_learning_penalty(p, self.update(index, p.detach()))


def check_eps(eps: float, num_classes: int) -> None:
    """Refuse a clamp that is 0 (the logarithm could be -inf) or that the uniform prediction would touch."""
    between(0.0, 1.0 / num_classes, "()", "below 1 / num_classes", remedy="the official code uses 1e-4")("eps", eps)
