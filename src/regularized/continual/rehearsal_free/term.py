"""Rehearsal-free continual learning in the loop: the loss with its previous model, and the anchor on the weights.

Both are told of tasks by the loop: ``Trainer.fit(data, task=task)``, or ``task_start`` and ``task_end`` by hand.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.continual.rehearsal_free.fisher import FisherKind, diagonal_fisher
from regularized.continual.rehearsal_free.loss import (
    distillation,
    feature_distillation,
    local_cross_entropy,
    sigmoid_loss,
)
from regularized.continual.rehearsal_free.parameters import Which, head_of, select_parameters
from regularized.continual.rehearsal_free.penalty import path_importance
from regularized.continual.tasks import SeenClasses, Task
from regularized.mechanisms.anchors import add_anchor_gradient, anchor_penalty
from regularized.mechanisms.frozen import Frozen
from regularized.mechanisms.ranges import Choice, allowed, at_least, between, positive
from regularized.mechanisms.taps import Taps
from regularized.training.data import as_source
from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Step, call_model
from regularized.training.terms import Term

__all__ = ["Classifier", "ContinualLoss", "Importance", "WeightAnchor"]

Classifier: TypeAlias = Literal["sigmoid", "softmax", "local"]
"""Loss of the labels: a sigmoid for each class, softmax over all classes seen, or over those of the task alone."""

Importance: TypeAlias = Literal["none", "fisher", "path"]
"""What a weight counts in the anchor: the same (L2), Fisher information (EWC), or a path integral (SI)."""


class ContinualLoss(Term):
    """The task's loss over the classes seen so far, with distillation from the model before the task.

    It takes the place of ``CrossEntropy``. On the first task, unless the model knows classes already, no second
    forward pass is made.

    Args:
        num_classes: columns of the head, all tasks together.
        known: classes that the model knows at the start; then it is its own teacher from the first task on. Default
            none.
        classifier: see :data:`Classifier`; default ``"sigmoid"``, the paper's base.
        distil: coefficient >= 0 of prediction distillation. With ``"sigmoid"`` the targets of old classes become the
            previous model's sigmoids, so 0 or 1 is allowed; otherwise the coefficient mu of
            :func:`~regularized.continual.rehearsal_free.loss.distillation`. Default 1.
        temperature: T of softmax distillation; default 2.
        feature_weight: coefficient >= 0 of feature distillation; default 0.
        features: name of the module whose output is distilled; needed where ``feature_weight`` is above 0.
        weight: coefficient of the whole; default 1.

    Attributes:
        seen: the classes in their order.

    Raises:
        ValueError: an argument is outside its range; labels of no class seen; a class in two tasks.
        RuntimeError: a task begins before the last has ended.

    Shape:
        Logits (B, num_classes); targets (B,) int64.

    Examples:
        >>> from regularized.training.progress import Progress
        >>> from regularized.training.step import Batch
        >>> model, loss = nn.Linear(2, 4), ContinualLoss(4)
        >>> loss.attach(model)
        >>> for task in (Task(0, (0, 1), None), Task(1, (2, 3), None)):
        ...     loss.task_start(task)
        ...     x, y = torch.randn(8, 2), torch.tensor(task.classes).repeat(4)
        ...     value = loss(Step(model, Batch.of((x, y)), Progress(0, 1)))
        ...     loss.task_end(task)
        >>> value.shape, loss.seen.num_old
        (torch.Size([]), 4)
    """

    @allowed(
        classifier=Choice("sigmoid", "softmax", "local"),
        distil=at_least(0.0),
        temperature=positive(),
        feature_weight=at_least(0.0),
    )
    def __init__(
        self,
        num_classes: int,
        *,
        known: Sequence[int] = (),
        classifier: Classifier = "sigmoid",
        distil: float = 1.0,
        temperature: float = 2.0,
        feature_weight: float = 0.0,
        features: str | None = None,
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if classifier == "sigmoid" and distil not in (0.0, 1.0):
            raise ValueError(
                f'with classifier="sigmoid" distillation replaces the targets of old classes, so distil is 0 or 1, got '
                f'{distil}; a coefficient belongs to classifier="softmax"'
            )
        if feature_weight > 0 and features is None:
            raise ValueError("feature_weight needs features: the name of the module in front of the head")
        self.classifier = classifier
        self.distil = distil
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.features = features
        self.taps: tuple[str, ...] = (features,) if features is not None and feature_weight > 0 else ()
        self.seen = SeenClasses(num_classes, known)
        self.previous: Frozen | None = None
        self._model: list[nn.Module] = []

    def attach(self, model: nn.Module) -> None:
        """Keep a copy of the model, which becomes the previous one at the end of each task."""
        if self._model and self._model[0] is model:
            return
        if self.features is not None:
            model.get_submodule(self.features)
        if self._needs_previous:
            self.previous = Frozen(copy.deepcopy(model))
        self._model = [model]

    def task_start(self, task: Task) -> None:
        """New classes."""
        self.seen.begin(task)

    def task_end(self, task: Task) -> None:
        """The model as it is now becomes the previous one."""
        self.seen.end(task)
        if self.previous is not None:
            self.previous.module.load_state_dict(self._model[0].state_dict())

    def forward(self, step: Step) -> Tensor:
        """Sum over the samples."""
        logits = step.logits
        if not self.seen.num_seen:
            raise RuntimeError("no task has begun: the loop must call task_start, as Trainer.fit(..., task=task) does")
        if logits.shape[1] != self.seen.num_classes:
            raise ValueError(f"the head has {logits.shape[1]} columns, ContinualLoss was given {self.seen.num_classes}")
        z, targets, old = logits[:, self.seen.columns], self.seen.positions(step.targets), self.seen.num_old
        if old == 0 or self.previous is None:
            return self._labels(z, targets, None).sum()
        with Taps(self.previous.module, self.taps) as taps:
            before = call_model(self.previous, step.inputs)
            teacher = before[:, self.seen.columns[:old]]
            loss = self._labels(z, targets, teacher if self.distil > 0 else None)
            if self.classifier != "sigmoid" and self.distil > 0:
                loss = loss + self.distil * distillation(z, teacher, temperature=self.temperature)
            if self.taps:
                name = self.taps[0]
                loss = loss + self.feature_weight * feature_distillation(step.hidden(name), taps.states[name])
        return loss.sum()

    @property
    def _needs_previous(self) -> bool:
        return self.distil > 0 or self.feature_weight > 0

    def _labels(self, z: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        if self.classifier == "sigmoid":
            return sigmoid_loss(z, targets, teacher)
        if self.classifier == "local":
            return local_cross_entropy(z, targets, self.seen.num_old)
        return F.cross_entropy(z, targets, reduction="none")

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no model yet."""
        return {**self.__dict__, "_model": []}

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{self.seen.num_classes}, classifier={self.classifier!r}, distil={self.distil}, weight={self.weight}"


