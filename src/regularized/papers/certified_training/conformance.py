"""Golden vectors of certified training: losses, bounds, penalties and gradients of small networks; the radius."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.conformance import Case, UnknownCase
from regularized.robustness.certified_training import (
    Bounds,
    IntervalBounds,
    SmoothedRadius,
    linf_box,
    relu_balance,
    robust_cross_entropy,
    tightness,
)

TOLERANCE = 1e-9


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for: a training step, or the radius over epochs."""
    if case.has("hp/batches_per_epoch", "hp/start", "hp/length"):
        return _schedule(case)
    if case.has("in/x", "in/y", "hp/eps"):
        return _step(case)
    raise UnknownCase(case)


def _schedule(case: Case) -> Mapping[str, NDArray[Any]]:
    radius = SmoothedRadius(
        case.number("max_eps"),
        start=int(case.number("start")),
        length=int(case.number("length")),
        batches_per_epoch=int(case.number("batches_per_epoch")),
        middle=case.number("mid", 0.25),
        exponent=case.number("beta", 4.0),
    )
    steps = case.outputs["eps_per_batch"].size
    return {"eps_per_batch": np.array([radius.at(step) for step in range(steps)])}


def _step(case: Case) -> Mapping[str, NDArray[Any]]:
    x, y = torch.tensor(case.inputs["x"]), torch.tensor(case.inputs["y"])
    model = _network(case, x).train(bool(case.number("train", 1.0)))
    bounds, radius = IntervalBounds(model), case.number("eps")
    logits = model(x)
    range_ = None
    if case.has("in/data_min", "in/data_max"):
        range_ = (torch.tensor(case.inputs["data_min"]), torch.tensor(case.inputs["data_max"]))
    std = torch.tensor(case.inputs["std"]) if case.has("in/std") else 1.0
    box = linf_box(x, radius, std=std, data_range=range_)
    found = bounds(box)
    margins = found.margins(y)
    loss = robust_cross_entropy(margins, y)
    tolerance = case.number("tol", 0.5)
    tight = tightness(box, found.relu_inputs, tolerance=tolerance)
    balance = relu_balance(found.relu_inputs, tolerance=tolerance)
    used = case.number("use_tightness", 1.0) * tight + case.number("use_relu", 1.0) * balance
    penalty = case.number("reg_lambda", 0.5) * (1.0 - radius / case.number("max_eps")) * used
    results = {
        "robust_loss": loss,
        "clean_ce": F.cross_entropy(logits, y),
        "reg_scaled": penalty,
        "L_tightness": tight,
        "L_relu": balance,
        "L_std": _spread(found, tolerance),
        "verified_error": (margins < 0).any(dim=1).double().mean(),
        "logits": logits,
        "margin_lower_bounds": _wrong_classes(margins, y),
    }
    for number, before in enumerate(found.relu_inputs):
        results |= {f"relu{number}_lower": before.lower, f"relu{number}_upper": before.upper}
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss + penalty, parameters, allow_unused=True, materialize_grads=True)
    results |= {f"grad/{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {name: value.detach().numpy() for name, value in results.items()}


def _spread(found: Bounds, tolerance: float) -> Tensor:
    """What the official code logs beside the penalties, and leaves out of the loss."""
    spreads = torch.stack([before.centre.std() for before in found.relu_inputs])
    return torch.relu(tolerance - spreads).mean() / tolerance


def _wrong_classes(margins: Tensor, y: Tensor) -> Tensor:
    wrong = torch.ones_like(margins, dtype=torch.bool).scatter(1, y[:, None], value=False)
    return margins[wrong].reshape(len(y), -1)


# -- the network of a case ----------------------------------------------------------------------------


def _network(case: Case, x: Tensor) -> nn.Sequential:
    """A chain of layers, of its state alone: numbers without one are ReLU, the second of two is Flatten."""
    given = {name.removeprefix("param/"): value for name, value in case.inputs.items() if name.startswith("param/")}
    state = {name: torch.tensor(value) for name, value in given.items()}
    found = {int(match[1]) for match in map(re.compile(r"(\d+)\.").match, state) if match}
    if not found:
        raise UnknownCase(case)
    convolutions = sum(state[f"{i}.weight"].ndim == 4 for i in found)
    for padded in (True, False):
        for strides in itertools.product((1, 2, 3, 4), repeat=convolutions):
            model = nn.Sequential(*_layers(state, max(found), iter(strides), padded=padded)).double()
            model.load_state_dict(state)
            if _fits(model, case, x):
                return model
    raise UnknownCase(case)


def _layers(state: Mapping[str, Tensor], last: int, strides: Iterator[int], *, padded: bool) -> Iterator[nn.Module]:
    for i in range(last + 1):
        weight, bias = state.get(f"{i}.weight"), f"{i}.bias" in state
        if weight is None:
            following = state.get(f"{i + 1}.weight")
            after_layer = f"{i - 1}.weight" in state
            flat = not after_layer and following is not None and following.ndim == 2
            yield nn.Flatten() if flat else nn.ReLU()
        elif f"{i}.running_mean" in state:
            before = next(state[f"{j}.weight"] for j in range(i - 1, -1, -1) if f"{j}.weight" in state)
            yield (nn.BatchNorm2d if before.ndim == 4 else nn.BatchNorm1d)(len(weight))
        elif weight.ndim == 2:
            yield nn.Linear(weight.shape[1], len(weight), bias=bias)
        else:
            size = weight.shape[-1]
            channels, kernel = weight.shape[1], (weight.shape[-2], size)
            padding = size // 2 if padded else 0
            yield nn.Conv2d(channels, len(weight), kernel, next(strides), padding, bias=bias)


@torch.no_grad()
def _fits(model: nn.Sequential, case: Case, x: Tensor) -> bool:
    """Whether shapes are those of the case; where several would do, padded ones and small strides come first."""
    shapes = []
    hidden = x
    model.eval()
    try:
        for layer in model:
            if isinstance(layer, nn.ReLU):
                shapes.append(tuple(hidden.shape))
            hidden = layer(hidden)
    except RuntimeError:
        return False
    known = [case.outputs.get(f"relu{i}_lower") for i in range(len(shapes))]
    return all(output is None or output.shape == shape for output, shape in zip(known, shapes, strict=True))
