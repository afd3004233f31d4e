"""What the common contract trains and provokes: the term, co-teaching, the two together, and the sheet's bad inputs."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, Classification, ProcedureSubject, Subject, plain
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.noisy_labels.co_teaching import CoTeaching, forget_schedule, num_kept
from regularized.noisy_labels.nested_dropout.layer import (
    NestedDropout,
    NestedLinear,
    draw_together,
    nest_classifier,
    width_distribution,
)
from regularized.noisy_labels.nested_dropout.width import NestedWidth, cut_to_width, select_width
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


def _pair(**settings: Any) -> CoTeaching:
    torch.manual_seed(0)
    return CoTeaching(TASK.model(), TASK.model(), optimizer=SGD, **{"forget_rate": 0.3, **settings})


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


def _batches() -> TensorData:
    data = TASK.data(24, 0)
    return TensorData(data["inputs"], data["targets"], batch_size=8)


def _train(procedure: CoTeaching, epochs: int) -> None:
    procedure.fit(_batches(), epochs=procedure.epoch + epochs)


def _train_and_choose(procedure: CoTeaching, epochs: int) -> None:
    select_width(procedure.networks, _batches())
    procedure.fit(
        _batches(),
        epochs=procedure.epoch + epochs,
        after_epoch=lambda co: select_width(co.networks, _batches()),
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


def _layer_of(**settings: Any) -> NestedDropout:
    return NestedDropout(HIDDEN, **{"sigma": 3.0, **settings})


def _merge_with_norm() -> nn.Module:
    nested = _layer_of()
    nested.keep = 2
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nested, nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, CLASSES))
    return cut_to_width(model)


def _shared() -> CoTeaching:
    first, second = TASK.model(), TASK.model()
    second[4].weight = first[4].weight  # type: ignore[index]
    return CoTeaching(first, second, optimizer=SGD)


def _same() -> CoTeaching:
    model = TASK.model()
    return CoTeaching(model, model, optimizer=SGD)


def _step(size: int, **settings: Any) -> Any:
    data = TASK.data(size, 0)
    return _pair(**settings).training_step((data["inputs"], data["targets"]))


def _odd_twice() -> None:
    """The second odd batch must not be mentioned again."""
    co, data = _pair(), TASK.data(5, 0)
    batch = (data["inputs"], data["targets"])
    co.training_step(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        co.training_step(batch)


def _evaluated_twice() -> None:
    """So must the second evaluation without a width."""
    layer, x = _layer_of().eval(), torch.zeros(1, HIDDEN)
    layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input", and what a user meets besides."""
    x = torch.zeros(2, HIDDEN)
    return [
        BadInput("sigma <= 0", lambda: _layer_of(sigma=0.0), ValueError, ("sigma", "positive", "0.0")),
        BadInput("sigma nan", lambda: width_distribution(4, sigma=float("nan")), ValueError, ("sigma", "nan")),
        BadInput("the term's sigma <= 0", lambda: NestedWidth("2", sigma=-1.0), ValueError, ("sigma", "-1.0")),
        BadInput("D < 1", lambda: NestedDropout(0, sigma=1.0), ValueError, ("at least 1", "0")),
        BadInput(
            "all probabilities 0", lambda: _layer_of(sigma=0.01, mu=500.0), ValueError, ("mu=500.0", "sigma=0.01", "8")
        ),
        BadInput("other dimension", lambda: _layer_of()(x[:, :5]), ValueError, ("8 channels", "(2, 5)")),
        BadInput("one sample without batch", lambda: _layer_of()(x[0]), ValueError, ("(B, D)", "(8,)")),
        BadInput("other channel axis", lambda: _layer_of(dim=2)(x[:, None, :4]), ValueError, ("axis 2", "(2, 1, 4)")),
        BadInput("other dimension, classifier", lambda: NestedLinear(4, 2, sigma=1.0)(x), ValueError, ("4", "(2, 8)")),
        BadInput("normalisation behind", _merge_with_norm, NoEffectWarning, ("LayerNorm", "in front")),
        BadInput("evaluated before a choice", _evaluated_twice, UserWarning, ("all 8 channels", "select_width")),
        BadInput("the same network twice", _same, ValueError, ("same network twice", "two networks")),
        BadInput("shared parameters", _shared, ValueError, ("4.weight", "share")),
        BadInput("odd batch", _odd_twice, UserWarning, ("5 samples", "last is left out", "even")),
        BadInput("forget rate of 1", lambda: _pair(forget_rate=1.0), ValueError, ("[0, 1)", "1.0")),
        BadInput("forget rate below 0", lambda: forget_schedule(-0.1, gradual=2), ValueError, ("[0, 1)", "-0.1")),
        BadInput(
            "forget rate of a schedule", lambda: _step(4, forget_rate=lambda p: 1.5), ValueError, ("[0, 1)", "1.5")
        ),
        BadInput("nothing to keep", lambda: _step(1), ValueError, ("0 samples", "split")),
        BadInput("no sample", lambda: num_kept(0, 0.2), ValueError, ("0 samples",)),
        BadInput("gradual < 0", lambda: forget_schedule(0.2, gradual=-1), ValueError, ("gradual", "-1")),
        BadInput(
            "soft labels",
            lambda: _pair().losses((torch.zeros(4, FEATURES), torch.zeros(4, 3)), 0.2),
            ValueError,
            ("class",),
        ),
        BadInput("mean loss", lambda: _step(4, loss=nn.CrossEntropyLoss()), ValueError, ("reduction='none'", "(2,)")),
        BadInput(
            "cut before a choice", lambda: cut_to_width(NestedLinear(4, 2, sigma=1.0)), ValueError, ("select_width",)
        ),
        BadInput("width out of range", lambda: _layer_of().hold(9), ValueError, ("1 ... 8", "9")),
        BadInput("no nested layer", lambda: select_width(TASK.model(), _batches()), ValueError, ("nest_classifier",)),
        BadInput(
            "no such classifier",
            lambda: nest_classifier(TASK.model(), "head", sigma=1.0),
            ValueError,
            ("'head'", "'4'"),
        ),
        BadInput(
            "no linear classifier", lambda: nest_classifier(TASK.model(), "1", sigma=1.0), ValueError, ("ReLU", "'4'")
        ),
        BadInput(
            "models that do not correspond",
            lambda: draw_together(NestedLinear(4, 2, sigma=1.0), NestedLinear(5, 2, sigma=1.0), seed=0),
            ValueError,
            ("[4]", "[5]"),
        ),
    ]