class WeightAnchor(Term):
    """Holds weights near their values at the end of the last task; adds its gradient once a step, after clipping.

    L2, EWC and SI differ in what a weight counts. Only L2 can hold the weights of a pretrained model on the first task,
    where the others have seen no task yet.

    Args:
        weight: lambda >= 0 or a schedule; the penalty has no factor 1/2. The paper's values are not known; ours, on
            small images: see the experiment.
        importance: see :data:`Importance`; default ``"none"``, L2.
        pretrained: True: the weights at the start are the first anchors; or a state dict that is. Default False: the
            first task is free.
        which: parameters that are held, see :func:`~regularized.continual.rehearsal_free.select_parameters`; default
            all but the head's.
        head: name of the head; default the last module with parameters.
        with_head: hold the head, too, as tasks of the same classes want it; default False.
        fisher: Fisher information over the model's own labels (``"exact"``, default) or at the given ones.
        decay: share of earlier tasks' importances that stays when a task's are added, in [0, 1]; default 1, the sum.
        xi: damping of the path integral; default 0.1.

    Attributes:
        names: parameters that are held.

    Raises:
        ValueError: an argument is outside its range; nothing is selected; shapes of given anchors differ.
        RuntimeError: a task begins before the last has ended.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> anchor = WeightAnchor(weight=0.5, pretrained=True)
        >>> anchor.attach(model)
        >>> anchor.names, anchor.value().item()
        (['0.weight', '0.bias'], 0.0)
    """

    contributes = False
    unsharded = "it holds the parameters that it found when it was attached, which shards replace"

    @allowed(
        importance=Choice("none", "fisher", "path"),
        fisher=Choice("exact", "empirical"),
        decay=between(0.0, 1.0),
        xi=positive(),
        weight=at_least(0.0).or_schedule(),
    )
    def __init__(
        self,
        *,
        weight: Coefficient,
        importance: Importance = "none",
        pretrained: bool | Mapping[str, Tensor] = False,
        which: Which = "all",
        head: str | None = None,
        with_head: bool = False,
        fisher: FisherKind = "exact",
        decay: float = 1.0,
        xi: float = 0.1,
    ) -> None:
        super().__init__(weight=weight)
        self.importance = importance
        self.which = which
        self.head = head
        self.with_head = with_head
        self.fisher: FisherKind = fisher
        self.decay = decay
        self.xi = xi
        self.names: list[str] = []
        self.tasks_done: int = 0
        self._pretrained = pretrained
        self._schedule = as_schedule(weight, name="weight")
        self.seen: SeenClasses | None = None
        self._weights: list[nn.Parameter] = []
        self._model: list[nn.Module] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def attach(self, model: nn.Module) -> None:
        """Choose the parameters, and take the first anchors."""
        if self._model and self._model[0] is model:
            return
        names = select_parameters(model, self.which, head=self.head, with_head=self.with_head)
        if self.names and names != self.names:
            raise ValueError(f"these anchors are of {self.names[:4]} ..., the model has {names[:4]} ...")
        parameters = dict(model.named_parameters())
        start = self._anchors_of(parameters, names)
        if not self.names:
            self.names = names
            rows = next(model.get_submodule(head_of(model) if self.head is None else self.head).parameters())
            self.seen = SeenClasses(len(rows))
            for kind in self._tables:
                for name in names:
                    value = start[name] if kind in ("anchor", "start") else torch.zeros_like(start[name])
                    self.register_buffer(_key(kind, name), value.clone())
        self._weights = [parameters[name] for name in names]
        self._model = [model]

    @property
    def _tables(self) -> tuple[str, ...]:
        by_path = ("start", "path") if self.importance == "path" else ()
        return ("anchor", *(("importance",) if self.importance != "none" else ()), *by_path)

    def _anchors_of(self, parameters: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        given = self._pretrained if isinstance(self._pretrained, Mapping) else parameters
        wrong = [n for n in names if n not in given or given[n].shape != parameters[n].shape]
        if wrong:
            told = [f"{n} {tuple(given[n].shape) if n in given else 'is missing'}" for n in wrong[:6]]
            raise ValueError(
                f"the given anchors do not fit the model: {', '.join(told)}; it has "
                f"{', '.join(f'{n} {tuple(parameters[n].shape)}' for n in wrong[:6])}"
            )
        # In float32 whatever the weights are: an anchor that is rounded pulls somewhere else.
        return {n: given[n].detach().to(torch.promote_types(given[n].dtype, torch.float32)) for n in names}

    def _table(self, kind: str) -> list[Tensor]:
        return [self.get_buffer(_key(kind, name)) for name in self.names]

    @property
    def active(self) -> bool:
        """Whether there is something to hold the weights at: after a task, or for L2 on a pretrained model."""
        return self.tasks_done > 0 or (self._pretrained is not False and self.importance == "none")

    def value(self) -> Tensor:
        """The penalty at present, without its coefficient; 0 where it is not active yet."""
        if not self.active:
            return torch.zeros(())
        return anchor_penalty(self._weights, self._table("anchor"), self._importances())

    def _importances(self) -> list[Tensor] | None:
        return None if self.importance == "none" else self._table("importance")

    def before_step(self, step: Step) -> None:
        """Add the gradient of the penalty; for the path integral, note where the weights were and where they go."""
        self._attached()
        if self.importance == "path":
            self._before = [
                (w.detach().clone(), torch.zeros_like(w) if w.grad is None else w.grad.detach().clone())
                for w in self._weights
            ]
        strength = self._schedule(step.progress)
        if strength and self.active:
            add_anchor_gradient(self._weights, self._table("anchor"), self._importances(), strength=strength)

    def after_step(self, step: Step) -> None:
        """For the path integral: minus gradient times change."""
        for path, w, (old, gradient) in zip(self._table("path") if self._before else (), self._weights, self._before):
            path.sub_(gradient * (w.detach() - old))
        self._before = []

    def reset(self) -> None:
        """Forget a step that was interrupted."""
        self._before = []

    def task_start(self, task: Task) -> None:
        """Begin a path.

        Raises:
            RuntimeError: the task before has not ended.
        """
        self._attached().begin(task, shared=True)
        if self.importance == "path":
            for start, path, w in zip(self._table("start"), self._table("path"), self._weights, strict=True):
                start.copy_(w.detach())
                path.zero_()

    def task_end(self, task: Task) -> None:
        """Importances of this task are added to those before it, and the weights are held where they are now."""
        self._attached().end(task)
        new: Sequence[Tensor] = ()
        if self.importance == "fisher":
            new = list(self._fisher(task).values())
        elif self.importance == "path":
            tables = zip(self._table("path"), self._weights, self._table("start"), strict=True)
            new = [path_importance(path, w.detach() - start, xi=self.xi) for path, w, start in tables]
        for table, value in zip(self._table("importance") if new else (), new):
            table.mul_(self.decay).add_(value)
        for anchor, w in zip(self._table("anchor"), self._weights, strict=True):
            anchor.copy_(w.detach())
        self.tasks_done += 1

    def _fisher(self, task: Task) -> dict[str, Tensor]:
        # In the order of the head: a softmax does not depend on it.
        columns, source = self._attached().columns.sort().values, as_source(task.data, seed=0)

        def batches() -> Iterator[tuple[Any, Tensor]]:
            for batch in source.batches(0):
                assert batch.targets is not None  # the loss needed them as well
                yield batch.inputs, torch.searchsorted(columns.cpu(), batch.targets.cpu())

        return diagonal_fisher(self._model[0], batches(), self.names, columns=columns, kind=self.fisher)

    def get_extra_state(self) -> Tensor:
        """Tasks done."""
        return torch.tensor(self.tasks_done)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a saved number."""
        self.tasks_done = int(state)

    def _attached(self) -> SeenClasses:
        if self.seen is None or not self._weights:
            raise RuntimeError("WeightAnchor belongs to no model yet: the loop must call attach(model) first")
        return self.seen

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no model yet."""
        return {**self.__dict__, "_model": [], "_weights": [], "_before": []}

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"weight={self.weight}, importance={self.importance!r}, which={self.which!r}, holds={len(self.names)}"


def _key(kind: str, name: str) -> str:
    """Name of a buffer: no dots are allowed in it."""
    return f"{kind}:{name.replace('.', '/')}"
