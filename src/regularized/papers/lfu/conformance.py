"""Golden vectors of LfU: a tiny tanh network, an auxiliary LoRA or the parameters themselves, offsets, logits.

They are our own float64 computation, checked against NumPy and central differences, not the authors' code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.conformance import Case, UnknownCase
from regularized.fine_tuning.lfu.penalty import Reduction, logit_consistency
from regularized.fine_tuning.lfu.regularizer import LfU
from regularized.fine_tuning.lfu.steps import AuxiliaryLoRA, steer

TOLERANCE = 1e-9


class _Net(nn.Module):
    """``h_0 = x``, ``h_l = tanh(W_l h_{l-1})``, ``logits = W_o h_K``."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.h0 = nn.Identity()
        self.depth: int = len(weights) - 1
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            layer.weight = nn.Parameter(weight.clone())
            self.add_module(name, layer)
        for layer_number in range(1, self.depth + 1):
            self.add_module(f"h{layer_number}", nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to logits (B, T, V)."""
        parts = self._modules
        for name in ["h0", *(f"{kind}{i}" for i in range(1, self.depth + 1) for kind in "Wh"), "Wo"]:
            x = parts[name](x)  # type: ignore[misc]
        return x


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """The check that the outputs of the case ask for."""
    tensors = {name: torch.as_tensor(array) for name, array in case.inputs.items()}
    if case.has("in/direction", "in/x", "hp/alpha"):
        out = {
            "steered_normalised": steer(tensors["x"], tensors["direction"], mix=case.number("alpha")),
            "steered_plain": steer(tensors["x"], tensors["direction"]),
        }
        return _arrays(out)
    if not case.has("in/W1", "in/Wo", "in/x", "in/labels", "hp/alpha"):
        raise UnknownCase(case)
    weights = {name: t for name, t in sorted(tensors.items()) if name[0] == "W" and name[1:].isdigit()}
    weights["Wo"] = tensors["Wo"]
    if any(name.startswith(("A1_", "B1_", "cons_sum", "cons_mean")) for name in case.outputs):
        return _arrays(_lora(case, weights, tensors))
    if "kl" in case.outputs or any(name.startswith("perturbation_") or name == "cons" for name in case.outputs):
        return _arrays(_own(case, weights, tensors))
    raise UnknownCase(case)


def _lora(case: Case, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A separate LoRA, given with B other than 0, ascends on the same batch; layers h_1 ... h_K."""
    out: dict[str, Tensor] = {}
    targets = [name.removeprefix("A_") for name in tensors if name.startswith("A_")]
    rank = tensors[f"A_{targets[0]}"].shape[0]
    x, labels = tensors["x"], tensors["labels"]
    reductions: tuple[Reduction, ...] = ("sum", "mean")
    for reduction in reductions:
        net = _Net(weights)
        layers = [f"h{i}" for i in range(1, net.depth + 1)]
        aux = AuxiliaryLoRA(rank=rank, scale=case.number("lora_scale"), targets=targets)
        lfu = LfU(
            net,
            layers=layers,
            aux=aux,
            alpha=case.number("alpha"),
            strength=case.number("lam"),
            reduction=reduction,
        )
        aux.load({t: tensors[f"A_{t}"] for t in targets}, {t: tensors[f"B_{t}"] for t in targets})
        ascent = lfu.ascend(lambda model: _cross_entropy(model(x), labels))
        assert lfu.norm is not None
        out |= {"ascent_loss": ascent, "grad_norm": lfu.norm}
        for name, step in lfu.displacement().items():
            matrix, target = name.split(".", 1)
            out[f"{matrix}1_{target}"] = tensors[f"{matrix}_{target}"] + step
        out["loss_after_ascent"] = _cross_entropy(lfu.undesirable(x), labels)
        total, penalty, gradients = _step(lfu, net, x, labels)
        out |= {f"cons_{reduction}": penalty, f"total_{reduction}": total}
        out |= {f"grad_{reduction}_{name}": gradient for name, gradient in gradients.items()}
        out["sft"] = total - lfu.strength * penalty
    return out


def _own(case: Case, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All parameters ascend, on a batch of their own where there is one; layers h_0 ... h_K."""
    net = _Net(weights)
    x, labels = tensors["x"], tensors["labels"]
    x_asc, labels_asc = tensors.get("x_asc", x), tensors.get("labels_asc", labels)
    layers = [f"h{i}" for i in range(net.depth + 1)]
    lfu = LfU(net, layers=layers, alpha=case.number("alpha"), strength=case.number("lam", 1.0))
    ascent = lfu.ascend(lambda model: _cross_entropy(model(x_asc), labels_asc))
    assert lfu.norm is not None
    out = {"ascent_loss": ascent, "grad_norm": lfu.norm}
    out |= {f"perturbation_{name.split('.')[0]}": step for name, step in lfu.displacement().items()}
    out["kl"] = logit_consistency(net(x), lfu.undesirable(x), labels != -100)
    total, penalty, gradients = _step(lfu, net, x, labels)
    out |= {"cons": penalty, "total": total, "sft": total - lfu.strength * penalty}
    return out | {f"grad_{name}": gradient for name, gradient in gradients.items()}


def _step(lfu: LfU, net: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss with the penalty, the penalty, and the gradient of both."""
    with lfu.record(mask=labels != -100):
        loss = _cross_entropy(net(x), labels)
    loss.backward()
    penalty = lfu.backward()
    gradients = {
        n.split(".")[0]: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in net.named_parameters()
    }
    return loss.detach() + lfu.strength * penalty, penalty, gradients


def _arrays(out: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.detach().numpy() for name, tensor in out.items()}
