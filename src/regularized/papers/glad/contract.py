"""What the contract suite checks of GLAD."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.contract import ProcedureSubject
from regularized.fine_tuning.glad.optimizer import GLAD
from regularized.training.data import TensorData


class _Tuning:
    """A plain loop around the optimizer: model with dropout and batch normalisation, data, and what a user saves."""

    def __init__(self, **settings: Any) -> None:
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))
        base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = GLAD(base, model=self.model, **settings)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)

    def fit(self, epochs: int) -> None:
        """Train for some epochs on the same data."""
        generator = torch.Generator().manual_seed(0)
        data = TensorData(torch.randn(24, 6, generator=generator), torch.arange(24) % 3, batch_size=8, seed=1)
        for epoch in range(epochs):
            for batch in data.batches(epoch):

                def closure(x: Tensor = batch.inputs, y: Tensor | None = batch.targets) -> Tensor:
                    assert y is not None
                    loss = F.cross_entropy(self.model(x), y)
                    loss.backward()
                    return loss

                self.optimizer.step(closure)
                self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, schedule."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The same."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def _train(tuning: _Tuning, epochs: int) -> None:
    tuning.fit(epochs)


def _weights(tuning: _Tuning) -> Mapping[str, Tensor]:
    return tuning.model.state_dict()


def subjects() -> list[ProcedureSubject]:
    """The three readings, the last at every other step; a step uphill of no length is plain training.

    Far uphill and tensor by tensor, since near by the two gradients never point apart in so small a network.
    """
    settings: dict[str, dict[str, Any]] = {
        "interpolate": {"rho": 0.1},
        "project": {"rho": 2.0, "combine": "project", "per_tensor": True},
        "steer, every second step": {"rho": 0.1, "combine": "steer", "every": 2},
    }
    plain = partial(_Tuning, rho=0.0)
    return [
        ProcedureSubject(name, partial(_Tuning, **given), plain, _train, _weights) for name, given in settings.items()
    ]
