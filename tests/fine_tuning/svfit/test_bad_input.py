"""Bad inputs of `svfit`: each is answered by what was given, what is allowed, and how to mend it."""

from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused
from tests.fine_tuning.svfit.quantised import Int8Linear
from torch import Tensor, nn

from regularized.fine_tuning.svfit.files import load_svfit_state_dict, svfit_state_dict
from regularized.fine_tuning.svfit.layer import SingularValueShift, SVFitLayer, svfit_rank
from regularized.fine_tuning.svfit.model import inject_svfit, svfit_param_groups
from regularized.fine_tuning.svfit.term import SVFit
from regularized.papers.svfit.contract import TASK


class _Padded(nn.Conv2d):
    def forward(self, x: Tensor):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def _twice():
    model = TASK.model()
    inject_svfit(model)
    inject_svfit(model)


def _other_weight():
    model = TASK.model()
    inject_svfit(model)
    load_svfit_state_dict(TASK.model(), svfit_state_dict(model))


def _equal_values():
    layer = nn.Linear(4, 4)
    nn.init.eye_(layer.weight)
    model = nn.Sequential(layer)
    inject_svfit(model, rank=2)
    svfit_state_dict(model)


def _groups(decay: str, **settings: float):
    model = TASK.model()
    inject_svfit(model, decay=decay)
    svfit_param_groups(model, **settings)


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    quantised = Int8Linear(nn.Linear(6, 4))
    values = torch.tensor([3.0, 2.0, 1.0])
    return [
        refused(
            "r not int or full",
            partial(inject_svfit, TASK.model(), rank=2.5),
            ValueError,
            ("rank must be an int", '"full"', "2.5"),
        ),
        refused("r < 1", partial(inject_svfit, TASK.model(), rank=0), ValueError, ("at least 1", "got 0")),
        refused(
            "r > min(o, i)", partial(inject_svfit, TASK.model(), rank=5), ValueError, ("'2'", "at most 4", "got 5")
        ),
        refused("energy", partial(svfit_rank, values, energy=0.0), ValueError, ("energy must be in (0, 1]", "0.0")),
        refused("nuclear", partial(svfit_rank, values, nuclear=1.5), ValueError, ("nuclear must be in (0, 1]", "1.5")),
        refused("rank and energy", partial(svfit_rank, values, 2, energy=0.9), ValueError, ("one of", "rank", "0.9")),
        refused(
            "not 2-D",
            lambda: SingularValueShift.of(torch.randn(4, 3, 2)),
            ValueError,
            ("(4, 3, 2)", "reshape=True"),
        ),
        refused("decay on sigma", partial(_groups, "sigma", weight_decay=0.1), UserWarning, ("0.1", "decay='shift'")),
        refused("lr < 1e-4", partial(_groups, "shift", lr=3e-5), UserWarning, ("barely moves", "3e-05", "1e-2")),
        refused("another W", _other_weight, ValueError, ("'0'", "fingerprint", "same base model")),
        refused("equal values at the cut", _equal_values, ValueError, ("nearly equal", "gap 0", "basis")),
        refused(
            "quantised, no dequantised weight",
            partial(SVFitLayer.of, quantised),
            TypeError,
            ("quantized", "int8"),
        ),
        refused(
            "quantised, sigma",
            lambda: SVFitLayer.of(quantised, decay="sigma", weight=quantised.dequantised()),
            ValueError,
            ("quantised", "decay='shift'"),
        ),
        refused("injected twice", _twice, ValueError, ("adapted already", "merge_svfit")),
        refused(
            "another forward pass",
            lambda: SVFitLayer.of(_Padded(3, 4, 3)),
            ValueError,
            ("_Padded", "forward pass of its own"),
        ),
        refused("groups", lambda: SVFitLayer.of(nn.Conv2d(4, 4, 3, groups=2)), ValueError, ("groups=2",)),
        refused("another layer", lambda: SVFitLayer.of(nn.Embedding(4, 4)), TypeError, ("Embedding", "nn.Linear")),
        refused(
            "no such module",
            partial(inject_svfit, TASK.model(), target_modules=["q_prj"]),
            ValueError,
            ("q_prj", "there are"),
        ),
        refused(
            "not finite",
            lambda: SingularValueShift.of(torch.full((3, 2), float("nan"))),
            ValueError,
            ("NaN or infinite",),
        ),
        refused("unknown decay", lambda: SVFit(decay="delta"), ValueError, ("'shift' or 'sigma'", "'delta'")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
