"""What the contract suite checks of nested dropout: the term, co-teaching, and the two together."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, ProcedureSubject, Subject, plain
from regularized.noisy_labels.co_teaching import CoTeaching, forget_schedule
from regularized.noisy_labels.nested_dropout.layer import NestedDropout, NestedLinear, draw_together, nest_classifier
from regularized.noisy_labels.nested_dropout.term import NestedWidth
from regularized.noisy_labels.nested_dropout.width import select_width
from regularized.training.data import TensorData

FEATURES, HIDDEN, CLASSES = 5, 8, 3
TASK = Classification(FEATURES, CLASSES, hidden=(HIDDEN, HIDDEN), random_labels=True)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def _one_layer() -> Mapping[str, nn.Module]:
    return {**plain(), "widths": NestedWidth("4", sigma=3.0)}


def _two_layers() -> Mapping[str, nn.Module]:
    return {**plain(), "widths": NestedWidth(("2", "4"), sigma=3.0)}


def _always_all() -> Mapping[str, nn.Module]:
    return {**plain(), "widths": NestedWidth("4", sigma=1e-3, mu=HIDDEN)}


def _always_all_of_two() -> Mapping[str, nn.Module]:
    return {**plain(), "widths": NestedWidth(("2", "4"), sigma=1e-3, mu=HIDDEN)}


def _layer() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return NestedDropout(HIDDEN, sigma=4.0), (torch.randn(6, HIDDEN, requires_grad=True),)


def _classifier() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return NestedLinear(HIDDEN, CLASSES, sigma=4.0), (torch.randn(6, HIDDEN, requires_grad=True),)


def _co_teaching(forget_rate: float = 0.4) -> CoTeaching:
    networks = [
        nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, 3)
        )
        for _ in range(2)
    ]
    return CoTeaching(*networks, optimizer=SGD, forget_rate=forget_schedule(forget_rate, gradual=2))


def _nested_co_teaching(forget_rate: float = 0.3) -> CoTeaching:
    networks = [TASK.model(), TASK.model()]
    for network in networks:
        nest_classifier(network, "4", sigma=3.0)
    draw_together(*networks, seed=0)
    return CoTeaching(*networks, optimizer=SGD, forget_rate=forget_rate)


def small_batches() -> TensorData:
    """24 samples in batches of 8."""
    data = TASK.data(24, 0)
    return TensorData(data["inputs"], data["targets"], batch_size=8)


def _train(procedure: CoTeaching, epochs: int) -> None:
    procedure.fit(small_batches(), epochs=procedure.epoch + epochs)


def _train_and_choose(procedure: CoTeaching, epochs: int) -> None:
    select_width(procedure.networks, small_batches())
    procedure.fit(
        small_batches(),
        epochs=procedure.epoch + epochs,
        after_epoch=lambda co: select_width(co.networks, small_batches()),
    )


def _weights(procedure: CoTeaching) -> Mapping[str, Tensor]:
    return {f"{k}.{key}": t for k, net in enumerate(procedure.networks) for key, t in net.state_dict().items()}


def subjects() -> list[Subject | ProcedureSubject]:
    """One nested layer, two that take turns, the classifier as a part, co-teaching with and without nested layers."""
    return [
        Subject("one layer", TASK.model, _one_layer, plain, TASK.data, off=_always_all, part=_layer),
        Subject("two layers", TASK.model, _two_layers, plain, TASK.data, off=_always_all_of_two, part=_classifier),
        ProcedureSubject("co_teaching", _co_teaching, partial(_co_teaching, 0.0), _train, _weights),
        ProcedureSubject(
            "nested_co_teaching",
            _nested_co_teaching,
            partial(_nested_co_teaching, forget_rate=0.0),
            _train_and_choose,
            _weights,
        ),
    ]
