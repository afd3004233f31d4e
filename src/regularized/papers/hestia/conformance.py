"""Golden vectors of Hestia: quantizer, schedule, factors from traces, Hutch++, and the temperature to begin with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regularized.compression.hestia.quantizer import anneal, optimal_temperature, quantize_weight
from regularized.compression.hestia.schedule import Annealing, FactorOn, sensitivities, temperature_factors
from regularized.compression.hestia.traces import hutchpp
from regularized.evidence.conformance import Case, UnknownCase


def tolerance(case: Case, output: str) -> float:
    """1e-10 in double precision; Hutch++ is in single, and the code's search for the temperature stops 3e-7 early."""
    if case.has("in/H"):
        return 1e-4
    return 1e-6 if output == "init_temp" else 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for."""
    if case.has("in/weight", "hp/temp"):
        return _quantizer(case)
    if case.has("in/step", "hp/total_steps"):
        return _schedule(case)
    if case.has("in/trace"):
        traces = {str(i): float(trace) for i, trace in enumerate(case.inputs["trace"])}
        kappa = case.number("kappa", 1.0)
        factors = temperature_factors(traces, alpha=case.number("alpha", 0.4), kappa=kappa)
        scores = sensitivities(traces, kappa=kappa)
        return {"temp_scale": np.array(list(factors.values())), "score": np.array(list(scores.values()))}
    if case.has("in/H", "in/S", "in/Omega"):
        matrix, sketch, probes = (torch.tensor(case.inputs[name]) for name in ("H", "S", "Omega"))
        estimate = hutchpp(lambda columns: matrix @ columns, sketch, probes)
        return {
            "trace_low": estimate.low.numpy(),
            "trace_res": estimate.rest.numpy(),
            "trace": estimate.total.numpy(),
            "true_trace": matrix.trace().numpy(),
        }
    if case.has("out/init_temp"):
        temperature = optimal_temperature(low=case.number("lo", 0.1), high=case.number("hi", 2.0))
        return {"init_temp": np.array(temperature)}
    raise UnknownCase(case)


def _quantizer(case: Case) -> Mapping[str, NDArray[Any]]:
    """The weight in training, its gradient, and the hard one."""
    weight = torch.tensor(case.inputs["weight"], requires_grad=True)
    group_size = int(case.number("group_size", 0))
    out = anneal(
        weight,
        temperature=case.number("temp"),
        pressure=case.number("pressure", 1.0),
        group_size=group_size,
        straight_through="with_scale",
    )
    results = {"q": out.detach(), "hard": quantize_weight(weight, group_size=group_size)}
    if case.has("in/grad_out"):
        (results["grad_weight"],) = torch.autograd.grad(out, weight, torch.tensor(case.inputs["grad_out"]))
    return {name: tensor.numpy() for name, tensor in results.items()}


def _schedule(case: Case) -> Mapping[str, NDArray[Any]]:
    """Pressure and temperature at each step; the code's style ``hessian`` is a cosine whose factor acts throughout."""
    style, factor = case.text("style", "cosine"), case.number("temp_scale", float("nan"))
    on: FactorOn = "temperature" if style == "hessian" else "plateau"
    annealing = Annealing(
        compress=case.number("compress_ratio"),
        anneal=case.number("anneal_ratio"),
        temperature=case.number("init_temp"),
        decay="linear" if style == "linear" else "cosine",
        factor_on=on,
    )
    shares = np.atleast_1d(case.inputs["step"]) / case.number("total_steps")
    pressures = [annealing.pressure(float(u)) for u in shares]
    scale = 1.0 if np.isnan(factor) else factor
    temperatures = [annealing.start() * annealing.cooling(float(u), scale) for u in shares]
    shape = case.inputs["step"].shape
    return {"pressure": np.array(pressures).reshape(shape), "temp": np.array(temperatures).reshape(shape)}
