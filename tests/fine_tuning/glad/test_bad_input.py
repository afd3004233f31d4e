"""Bad inputs of `glad`: each is answered by what was given, what is allowed, and how to mend it."""

from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor, nn

from regularized.fine_tuning.glad.classifier import FewShotClassifier
from regularized.fine_tuning.glad.loss import few_shot_loss
from regularized.fine_tuning.glad.optimizer import GLAD, steer
from regularized.fine_tuning.glad.peft import add_lora


def _optimizer(**settings: Any):
    return GLAD(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), **settings)


def _frozen():
    model = nn.Linear(2, 2).requires_grad_(False)
    GLAD(torch.optim.SGD(model.parameters(), lr=0.1))


def _scaled_gradients():
    optimizer = _optimizer()
    scaler = torch.amp.GradScaler("cpu")
    (parameter,) = optimizer.param_groups[0]["params"]

    def closure():
        loss: Tensor = parameter.square().sum()
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure)


class _TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(4.6))


def _plain_state():
    optimizer = _optimizer()
    optimizer.load_state_dict(optimizer.base.state_dict())


def bad_inputs():
    """Every line of the sheet's "bad input", and what else can be got wrong."""
    g = [torch.ones(2)]
    return [
        refused("rho < 0", lambda: _optimizer(rho=-0.1), ValueError, ("rho must be >= 0", "-0.1")),
        refused("lam > 1, interpolate", lambda: _optimizer(lam=1.5), ValueError, ("[0, 1]", "1.5", "SAM")),
        refused("lam < 0, steer", lambda: steer(g, g, mode="steer", lam=-1.0), ValueError, (">= 0", "-1.0")),
        refused(
            "unknown combine",
            lambda: _optimizer(combine="rotate"),
            ValueError,
            ("'rotate'", "'interpolate'", "'project'", "'steer'"),
        ),
        refused("every = 0", lambda: _optimizer(every=0), ValueError, ("every must be at least 1", "0")),
        refused(
            "step() without closure",
            lambda: _optimizer().step(),
            RuntimeError,
            ("two gradients", "optimizer.step(closure)", "optimizer.backward(closure)"),
        ),
        refused(
            "closure without backward",
            lambda: _optimizer().step(lambda: torch.zeros(())),
            RuntimeError,
            ("no gradient", "loss.backward()"),
        ),
        refused("gradients still scaled", _scaled_gradients, RuntimeError, ("'scaler'", "still scaled", "unscale_")),
        refused("no trainable parameter", _frozen, ValueError, ("requires a gradient", "add_lora")),
        refused(
            "label outside the class list",
            lambda: few_shot_loss(torch.zeros(2, 3), torch.tensor([0, 3])),
            ValueError,
            ("[0, 3)", "0 to 3", "descriptions"),
        ),
        refused(
            "trainable logit scale",
            lambda: FewShotClassifier(_TwoTowers(), torch.zeros(2, 3, dtype=torch.long)),
            UserWarning,
            ("logit_scale", "over-confident", "requires_grad_(False)"),
        ),
        refused(
            "descriptions in one row",
            lambda: FewShotClassifier(nn.Identity(), torch.zeros(3, dtype=torch.long)),
            ValueError,
            ("(C, L)", "(3,)"),
        ),
        refused("unknown towers", lambda: add_lora(_TwoTowers(), towers="all"), ValueError, ("'both'", "'all'")),
        refused(
            "a class instead of an optimizer",
            lambda: GLAD(torch.optim.SGD),
            TypeError,
            ("GLAD(torch.optim.AdamW(",),
        ),
        refused("state of a plain optimizer", _plain_state, ValueError, ("plain optimizer", "optimizer.base")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)


def test_weights_in_shards(in_shards):
    """Fails when the ascent step would be normed over the shards of one process."""
    model = in_shards(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weights of the optimizer are in shards"):
        GLAD(torch.optim.SGD(model.parameters(), lr=0.1))
