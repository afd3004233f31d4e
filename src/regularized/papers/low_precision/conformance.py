"""Golden vectors of the number formats: ml_dtypes, microxcaling, torchao, and definitions in NumPy."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.compression.low_precision.blocks import MX, NVFP4, Scaled, ScaleRule
from regularized.compression.low_precision.elements import Element, FixedPoint, FloatFormat, element
from regularized.compression.low_precision.hadamard import hadamard
from regularized.compression.low_precision.rounding import Overflow, Rounding, drop_bits, round_to_integers
from regularized.evidence.conformance import Case, UnknownCase

TOLERANCE = 0.0

Outputs = Mapping[str, NDArray[Any]]

_ROUNDINGS: Mapping[str, Rounding] = {
    "even": "nearest_even",
    "nearest_even": "nearest_even",
    "nearest": "nearest_away",  # microxcaling's name
    "nearest_away": "nearest_away",
    "floor": "toward_zero",  # microxcaling's name
    "toward_zero": "toward_zero",
}


def tolerance(case: Case, output: str) -> float:
    """Exact, but where the sheet allows rounding of the arithmetic."""
    kind = case.text("kind")
    if kind == "hadamard" or (kind == "int_sym" and output in ("scale", "dq")):
        return 1e-12
    return 2.0**-23 if kind == "nvfp4" else TOLERANCE


def compute(case: Case) -> Outputs:
    """What the case's ``hp/kind`` asks for."""
    kinds = {
        "cast": _cast,
        "cast_edges": _cast_edges,
        "mx_fakequant": _mx,
        "mx_torchao": _mx,
        "int_sym": _int_sym,
        "fixed_point": _fixed_point,
        "stochastic_round_grid": _stochastic_grid,
        "stochastic_round_bf16": _stochastic_bf16,
        "hadamard": _hadamard,
        "nvfp4": _nvfp4,
        "nvfp4_torchao": _nvfp4_torchao,
    }
    kind = case.text("kind")
    if kind not in kinds:
        raise UnknownCase(case)
    return {name: tensor.numpy() for name, tensor in kinds[kind](case).items()}


def _x(case: Case) -> Tensor:
    return torch.tensor(case.inputs["x"])


def _rounding(case: Case) -> Rounding:
    return _ROUNDINGS[case.text("round", "even")]


def _short(name: str) -> str:
    """``e4m3`` of ``fp8_e4m3``; ``int8`` stays."""
    return name.rpartition("_")[2]


def _cast(case: Case) -> Mapping[str, Tensor]:
    form = element(case.text("format"))
    out = {"cast": form.quantize(_x(case), rounding=_rounding(case))}
    if form.bits <= 16:
        codes = torch.arange(1 << int(form.bits))
        out["decode"] = form.values(codes)
    return out


def _cast_edges(case: Case) -> Mapping[str, Tensor]:
    """What overflows becomes infinite where there is an infinity, else NaN; torch saturates E4M3FN whatever comes."""
    form = element(case.text("format"))
    rule: Overflow = "saturate"
    if isinstance(form, FloatFormat) and form.nans != "none":
        rule = "inf" if form.has_infinity else "nan"
    in_torch: Overflow = "saturate" if form.name == "float8_e4m3fn" else rule
    x = _x(case)
    return {"torch": form.quantize(x, overflow=in_torch), "ml_dtypes": form.quantize(x, overflow=rule)}


def _mx(case: Case) -> Mapping[str, Tensor]:
    rule = cast(ScaleRule, case.text("scale", "floor"))
    form = MX(_short(case.text("format")), block=int(case.number("block", 32)), scale=rule)
    axis = int(case.number("axis", -1))
    values = form.quantize(_x(case), axis=axis, rounding=_rounding(case))
    out = {"y": values, "dq": values}
    if case.has("out/scale_e8m0"):
        scales = form.encode(_x(case), axis=axis, pad=True).scales[0]
        out["scale_e8m0"] = scales.reshape(case.outputs["scale_e8m0"].shape)
    return out


def _int_sym(case: Case) -> Mapping[str, Tensor]:
    bits, granularity = int(case.number("bits")), case.text("granularity", "tensor")
    shares = int(granularity) if granularity.isdecimal() else granularity
    if granularity == "block":
        shares = int(case.number("block"))
    form = Scaled(FixedPoint(bits, symmetric=True), cast(Any, shares))
    encoded = form.encode(_x(case), pad=True)
    (scale,) = encoded.scales
    return {
        "q": _signed(encoded.codes, form.elements),
        "scale": scale.reshape(case.outputs["scale"].shape) if case.has("out/scale") else scale,
        "dq": form.quantize(_x(case)),
    }


def _signed(codes: Tensor, form: Element) -> Tensor:
    return form.values(codes).to(torch.int8 if form.bits <= 8 else torch.int32)


def _fixed_point(case: Case) -> Mapping[str, Tensor]:
    form = FixedPoint(int(case.number("wl")), int(case.number("fl")))
    return {"y": form.quantize(_x(case), rounding=_rounding(case))}


def _stochastic_grid(case: Case) -> Mapping[str, Tensor]:
    step = 2.0 ** -case.number("fl")
    y = step * round_to_integers(_x(case) / step, "stochastic", uniforms=torch.tensor(case.inputs["u"]))
    if case.has("hp/wl"):
        form = FixedPoint(int(case.number("wl")), int(case.number("fl")))
        y = y.clamp(form.lowest, form.largest)
    return {"y": y}


def _stochastic_bf16(case: Case) -> Mapping[str, Tensor]:
    draws = torch.tensor(case.inputs["rand16"].astype(np.int32))
    return {"y": drop_bits(_x(case), 16, "stochastic", random_bits=draws)}


def _hadamard(case: Case) -> Mapping[str, Tensor]:
    return {"y": hadamard(_x(case), block=int(case.number("n")))}


def _nvfp4(case: Case) -> Mapping[str, Tensor]:
    x, form = _x(case), NVFP4(block=int(case.number("block", 16)))
    codes, (blocks, g) = form.encode(x, pad=True)
    return {
        "global_scale": g,
        "block_scale": element("e4m3").values(blocks).squeeze(-1),
        "codes": form.elements.values(codes).unflatten(-1, (-1, form.block)),
        "dq": form.quantize(x),
    }


def _nvfp4_torchao(case: Case) -> Mapping[str, Tensor]:
    """Without a scale for the tensor torchao has one level, which is a scale of 1."""
    form = NVFP4(scale_min="normal", global_scale=case.number("per_tensor_scale", 1.0))
    blocks = form.encode(_x(case), pad=True).scales[0]
    return {"dq": form.quantize(_x(case)), "block_scale": element("e4m3").values(blocks).squeeze(-1)}
