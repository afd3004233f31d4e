"""What the contract suite checks of Hestia."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.compression.hestia.layer import AnnealedWeight
from regularized.compression.hestia.schedule import Annealing
from regularized.compression.hestia.term import Hestia
from regularized.compression.hestia.traces import hessian_traces
from regularized.evidence.contract import (
    AnySubject,
    Classification,
    DiagnosticSubject,
    NotApplicable,
    Subject,
    plain,
)
from regularized.training.terms import CrossEntropy

TASK = Classification(features=8, hidden=(16,))


def _annealed() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "hestia": Hestia(group_size=-1, exclude=["2"])}


def _hessian() -> Mapping[str, nn.Module]:
    hestia = Hestia(
        annealing=Annealing(factor_on="progress"), factors={"0": 0.7, "2": 0.9}, codebook="quaternary", group_size=8
    )
    return {"task": CrossEntropy(), "hestia": hestia}


def _part() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    weight = AnnealedWeight(group_size=-1)
    weight.set(pressure=0.5, temperature=0.3)
    return weight, (torch.randn(5, 7, requires_grad=True),)


def _report(model: nn.Module) -> Mapping[str, Tensor]:
    batch = TASK.data(16, 0)

    def loss(network: nn.Module, _: None) -> Tensor:
        device = next(network.parameters()).device
        return nn.functional.cross_entropy(network(batch["inputs"].to(device)), batch["targets"].to(device))

    return {name: torch.tensor(trace) for name, trace in hessian_traces(model, loss, [None], queries=4).items()}


def subjects() -> list[AnySubject]:
    """Ternary without the Hessian, four levels with factors, and the traces themselves."""
    no_off = NotApplicable("a weight of few values has no strength that could be zero")
    build = partial(Subject, model=TASK.model, plain=plain, data=TASK.data, off=no_off, part=_part)
    return [
        build("annealed", terms=_annealed),
        build("hessian", terms=_hessian),
        DiagnosticSubject("traces", TASK.model, _report),
    ]
