"""Progressive self-knowledge distillation (PS-KD): for classifiers that become over-confident on one-hot labels.

The label of each sample is softened with what this same model predicted for it one epoch ago, more and more as training
goes on. It needs no teacher and no second forward pass; it costs a table with one prediction for each sample.

    Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021,
    arXiv 2006.12000. Official code: github.com/lgcnsai/PS-KD-Pytorch at 9aa0828 (MIT).

=========  ==================  =========================================================================
paper      here                meaning
=========  ==================  =========================================================================
P_{t-1}    ``history``         (B, C) each sample's prediction at its last visit; zeros before the first
alpha_t    ``alpha``           share of the history in the target, in [0, 1]
alpha_T    ``alpha=0.8``       that of the last epoch; epoch e = 0 ... T - 1 has alpha_T (e + 1) / T
q          ``targets``         (B, C) soft targets, (1 - alpha) onehot(y) + alpha history
=========  ==================  =========================================================================

Paper and code differ: the paper's target is the model of epoch t - 1; the code's is the prediction made *during* epoch
t - 1, in training mode and under that epoch's augmentation. We follow the code, because the published numbers come from
it. A sample that was never visited keeps its one-hot label; the code relies on epoch 0 for that, and resumes wrongly.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.distributed import gather_rows
from regularized.mechanisms.mixup import Mix
from regularized.mechanisms.prediction_store import DenseStore, PredictionStore
from regularized.mechanisms.ranges import allowed, count, share
from regularized.mechanisms.sample_history import check_index
from regularized.training.progress import Coefficient, Progress, linear
from regularized.training.step import Batch, Step
from regularized.training.terms import Term

__all__ = ["ProgressiveDistillation", "ProgressiveDistillationLoss", "progressive_loss", "progressive_targets"]

# Shapes: B samples of a batch, N samples of the training set, C classes.

_ALPHA = share(remedy="0 is plain cross-entropy, the paper uses 0.8")


def progressive_targets(labels: Tensor, history: Tensor, alpha: float) -> Tensor:
    """The soft targets ``(1 - alpha) onehot(y) + alpha history``; to look at, or for a loss of your own.

    Args:
        labels: (B,) int64 class labels.
        history: (B, C) past predictions, rows that sum to 1; or zeros for a sample that has none, whose target is its
            one-hot label.
        alpha: share of the history, in [0, 1].

    Returns:
        (B, C) targets that sum to 1, in the type of ``history``.

    Examples:
        >>> progressive_targets(torch.tensor([1]), torch.tensor([[0.75, 0.25]]), alpha=0.5)
        tensor([[0.3750, 0.6250]])
    """
    # The mass of a past prediction is 1 up to rounding, and 0 where there is none.
    mass = history.sum(dim=1, keepdim=True)
    return (history * alpha).scatter_add_(1, labels.long()[:, None], 1.0 - alpha * mass)


def progressive_loss(
    log_probabilities: Tensor,
    labels: Tensor,
    history: Tensor,
    alpha: float,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Cross-entropy with the soft targets, ``-(1 - alpha) log p_y - alpha <history, log p>``, without building them.

    By the logits its gradient is ``p - q``: that of cross-entropy times ``1 - alpha (1 - history_y) / (1 - p_y)`` for
    the true class, small for a sample that is hard and has not improved since.

    Args:
        log_probabilities: (B, C) log-softmax of the logits, finite.
        labels: (B,) int64 class labels.
        history: (B, C) past predictions, constant: rows that sum to 1, or zeros for a sample that has none.
        alpha: share of the history, in [0, 1].
        reduction: over the batch; default the mean.

    Returns:
        Scalar; cross-entropy bit for bit where ``alpha`` is 0 or nobody has a history.

    Examples:
        >>> z, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
        >>> past = torch.randn(4, 3).softmax(dim=1)
        >>> ours = progressive_loss(z.log_softmax(dim=1), y, past, alpha=0.3)
        >>> torch.allclose(ours, F.cross_entropy(z, progressive_targets(y, past, 0.3)))
        True
    """
    labels = labels.long()
    if not len(labels):
        return log_probabilities.sum()  # 0 and not 0 / 0, with a graph like any other loss
    plain = F.nll_loss(log_probabilities, labels, reduction=reduction)
    # q = onehot(y) + alpha (history - onehot(y)): what the history changes is added to cross-entropy as it stands. With
    # the row's mass for the second 1, a row of zeros changes nothing, and q sums to 1 however the row was rounded.
    mass = history.sum(dim=1, keepdim=True)
    change = history.scatter_add(1, labels[:, None], mass.neg_())
    scale = alpha / max(len(labels), 1) if reduction == "mean" else alpha
    return plain.sub(torch.dot(change.flatten(), log_probabilities.flatten()), alpha=scale)


