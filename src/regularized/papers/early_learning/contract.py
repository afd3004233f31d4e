"""What the common contract trains and provokes: the ELR term, the ELR+ procedure, and the sheet's bad inputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, Classification, ProcedureSubject, Subject, plain
from regularized.mechanisms.ema import ramped_decay
from regularized.noisy_labels.early_learning.loss import EarlyLearning, EarlyLearningLoss
from regularized.noisy_labels.early_learning.procedure import EarlyLearningPlus
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


def _procedure(make_model: Callable[[], nn.Module] = TASK.model, **settings: Any) -> EarlyLearningPlus:
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
            "elr_plus", build=_procedure, plain=partial(_procedure, strength=0.0), train=_train, weights=_weights
        ),
    ]


def _loss(*, n: int = 4, **settings: Any) -> EarlyLearningLoss:
    return EarlyLearningLoss(n, CLASSES, **settings)


_Z, _Y, _I = torch.zeros(2, CLASSES), torch.tensor([0, 1]), torch.tensor([0, 1])


def _without_gradient() -> Tensor:
    with torch.no_grad():
        value: Tensor = _loss()(_Z, _Y, _I)
    return value


def _one_network() -> EarlyLearningPlus:
    model = TASK.model()
    return _procedure(lambda: model)


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input", and what a user meets besides."""
    soft, twice = torch.full((2, CLASSES), 1 / CLASSES), torch.tensor([1, 1])
    return [
        BadInput("missing index", lambda: _loss()(_Z, _Y), ValueError, ("index", "IndexedDataset")),
        BadInput("index too large", lambda: _loss()(_Z, _Y, _I + 3), IndexError, ("4", "num_samples=4", "Subset")),
        BadInput("index negative", lambda: _loss()(_Z, _Y, _I - 1), IndexError, ("-1", "num_samples=4")),
        BadInput("index of floats", lambda: _loss()(_Z, _Y, _I.float()), TypeError, ("integers", "float32")),
        BadInput("index of another batch", lambda: _loss()(_Z, _Y, _I[:1]), ValueError, ("(2,)", "(1,)")),
        BadInput("beta above 1", lambda: _loss(momentum=1.1), ValueError, ("momentum", "[0, 1]", "1.1")),
        BadInput("beta below 0", lambda: _loss(momentum=-0.1), ValueError, ("momentum", "[0, 1]", "-0.1")),
        BadInput("lam < 0", lambda: _loss(strength=-1.0), ValueError, ("strength", ">= 0", "-1")),
        BadInput(
            "lam < 0, the term", lambda: EarlyLearning(4, CLASSES, weight=-1.0), ValueError, ("weight", ">= 0", "-1")
        ),
        BadInput("eps >= 1/C", lambda: _loss(eps=0.34), ValueError, ("eps", "0.3333", "0.34")),
        BadInput("the same sample twice", lambda: _loss()(_Z, _Y, twice), UserWarning, ("more than once", "last")),
        BadInput("probabilities", lambda: _loss()(soft, _Y, _I), UserWarning, ("probabilities", "logits", "softmax")),
        BadInput("soft labels", lambda: _loss()(_Z, soft, _I), ValueError, ("soft", "EarlyLearningPlusLoss")),
        BadInput("validation in training mode", _without_gradient, RuntimeError, ("eval()", "history")),
        BadInput(
            "other number of classes",
            lambda: _loss()(torch.zeros(2, 5), _Y, _I),
            ValueError,
            (f"num_classes={CLASSES}", "(2, 5)"),
        ),
        BadInput("labels of a part", lambda: _loss().suspected_label_errors(_Y), ValueError, ("(4,)", "(2,)")),
        BadInput("ELR+ of one network", _one_network, ValueError, ("make_model", "new one")),
        BadInput(
            "ELR+ on tokens",
            lambda: _procedure().training_step(0, (torch.zeros(2, 5, dtype=torch.int64), _Y, _I)),
            TypeError,
            ("mixup", "int64"),
        ),
        BadInput("ELR+ without index", lambda: _procedure().training_step(0, (_Z, _Y)), ValueError, ("index",)),
        BadInput("ELR+ mixup < 0", lambda: _procedure(mixup=-1.0), ValueError, ("mixup", ">= 0")),
    ]
