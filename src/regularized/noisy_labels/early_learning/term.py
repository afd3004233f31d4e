"""ELR in the loop: the regulariser as a term.

:mod:`regularized.noisy_labels.early_learning.loss` has the paper and its symbols.
"""

from torch import Tensor

from regularized.mechanisms.ranges import allowed
from regularized.mechanisms.sample_history import check_index
from regularized.noisy_labels.early_learning.penalty import STRENGTH, Regulariser
from regularized.training.progress import Coefficient
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["EarlyLearning"]


class EarlyLearning(Regulariser):
    """The regulariser alone, as a term beside ``CrossEntropy`` in the loop; ``weight`` is the paper's lambda.

    Args:
        num_samples: N, length of the training set.
        num_classes: C.
        weight: coefficient, a number >= 0 or a schedule; default 3, see :class:`EarlyLearningLoss`.
        momentum: share of the old average that stays, in [0, 1]; default 0.7.
        eps: probabilities are clamped to [eps, 1 - eps]; default 1e-4.

    Raises:
        ValueError: a setting is outside its range, or the batch has no index.

    Examples:
        >>> import torch
        >>> from regularized.training.progress import Progress
        >>> from regularized.training.step import Batch
        >>> term = EarlyLearning(num_samples=6, num_classes=2)
        >>> batch = Batch.of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), torch.tensor([5, 0, 1, 2])))
        >>> step = Step(torch.nn.Linear(3, 2, bias=False), batch, Progress(0, 1))
        >>> torch.allclose(term(step), 4 * torch.log(torch.tensor(1 - 0.3 / 2)))
        True
    """

    sharding = "forward"

    per_step = False
    taps: tuple[str, ...] = ()
    count = Term.count

    @allowed(weight=STRENGTH.or_schedule())
    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        weight: Coefficient = 3.0,
        momentum: float = 0.7,
        eps: float = 1e-4,
    ) -> None:
        super().__init__(num_samples, num_classes, momentum=momentum, eps=eps)
        self.weight = weight

    def forward(self, step: Step) -> Tensor:
        """Sum of the penalties over the batch; 0 in ``eval()`` mode, where nothing is recorded."""
        log_p = step.log_probabilities
        self.check_logits(log_p)
        if not self.training:
            return log_p.new_zeros(())
        check_index(step.index, self.num_samples, owner="EarlyLearning", batch_size=len(log_p))
        return self.penalties(log_p, step.index).sum()

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{super().extra_repr()}, weight={self.weight}, eps={self.eps}"
