"""A comparison as an experiment of the runner: one arm, whose settings say which data, network, recipes and trial.

So that every run is stored, found again, and made in processes of its own, as those of the papers are. What the code
key of this module cannot see stands in the settings: the content of the data, and the code of recipes and network.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.comparison.baselines import task_term
from regularized.evidence.comparison.metrics import METRICS, measure
from regularized.evidence.comparison.models import make
from regularized.evidence.comparison.problem import PARTS, Problem, load
from regularized.evidence.comparison.recipe import Fitting, Recipe, Setup, load_recipe
from regularized.evidence.experiment import About, Measurements
from regularized.training.data import TensorData
from regularized.training.finite import NonFiniteLoss
from regularized.training.options import Compute, Logging
from regularized.training.progress import cosine
from regularized.training.trainer import Trainer

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
    centre, scale = _units(problem, targets["train"])
    names = [name for name, metric in METRICS.items() if metric.task == problem.task]
    measured = {f"{part}_{name}": math.nan for part in PARTS for name in names}
    with suppress(NonFiniteLoss):
        model = train(s, seed, problem, inputs, {part: _scaled(y, centre, scale) for part, y in targets.items()})
        for part in PARTS:
            output = _predict(model, inputs[part])
            if problem.task == "regression":
                output = output.squeeze(-1) * scale + centre
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
    recipes = [load_recipe(reference) for reference, _ in s["recipes"]]
    epochs = _epochs(recipes, s)
    setup = Setup(
        problem.task,
        len(inputs["train"]),
        problem.num_outputs,
        problem.input_shape,
        epochs,
        s["batch_size"],
        seed,
    )
    torch.manual_seed(seed)
    model = make(s["model"], problem.input_shape, problem.num_outputs)
    # Networks with batch normalisation cannot take a last batch of one sample.
    whole = len(inputs["train"]) % s["batch_size"] != 1
    data = TensorData(inputs["train"], targets["train"], batch_size=s["batch_size"], seed=seed, drop_last=not whole)
    optimizer = _optimizer(s)
    for recipe in recipes:
        if recipe.prepare is not None:
            model = recipe.prepare(model, setup, s["own"][recipe.name])
    if procedure := next((recipe for recipe in recipes if recipe.fit is not None), None):
        assert procedure.fit is not None
        validation = (inputs["validation"], targets["validation"])
        own = s["own"][procedure.name]
        another = partial(make, s["model"], problem.input_shape, problem.num_outputs)
        model = procedure.fit(Fitting(model, another, data, validation, optimizer, cosine(), setup, own))
    else:
        trainer = Trainer(
            model,
            terms=gathered(recipes, setup, s["own"]),
            optimizer=optimizer,
            schedule=cosine(),
            seed=seed,
            logging=Logging(every=0, progress_bar=False),
            compute=Compute(device="cpu"),
        )
        trainer.fit(data, epochs=epochs)
        model = trainer.merge()
    return model.eval()


def gathered(recipes: Sequence[Recipe], setup: Setup, own: Mapping[str, Any]) -> dict[str, nn.Module]:
    """All terms of a loss: those of the recipes, and the plain task where none takes its place.

    Raises:
        ValueError: two recipes want to be the task.
    """
    terms: dict[str, nn.Module] = {}
    for recipe in recipes:
        for name, term in (recipe.terms(setup, own[recipe.name]) if recipe.terms is not None else {}).items():
            key = name if name == "task" else f"{recipe.name}_{name}"
            if key in terms:
                names = " and ".join(recipe.name for recipe in recipes)
                raise ValueError(f"{names} exclude each other: each takes the place of the task's loss")
            terms[key] = term
    return terms if "task" in terms else {"task": task_term(setup), **terms}


def _epochs(recipes: Sequence[Recipe], s: Mapping[str, Any]) -> int:
    shares: list[float] = [s["own"][recipe.name][recipe.epochs] for recipe in recipes if recipe.epochs is not None]
    epochs: int = s["epochs"]
    return max(1, round(min(shares, default=1.0) * epochs))


def _optimizer(s: Mapping[str, Any]) -> "partial[torch.optim.Optimizer]":
    kinds: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, momentum=0.9),
        "adamw": torch.optim.AdamW,
    }
    return partial(kinds[s["optimizer"]], lr=s["lr"], weight_decay=s["weight_decay"])


def _predict(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(1000)])


def _units(problem: Problem, targets: Tensor) -> tuple[float, float]:
    """Mean and spread of training targets, for regression."""
    if problem.task == "classification":
        return 0.0, 1.0
    return float(targets.mean()), float(targets.std()) or 1.0


def _scaled(targets: Tensor, centre: float, scale: float) -> Tensor:
    return (targets - centre) / scale if targets.is_floating_point() else targets
