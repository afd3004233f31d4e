"""What the contract suite checks of SVFit."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, Classification, NotApplicable, Subject, plain
from regularized.fine_tuning.svfit.files import load_svfit_state_dict, svfit_state_dict
from regularized.fine_tuning.svfit.layer import SingularValueShift, SVFitLayer, svfit_rank
from regularized.fine_tuning.svfit.model import inject_svfit, svfit_param_groups
from regularized.fine_tuning.svfit.product import shifted_weight
from regularized.fine_tuning.svfit.term import SVFit
from regularized.training.terms import CrossEntropy

TASK = Classification()


def _full() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "svfit": SVFit()}


def _few() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "svfit": SVFit(rank=2, target_modules=["0"], also_train=["2"], decay="sigma")}


def _part() -> tuple[object, tuple[Tensor, ...]]:
    left, right = torch.linalg.qr(torch.randn(5, 3))[0], torch.linalg.qr(torch.randn(7, 3))[0].T.contiguous()
    return shifted_weight, (torch.randn(5, 7), left, torch.randn(3, requires_grad=True), right)


def _layer_part() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SVFitLayer.of(nn.Linear(7, 5)), (torch.randn(50, 7, requires_grad=True),)


def subjects() -> list[Subject]:
    """All directions of every layer; and a few of one, in the paper's form, beside a head that is trained whole."""
    no_off = NotApplicable("surgery has no coefficient: without it the weights themselves are trained")
    return [
        Subject("full", TASK.model, _full, plain, TASK.data, off=no_off, part=_part),  # type: ignore[arg-type]
        Subject("rank 2, sigma, head", TASK.model, _few, plain, TASK.data, off=no_off, part=_layer_part),
    ]


class Int8Linear(nn.Linear):
    """A quantised layer as other libraries make them: an integer weight, and a forward pass of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.scale = float(layer.weight.detach().abs().max()) / 127
        codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def dequantised(self) -> Tensor:
        """(o, i) float32."""
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        return nn.functional.linear(x, self.dequantised(), self.bias)


class _Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def _twice() -> None:
    model = TASK.model()
    inject_svfit(model)
    inject_svfit(model)


def _other_weight() -> None:
    model = TASK.model()
    inject_svfit(model)
    load_svfit_state_dict(TASK.model(), svfit_state_dict(model))


def _equal_values() -> None:
    layer = nn.Linear(4, 4)
    nn.init.eye_(layer.weight)
    model = nn.Sequential(layer)
    inject_svfit(model, rank=2)
    svfit_state_dict(model)


def _groups(decay: str, **settings: float) -> None:
    model = TASK.model()
    inject_svfit(model, decay=decay)  # type: ignore[arg-type]
    svfit_param_groups(model, **settings)


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    quantised = Int8Linear(nn.Linear(6, 4))
    values = torch.tensor([3.0, 2.0, 1.0])
    return [
        BadInput(
            "r not int or full",
            partial(inject_svfit, TASK.model(), rank=2.5),  # type: ignore[arg-type]
            ValueError,
            ("rank must be an int", '"full"', "2.5"),
        ),
        BadInput("r < 1", partial(inject_svfit, TASK.model(), rank=0), ValueError, ("at least 1", "got 0")),
        BadInput(
            "r > min(o, i)", partial(inject_svfit, TASK.model(), rank=5), ValueError, ("'2'", "at most 4", "got 5")
        ),
        BadInput("energy", partial(svfit_rank, values, energy=0.0), ValueError, ("energy must be in (0, 1]", "0.0")),
        BadInput("nuclear", partial(svfit_rank, values, nuclear=1.5), ValueError, ("nuclear must be in (0, 1]", "1.5")),
        BadInput("rank and energy", partial(svfit_rank, values, 2, energy=0.9), ValueError, ("one of", "rank", "0.9")),
        BadInput(
            "not 2-D",
            lambda: SingularValueShift.of(torch.randn(4, 3, 2)),
            ValueError,
            ("(4, 3, 2)", "reshape=True"),
        ),
        BadInput("decay on sigma", partial(_groups, "sigma", weight_decay=0.1), UserWarning, ("0.1", "decay='shift'")),
        BadInput("lr < 1e-4", partial(_groups, "shift", lr=3e-5), UserWarning, ("barely moves", "3e-05", "1e-2")),
        BadInput("another W", _other_weight, ValueError, ("'0'", "fingerprint", "same base model")),
        BadInput("equal values at the cut", _equal_values, ValueError, ("nearly equal", "gap 0", "basis")),
        BadInput(
            "quantised, no dequantised weight",
            partial(SVFitLayer.of, quantised),
            TypeError,
            ("quantized", "int8"),
        ),
        BadInput(
            "quantised, sigma",
            lambda: SVFitLayer.of(quantised, decay="sigma", weight=quantised.dequantised()),
            ValueError,
            ("quantised", "decay='shift'"),
        ),
        BadInput("injected twice", _twice, ValueError, ("adapted already", "merge_svfit")),
        BadInput(
            "another forward pass",
            lambda: SVFitLayer.of(_Padded(3, 4, 3)),
            ValueError,
            ("_Padded", "forward pass of its own"),
        ),
        BadInput("groups", lambda: SVFitLayer.of(nn.Conv2d(4, 4, 3, groups=2)), ValueError, ("groups=2",)),
        BadInput("another layer", lambda: SVFitLayer.of(nn.Embedding(4, 4)), TypeError, ("Embedding", "nn.Linear")),
        BadInput(
            "no such module",
            partial(inject_svfit, TASK.model(), target_modules=["q_prj"]),
            ValueError,
            ("q_prj", "there are"),
        ),
        BadInput(
            "not finite",
            lambda: SingularValueShift.of(torch.full((3, 2), float("nan"))),
            ValueError,
            ("NaN or infinite",),
        ),
        BadInput("unknown decay", lambda: SVFit(decay="delta"), ValueError, ("'shift' or 'sigma'", "'delta'")),  # type: ignore[arg-type]
    ]