class ProgressiveDistillationLoss(torch.nn.Module):
    """Cross-entropy with labels that the model's own past predictions soften: for over-confident classifiers.

    A drop-in for ``nn.CrossEntropyLoss`` that also takes the index of each sample, and the epoch. The prediction of a
    batch is remembered after its loss was computed. In ``eval()`` mode it is plain cross-entropy and touches nothing.

    Costs one exponential, one read and one write of (B, C) a step, and N x C x 4 bytes; a leaner ``store`` takes a half
    of that or a hundredth. With several processes every process holds the whole history, and new rows are exchanged.

    Not for a model that is not over-confident: under very strong augmentation, or with many wrong labels, it becomes
    *under*-confident (the history is taken under augmentation); use a smaller ``alpha`` there. Without any augmentation
    the history is nearly one-hot and little changes. Where calibration is all that you want, temperature scaling after
    training is cheaper (:func:`~regularized.mechanisms.calibration.fit_temperature`).

    Args:
        num_samples: N, length of the training set that ``index`` counts in.
        num_classes: C.
        epochs: T, epochs of the whole training, at least 1.
        alpha: share of the history in the target in the last epoch, in [0, 1]; it grows linearly from ``alpha / T`` in
            the first. Default 0.8 (official script, and every command of its README). 0 is plain cross-entropy; the
            history is still recorded.
        store: where predictions are kept; default ``DenseStore(num_samples, num_classes)``, exact float32.

    Attributes:
        store: the predictions: saved, restored and moved with the module.
        alpha: the ``alpha`` of the last epoch.

    Raises:
        ValueError: a setting is outside its range; at the call: no index, wrong shape, soft labels, wrong device.
        IndexError: an index outside [0, N) (checked while the index is on the CPU).
        RuntimeError: a sample came for the second time and neither :meth:`set_epoch` nor :meth:`set_progress` was ever
            called (on a GPU: more samples than the training set has); more than twice as many samples came as the
            training set has since :meth:`set_epoch` was called, as where it stands in front of the loop; or it was
            called in training mode with gradients switched off, as an evaluation without ``eval()`` would.

    Examples:
        >>> x, y = torch.randn(400, 64), torch.randint(10, (400,))
        >>> model = torch.nn.Linear(64, 10)
        >>> criterion = ProgressiveDistillationLoss(num_samples=400, num_classes=10, epochs=3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        >>> for epoch in range(3):
        ...     criterion.set_epoch(epoch)
        ...     for index in torch.randperm(400).split(100):
        ...         loss = criterion(model(x[index]), y[index], index)
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    @allowed(epochs=count(1, "the epochs of the whole training"), alpha=_ALPHA)
    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        epochs: int,
        alpha: float = 0.8,
        store: PredictionStore | None = None,
    ) -> None:
        super().__init__()
        self.store: PredictionStore = _checked_store(store, num_samples, num_classes)
        self.epochs = epochs
        self.alpha = alpha
        self._share: float | None = None  # of the training that is done, the present epoch included
        self._visits = 0  # since the epoch was told
        self._by_epoch = True  # told by the epoch, or not at all

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch that begins, counted from 0.

        Raises:
            ValueError: it is not in [0, epochs).
        """
        if not 0 <= epoch < self.epochs:
            raise ValueError(
                f"epoch must be in [0, {self.epochs}), since the loss was built with epochs={self.epochs}; got {epoch}"
            )
        self._share = (epoch + 1) / self.epochs
        self._visits, self._by_epoch = 0, True

    def set_progress(self, share: float) -> None:
        """Tell the share of the training that is done, in [0, 1], instead of the epoch; ``alpha`` grows with it.

        Raises:
            ValueError: it is outside [0, 1].
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"the share of the training that is done must be in [0, 1], got {share}")
        self._share = float(share)
        self._by_epoch = False

    @property
    def current_alpha(self) -> float:
        """Share of the history in the targets now; 0 before the first epoch was told."""
        return 0.0 if self._share is None else self.alpha * self._share

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor | None = None, *, mix: Mix | None = None) -> Tensor:
        """Mean loss of the batch.

        Args:
            logits: (B, C) before the softmax.
            labels: (B,) int64 class labels; before mixing, where the inputs were mixed.
            index: (B,) position of each sample in the training set; not needed, and ignored, in ``eval()`` mode.
            mix: how the inputs were blended (mixup; also CutMix, with the share of the area): the targets, history
                included, are then blended in the same way. The prediction for a blended input is remembered for the
                sample with the larger share.

        Returns:
            Scalar.
        """
        store = self.store
        _check_logits(logits, store, owner="ProgressiveDistillationLoss")
        labels = _checked_labels(labels, logits, owner="ProgressiveDistillationLoss", training=self.training)
        if not self.training:
            if mix is None or mix.share == 1.0:
                return F.cross_entropy(logits, labels)
            log_p = _log_softmax(logits)
            return torch.lerp(F.nll_loss(log_p, labels[mix.partner]), F.nll_loss(log_p, labels), mix.share)
        check_index(index, store.num_samples, owner="ProgressiveDistillationLoss", batch_size=len(logits))
        assert index is not None
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "ProgressiveDistillationLoss was called in training mode with gradients switched off. On validation "
                "data this would overwrite the history of training samples: call .eval() on the loss before evaluating"
            )
        log_p = _log_softmax(logits)
        history = _read(store, index, log_p)
        self._check_epoch(history)
        alpha = self.current_alpha
        loss = progressive_loss(log_p, labels, history, alpha)
        if mix is not None and mix.share != 1.0:  # the loss is linear in the targets
            other = mix.partner
            loss = torch.lerp(progressive_loss(log_p, labels[other], history[other], alpha), loss, mix.share)
            if mix.share < 0.5:
                index = index[other.to(index.device)]
        _remember(store, index, log_p)
        return loss

    def _check_epoch(self, history: Tensor) -> None:
        """An epoch that nobody tells lets alpha silently stay. Visits are counted, as the host knows them: no sync."""
        if torch.compiler.is_compiling() or not self._by_epoch:
            return
        self._visits += len(history)
        if self._share is None:
            again = bool(history.any()) if history.device.type == "cpu" else self._visits > self.store.num_samples
            if again:
                raise RuntimeError(
                    "ProgressiveDistillationLoss sees a sample for the second time, but was never told the epoch: call "
                    "set_epoch(epoch) at the start of each epoch, or set_progress(share); otherwise alpha would never "
                    "grow"
                )
        elif self._visits > 2 * self.store.num_samples:
            raise RuntimeError(
                f"ProgressiveDistillationLoss has seen {self._visits} samples of {self.store.num_samples} since it was "
                "told the epoch: call set_epoch(epoch) at the start of each epoch, inside the loop, or alpha stays "
                "where it is; where an epoch shows samples several times, call set_progress(share) instead"
            )

    def get_extra_state(self) -> Tensor:
        """The progress, so that a resumed training goes on with the same alpha; -1 when it was never told."""
        return torch.tensor(-1.0 if self._share is None else self._share, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the progress."""
        share = float(state)
        self._share = None if share < 0 else share

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"epochs={self.epochs}, alpha={self.alpha}"


