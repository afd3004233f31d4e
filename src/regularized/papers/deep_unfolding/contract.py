"""What the contract suite checks of unfolded algorithms: the objective as a term, and incremental training."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from regularized.evidence.contract import ProcedureSubject, Subject
from regularized.scientific.deep_unfolding.layer import UnfoldedIHT, UnfoldedISTA, hard_threshold, soft_threshold
from regularized.scientific.deep_unfolding.loss import SparseObjective
from regularized.scientific.deep_unfolding.procedure import BernoulliGaussian, IncrementalTraining
from regularized.scientific.deep_unfolding.term import RecoveryObjective
from regularized.training.terms import Loss


def measurements() -> Tensor:
    """A matrix of 6 measurements of 10 entries."""
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) / 6**0.5


def _data(n: int, seed: int) -> Mapping[str, Tensor]:
    x, y = BernoulliGaussian(measurements(), density=0.3, seed=seed)(n)
    return {"inputs": y, "targets": x, "index": torch.arange(n)}


def _ista() -> nn.Module:
    return UnfoldedISTA(measurements(), 0.1, layers=4)


def _iht() -> nn.Module:
    return UnfoldedIHT(measurements(), 0.05, layers=4)


def _supervised() -> Mapping[str, nn.Module]:
    return {"recovery": Loss(_squared_error)}


def _squared_error(output: Tensor, x: Tensor) -> Tensor:
    return (output - x).square().mean(dim=-1)


def _unsupervised(norm: Any, penalty: float) -> Mapping[str, nn.Module]:
    return {"objective": RecoveryObjective(SparseObjective(measurements(), penalty, norm=norm))}


def _off(norm: Any, penalty: float) -> Mapping[str, nn.Module]:
    return {
        **_supervised(),
        "objective": RecoveryObjective(SparseObjective(measurements(), penalty, norm=norm), weight=0.0),
    }


def _soft() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return soft_threshold, (torch.randn(5, 4, requires_grad=True), torch.tensor(0.3, requires_grad=True))


def _hard() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return hard_threshold, (torch.randn(5, 4, requires_grad=True), torch.tensor(0.3))


def _build(network: Callable[[], nn.Module], supervised: bool, **options: Any) -> IncrementalTraining:
    net = cast(UnfoldedISTA, network())
    norm: Any = "l1" if isinstance(net, UnfoldedISTA) else "l0"
    return IncrementalTraining(
        net,
        BernoulliGaussian(measurements(), density=0.3, seed=1),
        loss="supervised" if supervised else SparseObjective(measurements(), net.penalty, norm=norm),
        steps_per_layer=5,
        batch_size=8,
        **options,
    )


def _from_three_layers_on() -> IncrementalTraining:
    """What growing a network from its first layer must differ from."""
    training = _build(_ista, True)
    training.generation = 2
    return training


def _train(training: IncrementalTraining, epochs: int) -> None:
    training.fit(layers=training.generation + epochs)


def _weights(training: IncrementalTraining) -> Mapping[str, Tensor]:
    return dict(training.network.named_parameters())


def subjects() -> list[Subject | ProcedureSubject]:
    """The objective as a term on both networks, and incremental training in its forms."""
    sgd = partial(torch.optim.SGD, lr=0.01)
    terms = {
        "ISTA on the objective": (_ista, ("l1", 0.1), _soft),
        "IHT on the objective": (_iht, ("l0", 0.05), _hard),
    }
    return [
        *(
            Subject(name, model, partial(_unsupervised, *to), _supervised, _data, partial(_off, *to), part, sgd)
            for name, (model, to, part) in terms.items()
        ),
        ProcedureSubject("supervised ISTA", partial(_build, _ista, True), _from_three_layers_on, _train, _weights),
        ProcedureSubject(
            "unsupervised IHT", partial(_build, _iht, False), partial(_build, _iht, True), _train, _weights
        ),
        ProcedureSubject(
            "newest layer alone",
            partial(_build, _ista, False, freeze_prefix=True),
            partial(_build, _ista, False),
            _train,
            _weights,
        ),
    ]
