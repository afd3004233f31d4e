"""A teacher that knows nothing: the label-free warm start and control experiment of any distillation.

A student learns to copy the outputs of a network that was never trained, on unlabelled inputs without augmentation.
A linear probe on the student is better than on its teacher although the teacher has nothing to teach: what improves
comes from the training alone. A distillation or self-supervised result that is no better than this one owes nothing to
its teacher.

    Sarnthein, Bachmann, Anagnostidis, Hofmann, "Random Teachers are Good Teachers", ICML 2023, arXiv 2302.12091.
    Official code: github.com/safelix/dinopl at cd39e78 (no licence file: read for facts).

===========  =======================  ==================================================================
paper        here                     meaning
===========  =======================  ==================================================================
theta_T      ``teacher``              frozen, in evaluation mode, never updated; no centering
theta_S      ``student``              trained; starts at distance alpha, see ``student_init``
tau_T        ``teacher_temperature``  default 1
tau_S        ``student_temperature``  default 1
===========  =======================  ==================================================================

What drives it at alpha = 0: an exact copy of the teacher is a fixed point, the gradient ``p_S - p_T`` is 0. With batch
normalisation the official set-up is not at that point: the teacher normalises by statistics that were never updated
(mean 0, variance 1: not at all), the student by those of its batch. ``statistics="batch"`` takes this difference away.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from regularized.mechanisms.frozen import Frozen, Statistics, check_apart
from regularized.mechanisms.ranges import allowed, count
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.self_supervised.random_teacher.layer import EncoderWithHead
from regularized.self_supervised.random_teacher.loss import (
    Loss,
    check_settings,
    chunked_distillation_loss,
    distillation_losses,
)
from regularized.training.finite import NonFiniteLoss
from regularized.training.step import call_model

__all__ = ["RandomTeacher"]

# Shapes: B samples of a batch, N of the training set, C outputs, K features of a bottleneck.


class FrozenTeacher(nn.Module):
    """What the wrapper and the term share: the frozen teacher, the loss, and what is remembered of the teacher."""

    remembered: Tensor | None

    def __init__(
        self,
        teacher: nn.Module,
        *,
        loss: Loss,
        student_temperature: float,
        teacher_temperature: float,
        statistics: Statistics,
    ) -> None:
        super().__init__()
        check_settings(loss, student_temperature, teacher_temperature)
        self.teacher: Frozen = Frozen(teacher, statistics=statistics)
        self.loss: Loss = loss
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        # Not saved: it is the teacher's, which is.
        self.register_buffer("remembered", None, persistent=False)

    @torch.no_grad()
    def remember(self, inputs: Tensor | Iterable[Any], *, batch_size: int = 512) -> None:
        """Run the teacher once over the whole training set; afterwards steps look its outputs up by index.

        Right only for inputs that are the same in every epoch. Of an :class:`EncoderWithHead` the bottleneck's features
        are kept, N x K x 4 bytes (51 MB for CIFAR at K = 256), of any other teacher its outputs, N x C x 4 bytes. Used
        in training mode only, and not saved: call it again after loading.

        Args:
            inputs: (N, ...) inputs in the order of the index; or batches of them in that order.
            batch_size: samples at a time, where ``inputs`` is one tensor.

        Raises:
            ValueError: with ``statistics="batch"``, where the output of a sample depends on its batch; or no input.
        """
        if self.teacher.statistics == "batch":
            raise ValueError(
                "remember() needs a teacher whose output for a sample does not depend on the rest of the batch, but "
                "statistics='batch' normalises by it; use statistics='running', or do without remember()"
            )
        self.teacher.check()
        batches = inputs.split(batch_size) if isinstance(inputs, Tensor) else inputs
        module = self.teacher.module
        device = next((p.device for p in module.parameters()), None)
        rows = []
        for x in batches:
            if isinstance(x, Tensor) and device is not None:
                x = x.to(device)
            rows.append(module.features(x) if isinstance(module, EncoderWithHead) else call_model(module, x))
        if not rows:
            raise ValueError("remember() needs the inputs of the training set, got none")
        self.remembered = torch.cat(rows)

    def forget(self) -> None:
        """Let go of what :meth:`remember` stored; the teacher runs in each step again."""
        self.remembered = None

    def _recall(self, index: Tensor | None, size: int) -> Tensor | None:
        """(B, K) rows of what was remembered; None where the teacher must run."""
        if self.remembered is None or not self.training:
            return None
        if index is None:
            raise ValueError(
                "the teacher's outputs were remembered, but the batch has no index to look them up by; give the index "
                "(wrap the data set with regularized.training.IndexedDataset, or yield (x, y, index)), or call forget()"
            )
        if index.shape != (size,):
            raise ValueError(f"index must have shape ({size},), one for each sample; got {tuple(index.shape)}")
        index = index.to(self.remembered.device)
        return self.remembered.index_select(0, index)

    def _outputs(self, recalled: Tensor) -> Tensor:
        """Outputs (B, C) from what was remembered."""
        module = self.teacher.module
        with torch.no_grad():
            return F.linear(recalled, module.weight) if isinstance(module, EncoderWithHead) else recalled

    def _losses(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distillation_losses(
            student,
            teacher,
            loss=self.loss,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def _check_student(self, student: nn.Module) -> None:
        check_apart(student, self.teacher.module, names=("student", "teacher"))
        if self.student_temperature == self.teacher_temperature and _is_fixed_point(student, self.teacher):
            warnings.warn(
                "the student is an exact copy of its teacher, and no layer makes a difference between the student's "
                "train mode and the teacher's: the gradient is 0 and nothing will be learned (Adam would amplify "
                "rounding noise). Start at alpha > 0 (interpolate_init), or use a network with batch normalisation or "
                "dropout and statistics='running'",
                NoEffectWarning,
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"loss={self.loss!r}, student_temperature={self.student_temperature}, "
            f"teacher_temperature={self.teacher_temperature}"
        )


class RandomTeacher(FrozenTeacher):
    """Student and random teacher as one loss, for a loop of your own: ``RandomTeacher(...)(x).backward()``.

    The teacher is frozen, set to evaluation mode and stays so, whatever mode this module or one around it is put into.
    Give the optimizer ``student.parameters()``; the authors use AdamW with learning rate 1e-3 and no weight decay,
    batches of 256, 100 epochs, inputs without augmentation. The student must be in training mode, where batch
    normalisation uses the batch (see the module's description). Afterwards keep the student's encoder.

    Costs the teacher's forward pass: 1.33 times a plain step, or next to nothing after :meth:`remember`.

    Not a substitute for pretraining: the features stay weak. Not for a copied start without batch normalisation or
    dropout, where there is no signal.

    Args:
        student: network to (B, C); for several processes, its DDP wrapper.
        teacher: network to (B, C), never trained; kept and frozen in place.
        loss: ``"kl"`` (default), ``"ce"`` (official configuration: same gradient) or ``"mse"``, see
            :func:`~regularized.self_supervised.random_teacher.distillation_losses`.
        student_temperature: default 1 (official).
        teacher_temperature: default 1 (official).
        statistics: what the teacher's batch normalisation uses: ``"running"`` (default, official: ``t_eval``) or
            ``"batch"``, without touching its buffers.
        chunk: samples whose outputs are held at once; needs an
            :class:`~regularized.self_supervised.random_teacher.EncoderWithHead` on both sides. For heads so wide that
            (B, C) does not fit into memory. None (default) holds all.

    Attributes:
        student: the student.
        teacher: the frozen teacher; ``teacher.module`` is the network.
        steps: calls in training mode with gradient so far; part of the ``state_dict``.

    Raises:
        ValueError: student and teacher are the same or share memory; a setting is not allowed; at a call, outputs of
            different shapes or of one class, or no index after :meth:`remember`.
        RuntimeError: at a call, somebody made the teacher trainable or changed its mode.
        NonFiniteLoss: the loss is not finite; its step is named. Looked at on the CPU only, without a sync; on a GPU
            ``Trainer`` looks.

    Warns:
        NoEffectWarning: the student is a copy of the teacher and nothing tells them apart.

    Examples:
        >>> from regularized.self_supervised.random_teacher.student_init import draw_weights, interpolate_init
        >>> def network(seed):
        ...     model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        ...     return draw_weights(model, generator=torch.Generator().manual_seed(seed))
        >>> teacher = network(0)
        >>> student = interpolate_init(teacher, network(1), alpha=0.2)
        >>> match = RandomTeacher(student, teacher)
        >>> optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
        >>> for x in torch.randn(400, 64).split(100):
        ...     match(x).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    @allowed(chunk=count(1).or_none("all at once"))
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        loss: Loss = "kl",
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        statistics: Statistics = "running",
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            teacher,
            loss=loss,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            statistics=statistics,
        )
        if chunk is not None:
            for name, network in (("student", student), ("teacher", teacher)):
                if not isinstance(network, EncoderWithHead):
                    raise ValueError(
                        "chunk needs a student and a teacher of class EncoderWithHead, whose last matrix is known; "
                        f"the {name} is a {type(network).__name__}"
                    )
        self._check_student(student)
        self.student = student
        self.chunk = chunk
        self.steps: int = 0

    def forward(self, x: Any, index: Tensor | None = None) -> Tensor:
        """Mean loss of a batch.

        Args:
            x: input of both networks; a mapping is fed as keyword arguments.
            index: (B,) position of each sample in the training set, for what was remembered; otherwise not needed.

        Returns:
            Scalar.
        """
        student, teacher = self.student, self.teacher.module
        if self.chunk is None:
            outputs = call_model(student, x)
            recalled = self._recall(index, len(outputs))
            targets = call_model(self.teacher, x) if recalled is None else self._outputs(recalled)
            loss = self._losses(outputs, targets).mean()
        else:
            assert isinstance(student, EncoderWithHead)
            assert isinstance(teacher, EncoderWithHead)
            features = student.features(x)
            known = self._recall(index, len(features))
            if known is None:
                self.teacher.check()
                with torch.no_grad():
                    known = teacher.features(x)
            total = chunked_distillation_loss(
                features,
                student.weight,
                known,
                teacher.weight,
                chunk=self.chunk,
                loss=self.loss,
                student_temperature=self.student_temperature,
                teacher_temperature=self.teacher_temperature,
            )
            loss = total / len(features)
        if not torch.compiler.is_compiling():
            self._look(loss)
        return loss

    def _look(self, loss: Tensor) -> None:
        """Count the step; on the CPU, where looking costs nothing, refuse a loss that is not finite."""
        if loss.device.type == "cpu" and not math.isfinite(float(loss.detach())):
            raise NonFiniteLoss(
                f"the loss of the student against its teacher is not finite in step {self.steps}. Usual causes: NaN in "
                "the inputs, a learning rate that is too high, or a temperature that is too small"
            )
        if self.training and loss.requires_grad:
            self.steps += 1

    def get_extra_state(self) -> Tensor:
        """Number of steps, for the ``state_dict``."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Number of steps, from the ``state_dict``."""
        self.steps = int(state)


def _is_fixed_point(student: nn.Module, teacher: Frozen) -> bool:
    """Whether equal weights and no layer of two modes make student and teacher one function."""
    ours, theirs = list(student.parameters()), list(teacher.module.parameters())
    if len(ours) != len(theirs) or not all(
        a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in zip(ours, theirs, strict=True)
    ):
        return False
    for part in student.modules():
        if isinstance(part, _NormBase) and part.track_running_stats and teacher.statistics == "running":
            return False
        if isinstance(part, _DropoutNd) and part.p > 0:
            return False
        if isinstance(part, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
            return False
    return True
