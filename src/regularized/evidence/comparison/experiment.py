"""A comparison as an experiment of the runner: one arm, whose settings say which data, network, recipes and trial.

So that every run is stored, found again, and made in processes of its own, as those of the papers are. What the code
key of this module cannot see stands in the settings: the content of the data, and the code of recipes and network.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.comparison.metrics import METRICS, measure
from regularized.evidence.comparison.models import make
from regularized.evidence.comparison.problem import PARTS, Problem, Units, load
from regularized.evidence.comparison.recipe import load_recipe
from regularized.evidence.comparison.training import OPTIMIZERS, fit_recipes
from regularized.evidence.experiment import About, Measurements
from regularized.training.finite import NonFiniteLoss

__all__ = ["ARMS", "DEFAULTS", "SCALES", "about", "run", "train"]

DEFAULTS: dict[str, Any] = {
    "data": "",  # path of the problem; its name is the hash of its content
    "model": {"reference": "", "code": ""},
    "recipes": (),  # of each the reference and the code key
    "own": {},  # settings of each recipe, by its name
    "lr": 0.1,
    "weight_decay": 0.0,
    "optimizer": "sgd",
    "epochs": 1,
    "batch_size": 64,
}
SCALES: dict[str, dict[str, Any]] = {"comparison": {}}
ARMS: dict[str, dict[str, Any]] = {"trial": {}}


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train on split ``seed`` with initial weights and order of that seed; measure on the three other parts.

    A training that diverges is a result: its metrics are NaN.
    """
    problem = load(s["data"])
    inputs, targets = problem.prepared(problem.split(seed))
    units = Units.of(targets["train"])
    names = [name for name, metric in METRICS.items() if metric.task == problem.task]
    measured = {f"{part}_{name}": math.nan for part in PARTS for name in names}
    with suppress(NonFiniteLoss):
        model = train(s, seed, problem, inputs, {part: units.scaled(y) for part, y in targets.items()})
        for part in PARTS:
            output = _predict(model, inputs[part])
            if problem.task == "regression":
                output = output.squeeze(-1) * units.scale + units.centre
            if output.isfinite().all():
                measured |= {f"{part}_{n}": v for n, v in measure(problem.task, output, targets[part]).items()}
    return Measurements(measured, data=problem.fingerprint)


def about(s: Mapping[str, Any]) -> About:
    """Sizes of the data, as the runner wants them of every experiment."""
    problem = load(s["data"])
    sizes = problem.sizes()
    model = make(s["model"], problem.input_shape, problem.num_outputs)
    weights = sum(p.numel() for p in model.parameters())
    return About(problem.name, sizes["train"], "network", weights, resplit=sizes["judge"] / sizes["train"])


def train(
    s: Mapping[str, Any], seed: int, problem: Problem, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> nn.Module:
    """One training as the settings say.

    Args:
        s: settings, see :data:`DEFAULTS`.
        seed: of initial weights, order and recipes.
        problem: the problem.
        inputs: by part, scaled.
        targets: by part, scaled.

    Returns:
        The network that predicts, in evaluation mode.

    Raises:
        NonFiniteLoss: it diverged.
    """
    return fit_recipes(
        [load_recipe(reference) for reference, _ in s["recipes"]],
        s["own"],
        make_model=partial(make, s["model"], problem.input_shape, problem.num_outputs),
        data=(inputs["train"], targets["train"]),
        validation=(inputs["validation"], targets["validation"]),
        task=problem.task,
        num_outputs=problem.num_outputs,
        optimizer=partial(OPTIMIZERS[s["optimizer"]], lr=s["lr"], weight_decay=s["weight_decay"]),
        epochs=s["epochs"],
        batch_size=s["batch_size"],
        seed=seed,
    )


def _predict(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(1000)])
