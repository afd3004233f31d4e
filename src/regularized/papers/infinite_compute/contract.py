"""What the contract suite checks of the recipe: members that are trained together, and one alone."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from regularized.evidence.contract import ProcedureSubject
from regularized.evidence.models import mlp, seeded
from regularized.overfitting.infinite_compute.procedure import EnsembleTraining
from regularized.training.data import TensorData


def _build(members: int, decay: float = 1.6) -> EnsembleTraining:
    return EnsembleTraining(
        [seeded(number, mlp, [6, 16, 3]) for number in range(members)],
        optimizer=partial(torch.optim.AdamW, lr=0.02, betas=(0.9, 0.95)),
        weight_decay=decay,
    )


def _train(training: EnsembleTraining, epochs: int) -> None:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 6, generator=draws), torch.randint(3, (24,), generator=draws)
    training.fit(TensorData(x, y, batch_size=8), epochs=training.epoch + epochs)


def _weights(training: EnsembleTraining) -> Mapping[str, Tensor]:
    return training.models.state_dict()


def subjects() -> list[ProcedureSubject]:
    """Plain is the same at the standard decay."""
    return [
        ProcedureSubject(name, partial(_build, members), partial(_build, members, decay=0.1), _train, _weights)
        for name, members in (("four members", 4), ("one model", 1))
    ]
