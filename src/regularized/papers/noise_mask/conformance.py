"""Golden vectors of the noise mask: one official training step with a stub extractor and a given draw."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.conformance import Case, UnknownCase
from regularized.overfitting.noise_mask.layer import BetaMaskPolicy, NoiseMask
from regularized.overfitting.noise_mask.loss import beta_log_density, noise_mask_objective

TOLERANCE = 1e-8


class _Extractor(nn.Module):
    """The stub that stands for the ResNet: tanh of a linear layer on the pixels."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.l = nn.Linear(width, features)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.l(images.flatten(1)))


_OFFICIAL = {"alpha": "alpha_head", "beta": "beta_head", "fe": "backbone"}


def _ours(name: str) -> str:
    first, rest = name.split(".", 1)
    return f"{_OFFICIAL[first]}.{rest}"


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Concentrations, mask, loss, both gradients, running state and batch statistics of one step."""
    if not case.has("in/x", "in/y", "in/sampled_mask", "in/policy/fe.l.weight", "hp/grid"):
        raise UnknownCase(case)
    features, width = case.inputs["policy/fe.l.weight"].shape
    policy = BetaMaskPolicy(
        _Extractor(width, features),
        features=features,
        grid=int(case.number("grid")),
        decay=case.number("decay", 0.9),
        momentum=case.number("ema", 0.99),
        twice=True,
    ).double()
    state = {
        _ours(name.removeprefix("policy/")): torch.as_tensor(value)
        for name, value in case.inputs.items()
        if name.startswith("policy/")
    }
    state |= {name: torch.as_tensor(case.inputs[name]) for name in ("base_alpha", "base_beta")}
    policy.load_state_dict(state)
    weight = torch.as_tensor(case.inputs["classifier/1.weight"])
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0])).double()
    classifier.load_state_dict(
        {
            name.removeprefix("classifier/"): torch.as_tensor(v)
            for name, v in case.inputs.items()
            if "classifier/" in name
        }
    )
    images, labels = torch.as_tensor(case.inputs["x"]), torch.as_tensor(case.inputs["y"])
    cells = torch.as_tensor(case.inputs["sampled_mask"])

    # The concentrations from a copy, since a pass in training mode moves the running state.
    twin = BetaMaskPolicy(
        policy.backbone, features=features, grid=policy.grid, decay=policy.decay, momentum=policy.momentum
    ).double()
    twin.load_state_dict(state)
    alpha, beta = twin(images)

    noise_mask = NoiseMask(policy, kernel=int(case.number("kernel")), sigma=case.number("sigma"))
    masked = noise_mask(images, cells=cells)
    logits = classifier(masked.images)
    ce = F.cross_entropy(logits, labels)
    loss = noise_mask_objective(ce, masked.log_density)
    loss.backward()
    out = {
        "concentration1": alpha.exp(),
        "concentration0": beta.exp(),
        "log_prob": beta_log_density(cells, alpha, beta),
        "mask_applied": masked.mask,
        "logits": logits,
        "ce": ce,
        "mean_log_sum_density": masked.log_density.mean(),
        "loss": loss,
        "new_base_alpha": policy.base_alpha,
        "new_base_beta": policy.base_beta,
    }
    theirs = {ours: official for official, ours in _OFFICIAL.items()}
    for name, parameter in policy.named_parameters():
        first, rest = name.split(".", 1)
        assert parameter.grad is not None
        out[f"grad_policy/{theirs[first]}.{rest}"] = parameter.grad
    for name, buffer in policy.named_buffers():
        if "." in name:
            first, rest = name.split(".", 1)
            out[f"buffer_policy/{theirs[first]}.{rest}"] = buffer
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is not None
        out[f"grad_classifier/{name}"] = parameter.grad
    return {name: tensor.detach().numpy() for name, tensor in out.items()}
