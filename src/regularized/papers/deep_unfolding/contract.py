"""What the contract suite checks of unfolded algorithms: the objective as a term, incremental training, bad inputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, ProcedureSubject, Subject
from regularized.scientific.deep_unfolding.layer import (
    RecoveryObjective,
    SparseObjective,
    UnfoldedIHT,
    UnfoldedISTA,
    hard_threshold,
    soft_threshold,
)
from regularized.scientific.deep_unfolding.procedure import BernoulliGaussian, IncrementalTraining
from regularized.training.terms import Loss


def _matrix() -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) / 6**0.5


def _data(n: int, seed: int) -> Mapping[str, Tensor]:
    x, y = BernoulliGaussian(_matrix(), density=0.3, seed=seed)(n)
    return {"inputs": y, "targets": x, "index": torch.arange(n)}


def _ista() -> nn.Module:
    return UnfoldedISTA(_matrix(), 0.1, layers=4)


def _iht() -> nn.Module:
    return UnfoldedIHT(_matrix(), 0.05, layers=4)


def _supervised() -> Mapping[str, nn.Module]:
    return {"recovery": Loss(_squared_error)}


def _squared_error(output: Tensor, x: Tensor) -> Tensor:
    return (output - x).square().mean(dim=-1)


def _unsupervised(norm: Any, penalty: float) -> Mapping[str, nn.Module]:
    return {"objective": RecoveryObjective(SparseObjective(_matrix(), penalty, norm=norm))}


def _off(norm: Any, penalty: float) -> Mapping[str, nn.Module]:
    return {**_supervised(), "objective": RecoveryObjective(SparseObjective(_matrix(), penalty, norm=norm), weight=0.0)}


def _soft() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return soft_threshold, (torch.randn(5, 4, requires_grad=True), torch.tensor(0.3, requires_grad=True))


def _hard() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return hard_threshold, (torch.randn(5, 4, requires_grad=True), torch.tensor(0.3))


def _build(network: Callable[[], nn.Module], supervised: bool, **options: Any) -> IncrementalTraining:
    net = cast(UnfoldedISTA, network())
    norm: Any = "l1" if isinstance(net, UnfoldedISTA) else "l0"
    return IncrementalTraining(
        net,
        BernoulliGaussian(_matrix(), density=0.3, seed=1),
        loss="supervised" if supervised else SparseObjective(_matrix(), net.penalty, norm=norm),
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


def _no_signals(size: int) -> tuple[None, Tensor]:
    return None, torch.randn(size, 6)


def _loaded(steps: Tensor) -> None:
    network = UnfoldedISTA(_matrix(), 0.1, layers=2)
    network.load_state_dict({**network.state_dict(), "steps": steps})


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    matrix = _matrix()
    network = UnfoldedISTA(matrix, 0.1, layers=2)
    sampler = BernoulliGaussian(matrix)
    return [
        BadInput("lam <= 0", lambda: UnfoldedISTA(matrix, 0.0, layers=2), ValueError, ("penalty (lambda)", "> 0")),
        BadInput("lam is nan", lambda: SparseObjective(matrix, float("nan")), ValueError, ("penalty (lambda)", "nan")),
        BadInput(
            "step <= 0 after loading",
            lambda: _loaded(torch.tensor([0.1, -0.2])),
            ValueError,
            ("step sizes must be positive", "-0.2"),
        ),
        BadInput("A not 2-D", lambda: UnfoldedIHT(matrix[0], 0.1, layers=2), ValueError, ("shape (10,)",)),
        BadInput("y of another length", lambda: network(torch.randn(6, 3)), ValueError, ("(B, 6)", "(6, 3)", "a row")),
        BadInput(
            "supervised without targets",
            lambda: IncrementalTraining(network, _no_signals).fit(),
            ValueError,
            ("supervised", "true signals"),
        ),
        BadInput(
            "objective of another problem",
            lambda: IncrementalTraining(network, sampler, loss=SparseObjective(matrix, 0.2)),
            UserWarning,
            ("another matrix, penalty or norm",),
        ),
        BadInput(
            "complex A",
            lambda: UnfoldedISTA(torch.complex(matrix, matrix), 0.1, layers=2),
            ValueError,
            ("complex", "stack real and imaginary"),
        ),
        BadInput(
            "lambda so large that all is zero",
            lambda: IncrementalTraining(UnfoldedISTA(matrix, 1e3, layers=1), sampler, steps_per_layer=1).fit(),
            UserWarning,
            ("all zero", "too large"),
        ),
        BadInput(
            "unknown loss",
            lambda: IncrementalTraining(network, sampler, loss=cast(Any, "mse")),
            ValueError,
            ("'supervised'", "'mse'"),
        ),
        BadInput("unknown norm", lambda: SparseObjective(matrix, 0.1, norm=cast(Any, "l2")), ValueError, ("'l2'",)),
        BadInput(
            "free hard threshold",
            lambda: UnfoldedIHT(matrix, 0.1, layers=2, tie_threshold=False),
            ValueError,
            ("no gradient", "UnfoldedISTA"),
        ),
        BadInput("density 0", lambda: BernoulliGaussian(matrix, density=0.0), ValueError, ("density", "(0, 1]")),
        BadInput("no layers", lambda: UnfoldedISTA(matrix, 0.1, layers=0), ValueError, ("layers", "0")),
        BadInput("too deep", lambda: network(torch.randn(2, 6), depth=5), ValueError, ("1 ... 2", "5")),
    ]
