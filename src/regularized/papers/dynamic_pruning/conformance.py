"""Golden vectors of the official code: strengths and targets, one training step of one layer, and the mask loss."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.compression.dynamic_pruning.groups import FilterGroup
from regularized.compression.dynamic_pruning.layer import DynamicConv2d, MaskPredictor
from regularized.compression.dynamic_pruning.loss import mask_agreement, mask_loss
from regularized.compression.dynamic_pruning.masks import filter_strengths, mass_mask, predicted_mask, top_mask
from regularized.compression.dynamic_pruning.operations import convolution_macs
from regularized.evidence.conformance import Case, UnknownCase

PREDICTOR = "mask.model.1Conv2dMask."
EXACT = ("gt_mask", "active", "flops")


def tolerance(case: Case, output: str) -> float:
    """Masks and counts are exact; the sheet's bounds, of which that of the loss alone is the tightest."""
    if output in EXACT:
        return 0.0
    return 1e-10 if case.has("in/gt0") else 1e-9


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Every output of a case, in the precision in which the official code gave it."""
    if case.has("in/act"):
        return _targets(case)
    if case.has("in/x", "in/cotangent", "in/param/conv.weight", "hp/ratio"):
        return _layer(case)
    if case.has("in/gt0", "in/logit0"):
        return _loss(case)
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(case.inputs[name])


def _targets(case: Case) -> dict[str, NDArray[Any]]:
    strengths = filter_strengths(_tensor(case, "act"))
    found: dict[str, NDArray[Any]] = {"criterion": strengths.numpy()}
    for name in ("mass", "prune_ratio"):
        if case.has(f"hp/{name}"):
            wanted = _target(name, case.number(name))(strengths)
            found["gt_mask"] = wanted[:, :, None, None].float().numpy()
    return found


def _target(name: str, value: float) -> Callable[[Tensor], Tensor]:
    if name == "mass":
        return partial(mass_mask, mass=value, min_keep=0)
    return partial(top_mask, prune_ratio=value, min_keep=0)


def _layer(case: Case) -> dict[str, NDArray[Any]]:
    """One layer in training mode: output, masks, counts, loss, and all gradients."""
    params = {name.removeprefix("param/"): _tensor(case, name) for name in case.inputs if name.startswith("param/")}
    x = _tensor(case, "x").requires_grad_()
    channels = x.shape[1]
    filters, of_group, *kernel = params["conv.weight"].shape
    strides = [int(case.number("stride", 1.0))] * 2
    conv = nn.Conv2d(
        channels,
        filters,
        (kernel[0], kernel[1]),
        stride=(strides[0], strides[1]),
        padding=_padding(case, kernel, strides),
        groups=channels // of_group,
        bias="conv.bias" in params,
    )
    norm = nn.BatchNorm2d(filters) if "bn.weight" in params else None
    entries = params[f"{PREDICTOR}weight"].shape[1]
    predictor = MaskPredictor(channels, filters, softmax=bool(case.number("softmax", 1.0)), embedding=entries)
    kind = {"mass": "mass", "uniform": "prune_ratio"}[case.text("gt_type", "mass")]
    layer = DynamicConv2d(
        conv,
        norm,
        predictor,
        group=FilterGroup("conv", activation=F.relu),
        target=_target(kind, case.number("ratio")),
        decoupled="decoupled" in case.text("mode", "decoupled"),
    ).double()
    parts = {"conv.": conv, "bn.": norm, PREDICTOR: predictor.linear}
    theirs: dict[str, nn.Parameter] = {}
    for prefix, module in parts.items():
        for name, parameter in () if module is None else module.named_parameters():
            given = params[f"{prefix}{name}"]
            with torch.no_grad():
                parameter.copy_(given.view_as(parameter))
            theirs[f"{prefix}{name}"] = parameter

    out = layer(x).relu()
    (record,) = layer.state.records
    assert record.logits is not None
    assert record.wanted is not None
    # The official targets are float32 whatever the network's precision, and its loss and their gradients follow them.
    loss = mask_loss([record.logits], [record.wanted.float()])
    ((out * _tensor(case, "cotangent")).sum() + loss).backward()
    active = record.kept.sum(dim=1)
    found: dict[str, NDArray[Any]] = {
        "out": out.detach().numpy(),
        "logits": record.logits.detach()[:, :, None, None].numpy(),
        "gt_mask": record.wanted[:, :, None, None].float().numpy(),
        "active": active.double().numpy(),
        "flops": _macs(case, conv, record.kept, record.positions).double().numpy(),
        "mask_loss": loss.detach().numpy(),
        # In the order and precision of the official sums.
        "mask_acc": (mask_agreement([record.kept], [record.wanted]) * 100).numpy(),
        "grad_x": x.grad.numpy() if x.grad is not None else np.zeros(x.shape),
    }
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        found[f"grad/{name}"] = parameter.grad.view(params[name].shape).numpy()
    return _as_given(case, found)


def _padding(case: Case, kernel: list[int], strides: list[int]) -> tuple[int, int]:
    """As given, or that which makes the output as large as the case says."""
    if "padding" in case.hp:
        return (int(case.number("padding")),) * 2
    sizes = zip(case.inputs["x"].shape[2:], case.inputs["cotangent"].shape[2:], kernel, strides, strict=True)
    first, second = (max((stride * (there - 1) + width - here + 1) // 2, 0) for here, there, width, stride in sizes)
    return first, second


def _macs(case: Case, conv: nn.Conv2d, kept: Tensor, positions: int) -> Tensor:
    taps = positions * conv.kernel_size[0] * conv.kernel_size[1]
    before = _tensor(case, "prev_active").long()
    if conv.groups == 1:
        return convolution_macs(kept, torch.arange(conv.in_channels) < before[:, None], taps=taps)
    # The official count of a grouped convolution, which ours is not: k_(l-1) / groups is rounded down.
    return kept.sum(dim=1) * (before // conv.groups) * taps


def _loss(case: Case) -> dict[str, NDArray[Any]]:
    layers = range(sum(name.startswith("logit") for name in case.inputs))
    logits = [_tensor(case, f"logit{i}").requires_grad_() for i in layers]
    wanted = [_tensor(case, f"gt{i}") for i in layers]
    loss = mask_loss(logits, wanted)
    loss.backward()
    kept = [predicted_mask(z).flatten(1) for z in logits]
    found: dict[str, NDArray[Any]] = {
        "loss": loss.detach().numpy(),
        "acc_percent": (mask_agreement(kept, [g.flatten(1) > 0.5 for g in wanted]) * 100).numpy(),
    }
    for i, z in enumerate(logits):
        assert z.grad is not None
        found[f"grad{i}"] = z.grad.numpy()
    return _as_given(case, found)


def _as_given(case: Case, found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Rounded where the official code gave single precision."""
    return {name: value.astype(case.outputs[name].dtype) for name, value in found.items() if name in case.outputs}
