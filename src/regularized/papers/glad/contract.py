"""What the contract suite checks of GLAD."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.contract import BadInput, ProcedureSubject
from regularized.fine_tuning.glad.classifier import FewShotClassifier
from regularized.fine_tuning.glad.loss import few_shot_loss
from regularized.fine_tuning.glad.optimizer import GLAD, steer
from regularized.fine_tuning.glad.peft import add_lora
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


# -- bad input --------------------------------------------------------------------------------------


def _optimizer(**settings: Any) -> GLAD:
    return GLAD(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), **settings)


def _frozen() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    GLAD(torch.optim.SGD(model.parameters(), lr=0.1))


def _scaled_gradients() -> None:
    optimizer = _optimizer()
    scaler = torch.amp.GradScaler("cpu")
    (parameter,) = optimizer.param_groups[0]["params"]

    def closure() -> Tensor:
        loss: Tensor = parameter.square().sum()
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure)


class _TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(4.6))


def _plain_state() -> None:
    optimizer = _optimizer()
    optimizer.load_state_dict(optimizer.base.state_dict())


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input", and what else can be got wrong."""
    g = [torch.ones(2)]
    return [
        BadInput("rho < 0", lambda: _optimizer(rho=-0.1), ValueError, ("rho must be >= 0", "-0.1")),
        BadInput("lam > 1, interpolate", lambda: _optimizer(lam=1.5), ValueError, ("[0, 1]", "1.5", "SAM")),
        BadInput("lam < 0, steer", lambda: steer(g, g, mode="steer", lam=-1.0), ValueError, (">= 0", "-1.0")),
        BadInput(
            "unknown combine",
            lambda: _optimizer(combine="rotate"),
            ValueError,
            ("'rotate'", "'interpolate'", "'project'", "'steer'"),
        ),
        BadInput("every = 0", lambda: _optimizer(every=0), ValueError, ("every must be at least 1", "0")),
        BadInput(
            "step() without closure",
            lambda: _optimizer().step(),
            RuntimeError,
            ("two gradients", "optimizer.step(closure)", "optimizer.backward(closure)"),
        ),
        BadInput(
            "closure without backward",
            lambda: _optimizer().step(lambda: torch.zeros(())),
            RuntimeError,
            ("no gradient", "loss.backward()"),
        ),
        BadInput("gradients still scaled", _scaled_gradients, RuntimeError, ("'scaler'", "still scaled", "unscale_")),
        BadInput("no trainable parameter", _frozen, ValueError, ("requires a gradient", "add_lora")),
        BadInput(
            "label outside the class list",
            lambda: few_shot_loss(torch.zeros(2, 3), torch.tensor([0, 3])),
            ValueError,
            ("[0, 3)", "0 to 3", "descriptions"),
        ),
        BadInput(
            "trainable logit scale",
            lambda: FewShotClassifier(_TwoTowers(), torch.zeros(2, 3, dtype=torch.long)),
            UserWarning,
            ("logit_scale", "over-confident", "requires_grad_(False)"),
        ),
        BadInput(
            "descriptions in one row",
            lambda: FewShotClassifier(nn.Identity(), torch.zeros(3, dtype=torch.long)),
            ValueError,
            ("(C, L)", "(3,)"),
        ),
        BadInput(
            "unknown towers", lambda: add_lora(_TwoTowers(), towers=cast(Any, "all")), ValueError, ("'both'", "'all'")
        ),
        BadInput(
            "a class instead of an optimizer",
            lambda: GLAD(torch.optim.SGD),  # type: ignore[arg-type]
            TypeError,
            ("GLAD(torch.optim.AdamW(",),
        ),
        BadInput("state of a plain optimizer", _plain_state, ValueError, ("plain optimizer", "optimizer.base")),
    ]