class ProgressiveDistillation(Term):
    """The same loss as a term of the loop, in the place of ``CrossEntropy``.

    Args:
        num_samples: N, length of the training set.
        num_classes: C.
        alpha: share of the history in the target: a number in [0, 1] is that of the last epoch, grown linearly from
            epoch to epoch as in :class:`ProgressiveDistillationLoss`; a schedule is taken as it is, and its values must
            be in [0, 1]. Default 0.8 (official script).
        store: where predictions are kept; default ``DenseStore(num_samples, num_classes)``, exact float32.
        weight: coefficient of the term; default 1.

    Raises:
        ValueError: a setting is outside its range, or the batch has no index.

    Examples:
        >>> term = ProgressiveDistillation(num_samples=6, num_classes=2)
        >>> batch = Batch.of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), torch.tensor([5, 0, 1, 2])))
        >>> step = Step(torch.nn.Linear(3, 2), batch, Progress(step=0, total_steps=1))
        >>> torch.equal(term(step), F.cross_entropy(step.logits, batch.targets, reduction="sum"))
        True
        >>> term.store.seen().tolist()
        [True, True, True, False, False, True]
    """

    sharding = "forward"

    is_task = True

    @allowed(alpha=_ALPHA.or_schedule())
    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        alpha: Coefficient = 0.8,
        store: PredictionStore | None = None,
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if callable(alpha):
            self._alpha = alpha
        else:
            self._alpha = linear(0.0, alpha, unit="epoch")
        self.store: PredictionStore = _checked_store(store, num_samples, num_classes)

    def alpha(self, progress: Progress) -> float:
        """Share of the history in the targets at some point of the training.

        Raises:
            ValueError: the schedule gives a value outside [0, 1].
        """
        alpha = self._alpha(progress)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"the schedule of alpha must stay in [0, 1], got {alpha} in epoch {progress.epoch}")
        return alpha

    def count(self, batch: Batch) -> int:
        """Number of samples."""
        return batch.size

    def forward(self, step: Step) -> Tensor:
        """Sum of the loss over the batch; plain cross-entropy in ``eval()`` mode, where nothing is recorded."""
        log_p = step.log_probabilities
        _check_logits(log_p, self.store, owner="ProgressiveDistillation")
        labels = _checked_labels(step.targets, log_p, owner="ProgressiveDistillation", training=self.training)
        if not self.training:
            return F.nll_loss(log_p, labels, reduction="sum")
        index = step.index
        check_index(index, self.store.num_samples, owner="ProgressiveDistillation", batch_size=len(log_p))
        history = _read(self.store, index, log_p)
        loss = progressive_loss(log_p, labels, history, self.alpha(step.progress), reduction="sum")
        _remember(self.store, index, log_p)
        return loss


