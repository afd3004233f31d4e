"""What the contract suite checks of early-learning regularisation: the ELR term and the ELR+ procedure."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, ProcedureSubject, Subject, plain
from regularized.mechanisms.ema import ramped_decay
from regularized.noisy_labels.early_learning.loss import EarlyLearningLoss
from regularized.noisy_labels.early_learning.procedure import EarlyLearningPlus
from regularized.noisy_labels.early_learning.term import EarlyLearning
from regularized.training.data import TensorData

SAMPLES, CLASSES = 24, 3
TASK = Classification(5, CLASSES, hidden=(8,), random_labels=True)


def _terms() -> Mapping[str, nn.Module]:
    return {**plain(), "early_learning": EarlyLearning(SAMPLES, CLASSES)}


def _off() -> Mapping[str, nn.Module]:
    return {**plain(), "early_learning": EarlyLearning(SAMPLES, CLASSES, weight=0.0)}


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    data = TASK.data(8, 1)
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(2)).requires_grad_()
    return EarlyLearningLoss(SAMPLES, CLASSES), (logits, data["targets"], data["index"])


def elr_plus(make_model: Callable[[], nn.Module] = TASK.model, **settings: Any) -> EarlyLearningPlus:
    """Two networks, with other settings where given."""
    return EarlyLearningPlus(
        make_model,
        num_samples=SAMPLES,
        num_classes=CLASSES,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        decay=ramped_decay(0.9, steps=6),
        **settings,
    )


def _train(procedure: EarlyLearningPlus, epochs: int) -> None:
    data = TASK.data(SAMPLES, 0)
    batches = TensorData(data["inputs"], data["targets"], batch_size=8)
    procedure.fit(batches, epochs=procedure.epoch + epochs)


def _weights(procedure: EarlyLearningPlus) -> Mapping[str, Tensor]:
    parts = {"network": procedure.networks, "average": procedure.averages, "history": procedure.losses}
    return {
        f"{name}{k}.{key}": tensor
        for name, pair in parts.items()
        for k, module in enumerate(pair)
        for key, tensor in module.state_dict().items()
    }


def subjects() -> list[Subject | ProcedureSubject]:
    """ELR as a term, and ELR+."""
    return [
        Subject("elr", model=TASK.model, terms=_terms, off=_off, plain=plain, data=TASK.data, part=_part),
        ProcedureSubject(
            "elr_plus", build=elr_plus, plain=partial(elr_plus, strength=0.0), train=_train, weights=_weights
        ),
    ]
