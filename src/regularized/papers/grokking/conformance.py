"""Golden vectors of the task, of training with and without normalisation, of the scores, and of pruning."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.conformance import Case, UnknownCase
from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    Operation,
    QuadraticMLP,
    modular_optimizer,
    one_hot_mse,
)
from regularized.understanding.grokking.pruning import prune_by_score_
from regularized.understanding.grokking.scores import gini, inverse_participation_ratio, neuron_ipr, spectrum

TOLERANCE = 1e-8

_OPERATIONS = {"addition": "add", "subtraction": "subtract", "multiplication": "multiply", "division": "divide"}


def tolerance(case: Case, output: str) -> float:
    """Parameters after steps of Adam, which divides by roots of small numbers, to 1e-6; all else to 1e-8."""
    return 1e-6 if output.startswith("param/") else TOLERANCE


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Which check a case is follows from its keys."""
    if case.has("hp/p", "hp/pair_seed", "hp/data_frac", "hp/noise_level"):
        out = _task(case)
    elif case.has("in/param/fc1.weight", "in/param/fc2.weight", "in/x", "in/y"):
        out = _training(case) if case.has("hp/steps") else _gradients(case)
    elif case.has("in/rows"):
        rows, r = _tensor(case, "rows"), case.number("r", 2)
        out = {"ipr": inverse_participation_ratio(rows, r=r), "gini_of_abs_rfft": gini(spectrum(rows))}
    elif case.has("in/fc1_weight", "in/fc2_weight", "hp/n_prune"):
        out = _pruning(case)
    else:
        raise UnknownCase(case)
    return {name: value.detach().numpy() for name, value in out.items()}


def _tensor(case: Case, name: str) -> Tensor:
    return torch.as_tensor(np.array(case.inputs[name]))


def _pairs(case: Case, p: int) -> Tensor:
    """(n, 2) pairs, given as such or as one-hot vectors."""
    x = _tensor(case, "x")
    return x.long() if x.shape[1:] == (2,) else x.reshape(len(x), 2, p).argmax(dim=2)


def _operation(case: Case) -> Operation:
    name = case.text("operation", "addition").lower()
    if name not in _OPERATIONS and name not in _OPERATIONS.values():
        raise UnknownCase(case)
    return cast(Operation, _OPERATIONS.get(name, name))


def _arithmetic(p: int, op: Operation, **settings: Any) -> ModularArithmetic:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a small modulus that is no prime is the vectors' own choice
        return ModularArithmetic(p, op, **settings)


def _task(case: Case) -> dict[str, Tensor]:
    seeds = {"pair_seed": int(case.number("pair_seed")), "label_seed": int(case.number("label_seed", 0))}
    shares = {"frac": case.number("data_frac"), "noise": case.number("noise_level")}
    task = _arithmetic(int(case.number("p")), _operation(case), **shares, **seeds)
    train, test = task.train.tensors, task.test.tensors
    names = ("train_pairs", "train_labels", "test_pairs", "test_labels")
    return {**dict(zip(names, (*train, *test), strict=True)), "orderlist": task.order}


def _network(case: Case) -> QuadraticMLP:
    state = {name.removeprefix("param/"): _tensor(case, name) for name in case.inputs if name.startswith("param/")}
    norm: Literal["batch", "layer"] | None = None
    if "norm1.weight" in state:
        norm = "batch" if "norm1.running_mean" in state else "layer"
    p, width = state["fc2.weight"].shape
    net = QuadraticMLP(p, width=width, norm=norm).to(state["fc1.weight"].dtype)
    if set(state) - set(net.state_dict()):
        raise UnknownCase(case)
    net.load_state_dict(state)
    return net


def _training(case: Case) -> dict[str, Tensor]:
    net, y = _network(case), _tensor(case, "y").long()
    x = _pairs(case, net.p)
    out = {"logits_initial": copy.deepcopy(net)(x)}  # of a copy, whose running statistics nobody needs
    built = modular_optimizer(
        net.parameters(), weight_decay=case.number("weight_decay", 0.0), lr=case.number("lr", 0.01)
    )
    for group in built.param_groups:
        group["betas"] = (case.number("beta1", 0.9), case.number("beta2", 0.98))
        group["eps"] = case.number("eps", 1e-8)
    losses = []
    for _ in range(int(case.number("steps"))):
        built.zero_grad()
        loss = one_hot_mse(net(x), y)
        loss.backward()
        built.step()
        losses.append(loss.detach())
    net.eval()
    task = _arithmetic(net.p, _of_labels(case, net.p, x, y))
    held = ~torch.isin(task.pairs[:, 0] * net.p + task.pairs[:, 1], x[:, 0] * net.p + x[:, 1])
    out["losses"] = torch.stack(losses) if losses else torch.zeros(0)
    out["train_acc"] = _right(net, x, y)
    out["test_acc"] = _right(net, task.pairs[held], task.clean[held])
    return out | {f"param/{name}": value for name, value in net.state_dict().items()}


def _of_labels(case: Case, p: int, x: Tensor, y: Tensor) -> Operation:
    """The operation that a case names; if it names none, the one with which most of its labels agree."""
    if case.has("hp/operation"):
        return _operation(case)
    results = {"add": x.sum(dim=1), "multiply": x.prod(dim=1), "subtract": x[:, 0] - x[:, 1]}
    return cast(Operation, max(results, key=lambda name: int((results[name] % p == y).sum())))


def _right(net: QuadraticMLP, x: Tensor, y: Tensor) -> Tensor:
    right: Tensor = (net(x).argmax(dim=1) == y).double().mean()
    return right


def _gradients(case: Case) -> dict[str, Tensor]:
    net, y = _network(case), _tensor(case, "y").long()
    x = _pairs(case, net.p)
    logits = net.train()(x)
    loss = one_hot_mse(logits, y)
    loss.backward()
    out = {"logits": logits, "loss": loss}
    out |= {f"grad/{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return out | {f"buffer/{name}": value for name, value in net.named_buffers()}


def _pruning(case: Case) -> dict[str, Tensor]:
    first, second = _tensor(case, "fc1_weight"), _tensor(case, "fc2_weight")
    p, width = second.shape
    net = QuadraticMLP(p, width=width).to(first.dtype)
    net.load_state_dict({"fc1.weight": first, "fc2.weight": second})
    scores = neuron_ipr(*net.neuron_maps(), p=p, r=case.number("r", 2)).detach()
    prune_by_score_(net, scores, fraction=case.number("n_prune") / width)
    out = {"neuron_ipr": scores, "order_low_to_high": scores.argsort(stable=True)}
    if case.has("in/x"):
        out["logits_pruned"] = net(_pairs(case, p))
    return out
