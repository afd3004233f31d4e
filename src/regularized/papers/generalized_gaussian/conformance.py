"""Golden vectors of the authors' repository for the generalised Gaussian priors."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regularized.compression.generalized_gaussian import (
    GeneralizedGaussian,
    code_length,
    moment_ratio,
    reshape_histogram,
    rf8,
    shrink_,
)
from regularized.evidence.conformance import Case, UnknownCase

TOLERANCE = 1e-12


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """A step of BackSlash, RF8, the table of ratios, scales of the initialisation, the code, or DeepShape."""
    kind = case.text("kind")
    if kind == "backslash_step" or case.has("hp/rdo"):
        return _backslash(case)
    if kind == "rf8":
        return {"w": rf8(_tensor(case, "w"), limit=int(case.number("n", 4))).numpy()}
    if kind == "rho_table":
        shapes = case.inputs["nu"]
        return {"rho": np.array([moment_ratio(float(shape)) for shape in shapes.ravel()]).reshape(shapes.shape)}
    if kind == "gg_init_scale":
        return {"table": _scales(case)}
    if kind.startswith("exp_golomb"):
        return _golomb(case)
    if kind == "deepshape":
        return _deepshape(case)
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> torch.Tensor:
    return torch.tensor(case.inputs[name], dtype=torch.float64)


def _backslash(case: Case) -> Mapping[str, NDArray[Any]]:
    names = sorted((n for n in case.inputs if n.startswith("param")), key=lambda n: int(n.removeprefix("param")))
    weights = {name: _tensor(case, name) for name in names}
    shape = case.number("shape") if "shape" in case.hp else None
    moments = shrink_(weights.values(), case.number("rdo"), eps=case.number("clip", 1.0), shape=shape)
    found = {"shape": moments.shape, "std": moments.std, "rho": moments.ratio}
    return {name: tensor.numpy() for name, tensor in {**weights, **found}.items()}


def _scales(case: Case) -> NDArray[Any]:
    """The scale of each row's shape, gain and fan; the rows stand in the expected table itself."""
    table = np.array(case.outputs["table"], dtype=np.float64)
    columns = case.text("columns", "nu,xi,n_dim,scale").split(",")
    shape, gain, fan = (table[:, columns.index(name)] for name in ("nu", "xi", "n_dim"))
    table[:, columns.index("scale")] = [
        GeneralizedGaussian.with_variance(float(nu), float(xi / n)).scale
        for nu, xi, n in zip(shape, gain, fan, strict=True)
    ]
    return table


def _golomb(case: Case) -> Mapping[str, NDArray[Any]]:
    named = re.search(r"\d+$", case.text("kind"))
    order = int(case.number("k", float(named[0]) if named else 0.0))
    length = code_length([_tensor(case, "w")], step=2.0 ** -case.number("bits"), order=order)
    return {
        "symbols": length.symbols.numpy(),
        "counts": length.counts.numpy(),
        "lengths": length.lengths.numpy(),
        "mean_bits": np.array(length.mean_bits),
        "entropy": np.array(length.entropy),
    }


def _deepshape(case: Case) -> Mapping[str, NDArray[Any]]:
    """The repository's variant, with the cut-off that the case gives."""
    options = {name: case.number(name) for name in ("shape_scale", "std_scale") if name in case.hp}
    whole = {
        ours: int(case.number(theirs))
        for ours, theirs in (("bits", "bits"), ("largest", "param_max_int"), ("rare", "adj_minnum"))
        if theirs in case.hp
    }
    reshaped = reshape_histogram(_tensor(case, "w"), official=True, **options, **whole)  # type: ignore[arg-type]
    return {
        "w": reshaped.weights.numpy(),
        "nu": np.array(reshaped.before.shape),
        "beta": np.array(reshaped.before.scale),
        "mu_int": np.array(reshaped.centre),
        "n_selected": np.array(reshaped.selected),
        "n_assigned": np.array(reshaped.assigned),
    }