def _read(store: PredictionStore, index: Tensor, like: Tensor) -> Tensor:
    return store.read(index).to(like.device, like.dtype)


def _remember(store: PredictionStore, index: Tensor, log_p: Tensor) -> None:
    store.write(*gather_rows(index, log_p.detach().exp()))


def _log_softmax(logits: Tensor) -> Tensor:
    # float32 at least: what half precision rounds away would go into the history.
    return F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _checked_store(store: PredictionStore | None, num_samples: int, num_classes: int) -> PredictionStore:
    if store is None:
        return DenseStore(num_samples, num_classes)
    if (store.num_samples, store.num_classes) != (num_samples, num_classes):
        raise ValueError(
            f"the store is for {store.num_samples} samples and {store.num_classes} classes, the loss for "
            f"num_samples={num_samples} and num_classes={num_classes}; give both the same"
        )
    return store


def _check_logits(logits: Tensor, store: PredictionStore, *, owner: str) -> None:
    if logits.ndim != 2 or logits.shape[1] != store.num_classes:
        raise ValueError(
            f"{owner} was built with num_classes={store.num_classes} and needs logits of shape "
            f"(B, {store.num_classes}), got {tuple(logits.shape)}"
        )
    if logits.device != store.device and not store.host:
        raise ValueError(
            f"the logits are on {logits.device}, the history of {owner} is on {store.device}; move it once with "
            f".to({str(logits.device)!r}), or keep it in host memory with a store of host=True"
        )


def _checked_labels(labels: Tensor, logits: Tensor, *, owner: str, training: bool) -> Tensor:
    if labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{owner} needs class labels of shape ({len(logits)},), got {labels.dtype} of shape {tuple(labels.shape)}. "
            "If the inputs are mixed (mixup, CutMix), give the labels before mixing and mix=Mix(share, partner) to "
            "ProgressiveDistillationLoss, which blends labels and history alike"
        )
    # Values are looked at while they are on the CPU; on a GPU the device's own assert reports them.
    looked_at = training and labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and bool((labels < 0).any()):
        raise ValueError(
            f"{owner} got the label {int(labels.min())}: a sample without a label (-100) has no target to blend with "
            "its history; leave it out of the batch"
        )
    return labels.long()
