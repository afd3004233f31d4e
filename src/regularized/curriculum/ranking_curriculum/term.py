"""The curriculum as a term of the loop, with difficulties that stand in a table.

:mod:`regularized.curriculum.ranking_curriculum.loss` has the paper and its symbols.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from regularized.curriculum.ranking_curriculum.loss import END_EPOCH, curriculum_weights, share_done
from regularized.mechanisms.ranges import allowed
from regularized.mechanisms.sample_history import check_index
from regularized.mechanisms.sample_weights import check_shapes, check_unit_interval, check_unreduced
from regularized.training.progress import Coefficient
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["DifficultyWeighted"]

# Shapes: B samples of a batch, N samples of the training set, K documents that are not relevant.


class DifficultyWeighted(Term):
    """The same loss as a term of the loop, in the place of the task's; difficulty values are kept for each sample.

    The batch form of the official code is not offered here: a product of two means is no sum over samples, so that it
    would change with accumulation and with the number of processes.

    Args:
        loss: called with the model's output and the batch's targets (None where it has none); returns one loss a
            sample, shape (B,).
        difficulty: (N,) value of each training sample, in [0, 1], from :func:`pointwise_difficulty` or
            :func:`pairwise_difficulty`, in the order of the index. Data, not state: not saved in checkpoints.
        end_epoch: m, the first epoch of the loop in which all weights are 1; default 20 (official code, of 512 pairs).
            0 switches the curriculum off.
        weight: coefficient of the term; default 1.

    Raises:
        ValueError: ``difficulty`` is not (N,) or outside [0, 1], ``end_epoch`` is negative; in the loop: the batch has
            no index, or the loss returned another shape, for example a mean.
        TypeError: ``loss`` cannot be called.
        IndexError: an index outside [0, N) (checked while the index is on the CPU).

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from regularized.training.progress import Progress
        >>> from regularized.training.step import Batch
        >>> term = DifficultyWeighted(nn.MSELoss(reduction="none"), torch.tensor([1.0, 0.5, 0.0]), end_epoch=10)
        >>> batch = Batch.of((torch.ones(2), torch.zeros(2), torch.tensor([1, 2])))
        >>> [term(Step(nn.Identity(), batch, Progress(0, 1, epoch=e))).item() for e in (0, 5, 10)]
        [0.5, 1.25, 2.0]
    """

    sharding = "forward"

    is_task = True

    difficulty: Tensor

    @allowed(end_epoch=END_EPOCH)
    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        difficulty: Tensor,
        *,
        end_epoch: float = 20,
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        check_unreduced(loss, owner="DifficultyWeighted")
        check_unit_interval(difficulty, name="difficulty")
        if difficulty.ndim != 1 or len(difficulty) == 0:
            raise ValueError(
                f"difficulty must have one value for each training sample, (N,), got {tuple(difficulty.shape)}"
            )
        self.loss = loss
        self.end_epoch = end_epoch
        self.register_buffer("difficulty", difficulty.detach().clone(), persistent=False)

    def forward(self, step: Step) -> Tensor:
        """Sum of the weighted losses over the batch; of the plain ones in ``eval()`` mode."""
        losses = self.loss(step.logits, step.batch.targets)
        if not self.training:
            return losses.sum()
        progress = share_done(step.progress.epoch, self.end_epoch)
        check_index(step.index, len(self.difficulty), owner="DifficultyWeighted", batch_size=step.batch.size)
        difficulty = self.difficulty.index_select(0, step.index.to(self.difficulty.device))
        check_shapes(losses, difficulty, name="difficulty values")
        if progress == 1.0:
            return losses.sum()
        # A loss in half precision is promoted here: rounded weights would not reach 1 in small steps.
        return (losses * curriculum_weights(difficulty, progress)).sum()

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"num_samples={len(self.difficulty)}, end_epoch={self.end_epoch}"
