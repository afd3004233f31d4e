"""What the contract suite checks of PS-KD."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, Subject, plain
from regularized.mechanisms.prediction_store import DenseStore, PredictionStore, TopKStore
from regularized.overfitting.ps_kd import ProgressiveDistillation, ProgressiveDistillationLoss

SAMPLES, CLASSES = 24, 4
TASK = Classification(classes=CLASSES)


def _exact() -> PredictionStore:
    return DenseStore(SAMPLES, CLASSES)


def _half() -> PredictionStore:
    return DenseStore(SAMPLES, CLASSES, torch.bfloat16)


def _top() -> PredictionStore:
    return TopKStore(SAMPLES, CLASSES, k=2)


def _terms(store: Callable[[], PredictionStore], alpha: float = 0.8) -> Mapping[str, nn.Module]:
    return {"task": ProgressiveDistillation(SAMPLES, CLASSES, alpha=alpha, store=store())}


def last_epoch_loss(alpha: float = 0.8, store: PredictionStore | None = None) -> ProgressiveDistillationLoss:
    """The loss in its last epoch of three."""
    criterion = ProgressiveDistillationLoss(SAMPLES, CLASSES, epochs=3, alpha=alpha, store=store)
    criterion.set_epoch(2)
    return criterion


def _part(store: Callable[[], PredictionStore]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    criterion, index = last_epoch_loss(store=store()), torch.tensor([3, 1, 20, 7, 0])
    criterion.store.write(index[:3], torch.rand(3, CLASSES).softmax(dim=1))  # two samples come for the first time
    return criterion, (torch.randn(5, CLASSES, requires_grad=True), torch.tensor([0, 3, 1, 2, 2]), index)


def subjects() -> list[Subject]:
    """The exact table, half precision, and the two largest of four entries."""
    return [
        Subject(
            name,
            TASK.model,
            partial(_terms, store),
            plain,
            TASK.data,
            partial(_terms, store, 0.0),
            partial(_part, store),
        )
        for name, store in (("exact", _exact), ("half", _half), ("top", _top))
    ]
