"""What the contract suite checks of PS-KD."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, Classification, Subject, plain
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


def _loss(alpha: float = 0.8, store: PredictionStore | None = None) -> ProgressiveDistillationLoss:
    criterion = ProgressiveDistillationLoss(SAMPLES, CLASSES, epochs=3, alpha=alpha, store=store)
    criterion.set_epoch(2)
    return criterion


def _part(store: Callable[[], PredictionStore]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    criterion, index = _loss(store=store()), torch.tensor([3, 1, 20, 7, 0])
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


def _call(
    index: Tensor | None, *, labels: Tensor | None = None, classes: int = CLASSES, loss: nn.Module | None = None
) -> None:
    loss = _loss() if loss is None else loss
    logits = torch.zeros(2, classes, requires_grad=True)
    loss(logits, torch.tensor([0, 1]) if labels is None else labels, index)


def _never_told() -> None:
    criterion = ProgressiveDistillationLoss(SAMPLES, CLASSES, epochs=3)
    _call(torch.tensor([0, 1]), loss=criterion)
    _call(torch.tensor([1, 2]), loss=criterion)


def _evaluated_in_training_mode() -> None:
    with torch.no_grad():
        _call(torch.tensor([0, 1]))


def _other_device() -> None:
    criterion = _loss().to("meta")
    _call(torch.tensor([0, 1]), loss=criterion)


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    soft = torch.full((2, CLASSES), 1 / CLASSES)
    return [
        BadInput("no index", lambda: _call(None), ValueError, ("index of each sample", "IndexedDataset")),
        BadInput(
            "index too large",
            lambda: _call(torch.tensor([0, 24])),
            IndexError,
            ("index 24", "num_samples=24"),
        ),
        BadInput("index negative", lambda: _call(torch.tensor([0, -1])), IndexError, ("index -1", "num_samples=24")),
        BadInput("index of floats", lambda: _call(torch.tensor([0.0, 1.0])), TypeError, ("integers", "float32")),
        BadInput("index repeated", lambda: _call(torch.tensor([5, 5])), UserWarning, ("more than once", "last")),
        BadInput("one index for all", lambda: _call(torch.tensor([5])), ValueError, ("one index a sample", "(2,)")),
        BadInput("soft labels", lambda: _call(torch.arange(2), labels=soft), ValueError, ("class labels", "mix=Mix")),
        BadInput("epoch beyond the last", lambda: _loss().set_epoch(3), ValueError, ("epochs=3", "[0, 3)", "got 3")),
        BadInput(
            "no epochs",
            lambda: ProgressiveDistillationLoss(SAMPLES, CLASSES, epochs=0),
            ValueError,
            ("epochs must be at least 1",),
        ),
        BadInput("progress outside [0, 1]", lambda: _loss().set_progress(1.5), ValueError, ("[0, 1]", "1.5")),
        BadInput("alpha outside [0, 1]", lambda: _loss(alpha=1.2), ValueError, ("alpha", "[0, 1]", "1.2")),
        BadInput(
            "alpha of the term outside [0, 1]",
            lambda: ProgressiveDistillation(SAMPLES, CLASSES, alpha=-0.1),
            ValueError,
            ("alpha", "[0, 1]", "-0.1"),
        ),
        BadInput("set_epoch never called", _never_told, RuntimeError, ("second time", "set_epoch(epoch)")),
        BadInput("wrong num_classes", lambda: _call(torch.arange(2), classes=5), ValueError, ("num_classes=4", "5")),
        BadInput("other device", _other_device, ValueError, ("logits are on cpu", "history", "meta", ".to('cpu')")),
        BadInput("no eval()", _evaluated_in_training_mode, RuntimeError, ("training mode", ".eval()")),
        BadInput(
            "store of another size",
            lambda: ProgressiveDistillation(SAMPLES, CLASSES, store=DenseStore(9, CLASSES)),
            ValueError,
            ("9 samples", "num_samples=24"),
        ),
    ]
