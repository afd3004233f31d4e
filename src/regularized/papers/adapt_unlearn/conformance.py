"""Golden vectors of adapt-then-unlearn: distances, repulsions, Fisher information, anchor and GAN losses."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.unlearning.adapt_unlearn.fisher import generator_fisher
from regularized.unlearning.adapt_unlearn.loss import discriminator_loss, generator_loss
from regularized.unlearning.adapt_unlearn.penalty import Kind, repel
from regularized.unlearning.adapt_unlearn.term import ElasticAnchor, Repulsion

TOLERANCE = 1e-12

Arrays = Mapping[str, NDArray[Any]]


def tolerance(case: Case, output: str) -> float:
    """The exponential amplifies rounding of its argument."""
    del case
    return 1e-10 if "exp" in output or "EL2" in output else TOLERANCE


class Parameters(nn.Module):
    """Tensors under their dotted names."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(value))


class Convolutions(Parameters):
    """The toy generator: linear layers ``convs.i`` with tanh between them."""

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, d) to samples."""
        named = dict(self.named_parameters())
        count = sum(name.endswith(".weight") for name in named)
        for number in range(count):
            z = z.tanh() if number else z
            z = nn.functional.linear(z, named[f"convs.{number}.weight"], named.get(f"convs.{number}.bias"))
        return z


class Critic(nn.Module):
    """``D(x) = tanh(x) w``."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        """Samples to scores."""
        return x.tanh() @ self.w


def compute(case: Case) -> Arrays:
    """What a case's keys ask for."""
    if case.has("in/real", "in/fake"):
        real, fake = _tensor(case, "real"), _tensor(case, "fake")
        return {
            "d_logistic": discriminator_loss(real, fake).numpy(),
            "g_nonsaturating": generator_loss(fake).numpy(),
        }
    if case.has("in/z", "in/w"):
        return _anchored(case)
    if _group(case, "theta") and _group(case, "negative0"):
        return _repelled(case)
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(case.inputs[name])


def _group(case: Case, prefix: str) -> dict[str, Tensor]:
    names = [name for name in case.inputs if name.startswith(f"{prefix}/")]
    return {name.removeprefix(f"{prefix}/"): _tensor(case, name) for name in names}


def _anchored(case: Case) -> Arrays:
    generator = Convolutions(_group(case, "anchor"))
    fisher = generator_fisher(generator, Critic(_tensor(case, "w")), _tensor(case, "z"))
    out = {f"fisher/{name}": value.numpy() for name, value in fisher.items()}
    theta = _group(case, "theta")
    if theta:
        anchor = ElasticAnchor(fisher, weight=1.0)
        anchor.attach(generator)
        generator.load_state_dict(theta)
        value = case.number("lambda", 1.0) * anchor.value()
        out["ewc_loss"] = value.detach().numpy()
    return out


def _repelled(case: Case) -> Arrays:
    theta = Parameters(_group(case, "theta"))
    count = len({name.split("/")[0] for name in case.inputs if name.startswith("negative")})
    negatives = [_group(case, f"negative{k}") for k in range(count)]
    gamma = case.number("gamma", 1.0)

    official = Repulsion(negatives, distance="official")
    official.attach(theta)
    v = official.squared_distance()
    v.backward()
    out = {f"grad/{name}": p.grad.numpy() for name, p in theta.named_parameters() if p.grad is not None}
    v = v.detach()
    out |= {
        "distance_official": v.numpy(),
        # The code's factors: gamma stands inside the exponential, whose weight is fixed at 100.
        "official_exp": (100.0 * repel(v, "exponential", alpha=gamma)).numpy(),
        "official_reci": (gamma * repel(v, "inverse")).numpy(),
        "official_l2": (gamma * repel(v, "negative_square")).numpy(),
    }

    each = []
    for negative in negatives:
        one = Repulsion([negative], distance="sum")
        one.attach(theta)
        each.append(one.squared_distance().item())
    out["sq_distance_each"] = np.array(each)
    whole = Repulsion(negatives, distance="sum")
    whole.attach(theta)
    d2 = whole.squared_distance().detach()
    kinds: dict[str, Kind] = {"EL2": "exponential", "IL2": "inverse", "NL2": "negative_square"}
    for short, kind in kinds.items():
        out[f"paper_{short}"] = repel(d2, kind).numpy()
    # The exponential's alpha stands in the name of its output.
    for name in case.outputs:
        if found := re.fullmatch(r"paper_EL2_alpha(.+)", name):
            out[name] = repel(d2, "exponential", alpha=float(found[1])).numpy()
    return out
