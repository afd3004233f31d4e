"""Golden vectors of the authors' code: width distributions, a co-teaching step, the choice of a width, forget rates."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.noisy_labels.co_teaching import CoTeaching, forget_schedule
from regularized.noisy_labels.nested_dropout.layer import NestedLinear, nested_layers, width_distribution
from regularized.noisy_labels.nested_dropout.width import best_width, width_accuracies
from regularized.training.data import TensorData
from regularized.training.progress import Progress


def tolerance(case: Case, output: str) -> float:
    """1e-12; accuracies pass through float32 in the authors' code."""
    return 1e-6 if "acc" in output else 1e-12


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What the case asks for, by the keys that it holds."""
    if case.has("hp/forget_rate", "hp/val_k_index", "hp/sampled_k_index", "in/x1", "in/x2", "in/feat_w2"):
        return _co_teaching_step(case)
    if case.has("in/x", "in/y", "in/feat_w1", "in/cls_w1"):
        return _width_choice(case)
    if case.has("hp/forget_rate", "hp/n_gradual", "hp/epochs"):
        return _rates(case)
    if case.has("hp/std", "hp/feat_dim"):
        distribution = width_distribution(
            int(case.number("feat_dim")), sigma=case.number("std"), mu=case.number("mu", 0.0)
        )
        return {"dist": distribution.numpy()}
    raise UnknownCase(case)


def _network(case: Case, number: int) -> nn.Sequential:
    """relu(x @ feat_w) @ cls_w with nested dropout between the two, in float64."""
    features, classifier = (torch.tensor(case.inputs[f"{name}{number}"]) for name in ("feat_w", "cls_w"))
    head = NestedLinear(
        classifier.shape[0], classifier.shape[1], sigma=case.number("std", 1.0), mu=case.number("mu", 0.0)
    )
    net = nn.Sequential(nn.Linear(features.shape[0], features.shape[1], bias=False), nn.ReLU(), head).double()
    for layer, weight in ((net[0], features), (net[2], classifier)):
        layer.weight = nn.Parameter(weight.T.double().contiguous())
    return net


def _co_teaching_step(case: Case) -> Mapping[str, NDArray[Any]]:
    networks = [_network(case, number) for number in (1, 2)]
    for network in networks:
        (nested,) = nested_layers(network).values()
        nested.keep = int(case.number("val_k_index")) + 1
        nested.hold(int(case.number("sampled_k_index")) + 1)
    halves = [(torch.tensor(case.inputs[f"x{n}"]), torch.tensor(case.inputs[f"y{n}"]).long()) for n in (1, 2)]
    if len(halves[0][0]) != len(halves[1][0]):
        raise ValueError(f"the halves differ in size: {[len(x) for x, _ in halves]}")
    co = CoTeaching(*networks, optimizer=partial(torch.optim.SGD, lr=0.1))
    batch = tuple(torch.cat(part) for part in zip(*halves, strict=True))
    result = co.losses(batch, case.number("forget_rate"))
    (result.first + result.second).backward()
    out: dict[str, Tensor] = {
        "logits1": result.logits[0],
        "logits2": result.logits[1],
        "kept_idx1": result.chosen_by_first,
        "kept_idx2": result.chosen_by_second - len(halves[0][0]),
        "num_kept": torch.tensor(len(result.chosen_by_first)),
        "loss1": result.first,
        "loss2": result.second,
    }
    for number, network in enumerate(networks, 1):
        out[f"grad_feat{number}"], out[f"grad_cls{number}"] = (
            p.grad.T for p in network.parameters() if p.grad is not None
        )
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


def _width_choice(case: Case) -> Mapping[str, NDArray[Any]]:
    networks = [_network(case, n) for n in (1, 2) if case.has(f"in/feat_w{n}", f"in/cls_w{n}")]
    x, y = torch.tensor(case.inputs["x"]), torch.tensor(case.inputs["y"]).long()
    data = TensorData(x, y, batch_size=int(case.number("batch_size", len(x))), shuffle=False)
    accuracies = width_accuracies(networks, data)
    width, penalised = best_width(accuracies, penalty=case.number("penalty", 1e-5))
    return {
        "acc_per_k": accuracies.numpy(),
        "best_penalised_acc": np.array(penalised),
        "best_k_index": np.array(width - 1),
    }


def _rates(case: Case) -> Mapping[str, NDArray[Any]]:
    rate = forget_schedule(case.number("forget_rate"), gradual=int(case.number("n_gradual")))
    epochs = int(case.number("epochs"))
    return {"rate_schedule": np.array([rate(Progress(0, 1, epoch, epochs)) for epoch in range(epochs)])}
