"""One training by recipes: what a comparison's runs and the scikit-learn estimators have in common."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.comparison.baselines import task_term
from regularized.evidence.comparison.recipe import Fitting, Recipe, Setup, Task
from regularized.training.data import TensorData
from regularized.training.options import Compute, Logging
from regularized.training.progress import cosine
from regularized.training.trainer import Trainer

__all__ = ["OPTIMIZERS", "fit_recipes", "gathered"]

OPTIMIZERS: Mapping[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
}
"""What builds the optimizer, but for learning rate and weight decay."""


def fit_recipes(
    recipes: Sequence[Recipe],
    own: Mapping[str, Any],
    *,
    make_model: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    task: Task,
    num_outputs: int,
    optimizer: "partial[torch.optim.Optimizer]",
    epochs: int,
    batch_size: int,
    seed: int,
    on_terms: Callable[[Mapping[str, nn.Module]], None] | None = None,
) -> nn.Module:
    """Train a new network as recipes say, under a cosine schedule.

    Args:
        recipes: techniques that are used together.
        own: settings of each, by its name.
        make_model: makes the network.
        data: inputs (N, ...) and targets (N,).
        validation: on which a recipe may choose something.
        task: classification or regression.
        num_outputs: classes, or 1.
        optimizer: builds the optimizer.
        epochs: passes over the data; a recipe may take a share of them.
        batch_size: samples in a step.
        seed: of initial weights, order and recipes.
        on_terms: called with the terms of the loss before the training.

    Returns:
        The network that predicts, in evaluation mode.

    Raises:
        NonFiniteLoss: it diverged.
        ValueError: recipes that exclude each other.
    """
    inputs, targets = data
    shares: list[float] = [own[recipe.name][recipe.epochs] for recipe in recipes if recipe.epochs is not None]
    epochs = max(1, round(min(shares, default=1.0) * epochs))
    setup = Setup(task, len(inputs), num_outputs, tuple(inputs.shape[1:]), epochs, batch_size, seed)
    torch.manual_seed(seed)
    model = make_model()
    # Networks with batch normalisation cannot take a last batch of one sample.
    alone = len(inputs) > batch_size and len(inputs) % batch_size == 1
    source = TensorData(inputs, targets, batch_size=batch_size, seed=seed, drop_last=alone)
    for recipe in recipes:
        if recipe.prepare is not None:
            model = recipe.prepare(model, setup, own[recipe.name])
    if procedure := next((recipe for recipe in recipes if recipe.fit is not None), None):
        assert procedure.fit is not None
        given = Fitting(model, make_model, source, validation, optimizer, cosine(), setup, own[procedure.name])
        return procedure.fit(given).eval()
    terms = gathered(recipes, setup, own)
    if on_terms is not None:
        on_terms(terms)
    trainer = Trainer(
        model,
        terms=terms,
        optimizer=optimizer,
        schedule=cosine(),
        seed=seed,
        logging=Logging(every=0, progress_bar=False),
        compute=Compute(device="cpu"),
    )
    trainer.fit(source, epochs=epochs)
    return trainer.merge().eval()


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
