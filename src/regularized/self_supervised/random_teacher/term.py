"""The random teacher as a term of the loop.

:mod:`regularized.self_supervised.random_teacher.teacher` has the paper and its symbols.
"""

from torch import Tensor, nn

from regularized.mechanisms.frozen import Statistics
from regularized.self_supervised.random_teacher.loss import Loss
from regularized.self_supervised.random_teacher.teacher import FrozenTeacher
from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["MatchRandomTeacher"]

# Shapes: B samples of a batch, N of the training set, C outputs, K features of a bottleneck.


class MatchRandomTeacher(FrozenTeacher):
    """The same as a term of the loop, whose model is the student: alone, or as a control beside another loss.

    Args:
        teacher: network to outputs of the student's shape, never trained; kept and frozen in place.
        loss: see :class:`RandomTeacher`; default ``"kl"``.
        student_temperature: default 1 (official).
        teacher_temperature: default 1 (official).
        statistics: what the teacher's batch normalisation uses; default ``"running"`` (official).
        weight: coefficient, a number or a schedule; default 1.

    Attributes:
        teacher: the frozen teacher; ``teacher.module`` is the network. It is part of the ``state_dict``.

    Raises:
        ValueError: student and teacher are the same or share memory; a setting is not allowed; at a step, outputs of
            different shapes or of one class, or no index after :meth:`remember`.
        RuntimeError: at a step, somebody made the teacher trainable or changed its mode.

    Warns:
        NoEffectWarning: the student is a copy of the teacher and nothing tells them apart.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from regularized.training import TensorData, Trainer
        >>> def network():
        ...     return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        >>> x, match = torch.randn(400, 64), MatchRandomTeacher(network())
        >>> match.remember(x)
        >>> adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
        >>> trainer = Trainer(network(), terms={"match": match}, optimizer=adamw)
        >>> _ = trainer.fit(TensorData(x, batch_size=100), epochs=1)
    """

    sharding = "forward"

    per_step = False
    taps: tuple[str, ...] = ()
    count = Term.count

    def __init__(
        self,
        teacher: nn.Module,
        *,
        loss: Loss = "kl",
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        statistics: Statistics = "running",
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(
            teacher,
            loss=loss,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            statistics=statistics,
        )
        as_schedule(weight, name="weight")
        self.weight = weight

    def attach(self, model: nn.Module) -> None:
        """Look at the student before the training begins: apart from the teacher, and not at the fixed point."""
        self._check_student(model)

    def forward(self, step: Step) -> Tensor:
        """Sum of the losses over the batch."""
        logits = step.logits
        recalled = self._recall(step.batch.index, len(logits))
        if recalled is None:
            targets = step.forward(step.inputs, model=self.teacher, grad=False)
        else:
            targets = self._outputs(recalled)
        return self._losses(logits, targets).sum()
