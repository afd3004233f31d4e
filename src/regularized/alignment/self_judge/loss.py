"""Self-Judge: one model grades answers with and without the reference, and the first view teaches the second.

    Ye and Ng, "Self-Judge: Selective Instruction Following with Alignment Self-Evaluation", 2024, arXiv 2409.00935.
    Official code: github.com/nusnlp/Self-J at f0d596c (no licence file).

=========  ======================  ==============================================================================
paper      here                    meaning
=========  ======================  ==============================================================================
z1         ``logits_ref``          logits of the view that shows question, *reference* and answer: the teacher's
z2         ``logits_noref``        logits of the view without the reference: the student's, the one that is used
t          ``labels``              the grade's token (a digit), then the end of the sequence
m1, m2     rows that are graded    positions of the digits: labels that are neither ignored nor the end
M          number of such rows     the same in both views, in the same order
alpha      ``alpha=0.3``           share of the student's own cross-entropy
alpha_kd   ``alpha_kd=2.0``        share of the divergence
=========  ======================  ==============================================================================

The loss is ``L = CE(z1, t) + alpha CE(z2, t) + alpha_kd KL(p1 || p2)``, where p1 and p2 are the softmax of the graded
rows and the divergence is their mean over the M rows. p1 is constant: by z1 the divergence has no gradient, by z2 its
gradient is ``alpha_kd (p2 - p1) / M``. But both views are of one model, so what the student learns moves the teacher.

Paper and code differ: the code takes the logarithm of a softmax, which is infinite where a probability underflows; we
take the log-softmax, which has the same value elsewhere. The code knows one end of sequence, token 2; here it is an
argument.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, at_least

__all__ = ["PrivilegedDistillation", "view_divergence", "views_loss"]

ALPHA = at_least(0.0, remedy="the official code has 0.3; 0 leaves the student's own cross-entropy out")
ALPHA_KD = at_least(0.0, remedy="the official code has 2; 0 leaves the divergence out")


def view_divergence(logits_ref: Tensor, logits_noref: Tensor, *, detach_teacher: bool = True) -> Tensor:
    """Kullback-Leibler divergence of the student's grades from the teacher's, KL(p1 || p2), of each row.

    Args:
        logits_ref: z1, (..., V).
        logits_noref: z2, of the same shape.
        detach_teacher: p1 is constant; default True (paper).

    Returns:
        (...) in nats, >= 0, in float32 at least.

    Examples:
        >>> z1, z2 = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986123]])  # 1/2, 1/2 and 1/4, 3/4
        >>> view_divergence(z1, z2)  # log(2) / 2 + log(2/3) / 2
        tensor([0.1438])
    """
    log_p1, log_p2 = _log_softmax(logits_ref), _log_softmax(logits_noref)
    if detach_teacher:
        log_p1 = log_p1.detach()
    return F.kl_div(log_p2, log_p1, reduction="none", log_target=True).sum(dim=-1)


def views_loss(
    logits_ref: Tensor,
    logits_noref: Tensor,
    labels: Tensor,
    *,
    graded: Tensor | slice | None = None,
    alpha: float = 0.3,
    alpha_kd: float = 2.0,
    detach_teacher: bool = True,
) -> Tensor:
    """The loss of rows that stand in the same order in both views: for a classifier, or gathered from two sequences.

    Args:
        logits_ref: z1, (K, V).
        logits_noref: z2, (K, V).
        labels: t, (K,) int64, of both views.
        graded: which rows the divergence compares, anything that indexes K rows; default all. It must choose one.
        alpha: of the student's cross-entropy; default 0.3 (official code).
        alpha_kd: of the divergence; default 2 (official code).
        detach_teacher: p1 is constant; default True.

    Returns:
        Scalar. With both coefficients 0 it is the teacher's cross-entropy bit for bit.

    Examples:
        >>> z, t = torch.randn(5, 10), torch.arange(5)
        >>> torch.allclose(views_loss(z, z, t), 1.3 * F.cross_entropy(z, t))  # equal views
        True
    """
    loss = _cross_entropy(logits_ref, labels)
    if alpha:
        loss = loss + alpha * _cross_entropy(logits_noref, labels)
    if alpha_kd:
        rows_ref, rows_noref = (z if graded is None else z[graded] for z in (logits_ref, logits_noref))
        loss = loss + alpha_kd * view_divergence(rows_ref, rows_noref, detach_teacher=detach_teacher).mean()
    return loss


class PrivilegedDistillation(nn.Module):
    """A judge that sees the reference in training and not in use: one model, two views, the first teaches the second.

    For a language model the views are two token sequences of different length, with labels -100 before the grade. For
    any other model with inputs that exist in training only (*privileged information*), two sets of class logits.

    Args:
        alpha: of the student's own cross-entropy, >= 0; default 0.3 (official code).
        alpha_kd: of the divergence, >= 0; default 2 (official code).
        eos_id: token that ends a sequence; it is learnt, and not compared. Default None: labels hold grades alone.
        ignore_index: label of positions that nobody learns; default -100, as in torch.
        detach_teacher: the divergence teaches the student alone; default True (paper).

    Raises:
        ValueError: a coefficient is out of range; at the call: shapes or numbers of rows differ, or (looked at while
            labels are on the CPU) targets of the views differ, or a sample has no grade left.

    Examples:
        >>> criterion = PrivilegedDistillation(eos_id=2)
        >>> seen, blind = torch.tensor([[-100, -100, -100, 7, 2]]), torch.tensor([[-100, 7, 2]])
        >>> criterion(torch.randn(1, 5, 9), torch.randn(1, 3, 9), seen, blind).shape
        torch.Size([])
        >>> criterion(torch.randn(4, 10), torch.randn(4, 10), torch.arange(4), torch.arange(4)).shape  # a classifier
        torch.Size([])
    """

    @allowed(alpha=ALPHA, alpha_kd=ALPHA_KD)
    def __init__(
        self,
        *,
        alpha: float = 0.3,
        alpha_kd: float = 2.0,
        eos_id: int | None = None,
        ignore_index: int = -100,
        detach_teacher: bool = True,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.alpha_kd = alpha_kd
        self.eos_id = eos_id
        self.ignore_index = ignore_index
        self.detach_teacher = detach_teacher

    def forward(
        self, logits_ref: Tensor, logits_noref: Tensor, labels_ref: Tensor, labels_noref: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits_ref: z1: (B, L1, V) of a causal language model, where position i predicts label i + 1; or (B, V), of
                which every row is graded.
            logits_noref: z2: (B, L2, V); or (B, V).
            labels_ref: (B, L1) int64; or (B,).
            labels_noref: (B, L2) int64; or (B,), and then default those of the other view.

        Returns:
            Scalar. On a GPU the form with sequences waits for the device, since it counts rows;
            :func:`views_loss` of gathered rows does not.
        """
        if logits_ref.ndim == 2:
            labels_noref = labels_ref if labels_noref is None else labels_noref
        elif labels_noref is None:
            raise ValueError("two sequences have labels of their own; give labels_noref, too")
        assert labels_noref is not None
        rows_ref, kept_ref = self._target_rows("ref", logits_ref, labels_ref)
        rows_noref, kept_noref = self._target_rows("noref", logits_noref, labels_noref)
        if kept_ref.shape != kept_noref.shape:
            raise ValueError(
                f"the views must grade the same samples: with reference {len(kept_ref)} labels are kept, without it "
                f"{len(kept_noref)}; align both by id, and cut the prompt instead of the grade where it is too long"
            )
        if kept_ref.device.type == "cpu" and not torch.compiler.is_compiling() and not kept_ref.equal(kept_noref):
            row = int((kept_ref != kept_noref).nonzero()[0])
            raise ValueError(
                f"the views have different targets: label {row} of those that are kept is {int(kept_ref[row])} with "
                f"reference and {int(kept_noref[row])} without; align the two views by id"
            )
        return views_loss(
            rows_ref,
            rows_noref,
            kept_ref,
            graded=None if self.eos_id is None or logits_ref.ndim == 2 else kept_ref != self.eos_id,
            alpha=self.alpha,
            alpha_kd=self.alpha_kd,
            detach_teacher=self.detach_teacher,
        )

    def _target_rows(self, view: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(K, V) logits that predict a kept label, and (K,) these labels, sample after sample."""
        if logits.ndim not in (2, 3) or logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits_{view} must be (B, L, V) with labels (B, L), or (B, V) with labels (B,); got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        if logits.ndim == 2:
            return logits, labels
        logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != self.ignore_index
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_grades(view, kept if self.eos_id is None else kept & (labels != self.eos_id))
        return logits[kept], labels[kept]

    def _check_grades(self, view: str, graded: Tensor) -> None:
        if not bool((left := graded.any(dim=1)).all()):
            sample = int((~left).nonzero()[0])
            raise ValueError(
                f"sample {sample} of the view {view!r} has no grade among its labels: all are {self.ignore_index}"
                f"{'' if self.eos_id is None else f' or the end {self.eos_id}'}. Was the sequence cut before the "
                "grade? Cut the prompt instead"
            )

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"alpha={self.alpha}, alpha_kd={self.alpha_kd}, eos_id={self.eos_id}"


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
