"""Early-learning regularisation (ELR): for classifiers whose training labels are partly wrong.

Networks first learn the pattern, then memorise the wrong labels. ELR keeps a running average of the model's own
predictions for each sample and pulls the present prediction towards it, so that training stays at the first stage. It
needs neither clean data nor the noise rate.

    Liu, Niles-Weed, Razavian, Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels",
    NeurIPS 2020, arXiv 2007.00151. Official code: github.com/shengliu66/ELR at 934af53 (MIT).

=========  ==================  =========================================================================
paper      here                meaning
=========  ==================  =========================================================================
t          ``history``         (N, C) running average of predictions; rows sum to 1 - momentum^visits
p          ``probabilities``   (B, C) softmax of the logits, clamped to [eps, 1 - eps]
lambda     ``strength``        coefficient of the regulariser, >= 0
beta       ``momentum``        share of the old average that stays, in [0, 1]
=========  ==================  =========================================================================

Paper and code differ: the code clamps p, inside the graph too, and renormalises it before averaging. We follow the
code, because the published numbers come from it. It starts the average at zero without bias correction, and so do we.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed
from regularized.mechanisms.sample_history import check_index
from regularized.noisy_labels.early_learning.penalty import STRENGTH, Regulariser, early_learning_penalty

__all__ = ["EarlyLearningLoss"]

# Shapes: B samples of a batch, N samples of the training set, C classes.


class EarlyLearningLoss(Regulariser):
    """Cross-entropy plus early-learning regularisation: a loss for training on partly wrong labels.

    ``mean_b [ CE(z_b, y_b) + strength * log(1 - <t_b, p_b>) ]``. The total is often *negative* (down to about -9
    times ``strength``): that is normal. In ``eval()`` mode it is plain cross-entropy and touches nothing.

    Costs one exponential and one read and write of (B, C) a step, and N x C x 4 bytes. With several processes every
    process holds the whole history, and new rows are exchanged.

    Not for clean labels with genuinely hard or rare classes (it stops the model from fitting them), and not for labels
    so wrong that the first epochs learn nothing right: look whether the training accuracy rises early at all.
    ``strength`` must be tuned; 1 can be too weak to prevent anything.

    Args:
        num_samples: N, length of the training set that ``index`` counts in.
        num_classes: C.
        strength: coefficient of the regulariser, >= 0; default 3 (CIFAR-10 with symmetric noise; the authors use 1 with
            asymmetric noise, 7 for CIFAR-100). 0 is plain cross-entropy; the history is still recorded.
        momentum: share of the old average that stays, in [0, 1]; default 0.7 (CIFAR-10 with symmetric noise,
            Clothing1M and WebVision; 0.9 elsewhere).
        eps: probabilities are clamped to [eps, 1 - eps], in (0, 1/C); default 1e-4 (official code). It bounds the
            regulariser by ``log(eps)`` from below.

    Attributes:
        history: (N, C) running average of predictions, a buffer: saved, restored and moved with the module.

    Raises:
        ValueError: a setting is outside its range; at the call: no index, wrong shape, soft labels.
        IndexError: an index outside [0, N) (checked while the index is on the CPU).
        RuntimeError: called in training mode with gradients switched off, as an evaluation without ``eval()`` would.

    Examples:
        >>> x, y = torch.randn(400, 64), torch.randint(10, (400,))
        >>> model = torch.nn.Linear(64, 10)
        >>> criterion = EarlyLearningLoss(num_samples=400, num_classes=10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        >>> for index in torch.randperm(400).split(100):
        ...     loss = criterion(model(x[index]), y[index], index)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> criterion.suspected_label_errors(y).shape
        torch.Size([400])
    """

    @allowed(strength=STRENGTH)
    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        strength: float = 3.0,
        momentum: float = 0.7,
        eps: float = 1e-4,
    ) -> None:
        super().__init__(num_samples, num_classes, momentum=momentum, eps=eps)
        self.strength = strength
        self._saw_logits = False

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Tensor:
        """Mean loss of the batch.

        Args:
            logits: (B, C) before the softmax.
            labels: (B,) class labels, integers. -100 leaves a sample out of the cross-entropy, not of the regulariser.
            index: (B,) position of each sample in the training set; not needed, and ignored, in ``eval()`` mode.

        Returns:
            Scalar; 0 for an empty batch.
        """
        self.check_logits(logits)
        if labels.is_floating_point() or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"EarlyLearningLoss needs class labels of shape ({len(logits)},), got {labels.dtype} of shape "
                f"{tuple(labels.shape)}; for soft or mixed labels use EarlyLearningPlusLoss (ELR+), which mixes the "
                "history with them"
            )
        labels = labels.long()
        if not self.training:
            return F.cross_entropy(logits, labels)
        check_index(index, self.num_samples, owner="EarlyLearningLoss", batch_size=len(logits))
        assert index is not None
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "EarlyLearningLoss was called in training mode with gradients switched off. On validation data this "
                "would overwrite the history of training samples: call .eval() on the loss before evaluating"
            )
        if not self._saw_logits and not torch.compiler.is_compiling():
            self._saw_logits = True
            warn_of_probabilities(logits, owner="EarlyLearningLoss")
        if not len(logits):
            return logits.sum()  # 0 and not 0 / 0, with a graph like any other loss
        if self.strength == 0.0:
            with torch.no_grad():
                self.penalties(_log_softmax(logits), index)
            return F.cross_entropy(logits, labels)
        with torch.no_grad():
            log_p = _log_softmax(logits)
            p = log_p.exp()
            clamped = p.clamp(self.eps, 1.0 - self.eps)
            t = self.update(index, clamped).to(p.dtype)
            inner = (t * clamped).sum(dim=1, keepdim=True)
        loss: Tensor = _ClosedForm.apply(logits, labels, log_p, p, t, inner, self.strength, self.eps)  # type: ignore[no-untyped-call]
        return loss

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{super().extra_repr()}, strength={self.strength}, eps={self.eps}"


class _ClosedForm(torch.autograd.Function):
    """``mean CE + strength * mean log(1 - <t, p>)`` with its gradient by the logits, which is known in closed form.

    It is made in the forward pass, while everything lies in the cache, and is kept for the backward pass, instead of an
    array of (B, C) for each operation. A second derivative goes through the plain formula.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        log_p: Tensor,
        p: Tensor,
        t: Tensor,
        inner: Tensor,
        strength: float,
        eps: float,
    ) -> Tensor:
        # Sums, not means: where every label is ignored there is nothing to divide by.
        nll, labelled = _nll_loss_forward(log_p, labels, None, _SUM, _IGNORED)
        count = labelled.clamp_min(1.0)
        by_log_p = _nll_loss_backward(count.reciprocal(), log_p, labels, None, _SUM, _IGNORED, labelled)
        # d log(1 - <t, p>) / d log p_c = t_c p_c / (<t, p> - 1), and 0 where p is clamped.
        by_log_p.add_(_clamp_backward(t, p, eps, 1.0 - eps).mul_(p).div_(inner - 1.0), alpha=strength / len(p))
        by_logits = torch.addcmul(by_log_p, p, by_log_p.sum(dim=1, keepdim=True), value=-1.0)
        ctx.save_for_backward(by_logits, logits, labels, t, count)
        ctx.strength, ctx.eps = strength, eps
        loss: Tensor = nll.div_(count).add_(torch.log1p(-inner).mean(), alpha=strength)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_logits, logits, labels, t, count = ctx.saved_tensors
        if torch.is_grad_enabled():
            log_p = _log_softmax(logits)
            penalties = early_learning_penalty(log_p.exp().clamp(ctx.eps, 1.0 - ctx.eps), t)
            loss = F.nll_loss(log_p, labels, reduction="sum") / count + ctx.strength * penalties.mean()
            (by_logits,) = torch.autograd.grad(loss, logits, create_graph=True)
        return by_logits * grads[0], None, None, None, None, None, None, None


# The halves of F.nll_loss and F.hardtanh, which give a gradient without a graph: one vectorised pass each.
_nll_loss_forward = torch.ops.aten.nll_loss_forward.default
_nll_loss_backward = torch.ops.aten.nll_loss_backward.default
_clamp_backward = torch.ops.aten.hardtanh_backward.default
_SUM, _IGNORED = 2, -100  # torch's number for reduction="sum", and the ignore_index of F.nll_loss


def _log_softmax(logits: Tensor) -> Tensor:
    # float32 at least: in half precision 1 - <t, p> rounds to 0 and its logarithm to -inf.
    return F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def warn_of_probabilities(logits: Tensor, *, owner: str) -> None:
    """Warn when what should be logits looks like probabilities. Looks at values, so only while they are on the CPU."""
    if logits.device.type != "cpu" or not len(logits):
        return
    values = logits.detach()
    low, high = torch.aminmax(values)
    if low >= 0 and high <= 1 and ((values.sum(dim=1) - 1).abs() < 1e-3).all():
        warnings.warn(
            f"{owner} got rows in [0, 1] that sum to 1: these look like probabilities, but logits are needed. Leave "
            "out the model's softmax",
            UserWarning,
            stacklevel=3,
        )
