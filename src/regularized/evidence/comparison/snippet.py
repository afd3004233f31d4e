"""Code that trains with the settings that a comparison chose, and runs as it stands."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from regularized.evidence.comparison.problem import Problem
from regularized.evidence.comparison.recipe import Recipe, last_linear

__all__ = ["snippet"]

_HEAD = """\
from functools import partial

import torch
from torch import nn

from regularized.evidence.comparison import all_samples, default_model, problem_of
from regularized.training import CrossEntropy, Loss, TensorData, Trainer, cosine
{imports}
{source}
inputs, targets = all_samples(problem)  # scaled as in the comparison
epochs, num_classes = {epochs}, problem.num_outputs
torch.manual_seed(0)
model = {model}
data = TensorData(inputs, targets, batch_size={batch_size})
optimizer = partial({optimizer}, lr={lr}, weight_decay={weight_decay})
{before}{training}
"""

_TRAINING = """\
trainer = Trainer(
    model,
    terms={{
{terms}
    }},
    optimizer=optimizer,
    schedule=cosine(),
)
trainer.fit(data, epochs=epochs)
model = trainer.merge().eval()"""

_OPTIMIZERS = {"sgd": "torch.optim.SGD, momentum=0.9", "adamw": "torch.optim.AdamW"}
_TASKS = {"classification": "CrossEntropy()", "regression": "Loss(lambda z, y: (z.squeeze(-1) - y).square())"}


def snippet(
    problem: Problem,
    recipes: Sequence[Recipe],
    settings: Mapping[str, Any],
    base: Mapping[str, Any],
    *,
    model: nn.Module,
    source: str = "",
) -> str:
    """The code.

    Args:
        problem: the problem.
        recipes: what the training consists of.
        settings: the trial.
        base: what all runs share.
        model: the network, to name its last layer.
        source: code that loads the data; where it is not known, a comment says what ``problem`` is.
    """
    reference = base["model"]["reference"]
    made = _made(reference) if reference else "default_model(problem.input_shape, problem.num_outputs)"
    terms = {"task": _TASKS[problem.task]}
    imports, before, training = "", "", ""
    for recipe in recipes:
        words = {"kind": problem.task, "head": last_linear(model), "model": made, **settings["own"][recipe.name]}
        imports += f"{recipe.code.imports}\n" if recipe.code.imports else ""
        before += f"{recipe.code.before}\n".format(**words) if recipe.code.before else ""
        training += recipe.code.training.format(**words)
        for name, expression in recipe.code.terms.items():
            terms[name if name == "task" else f"{recipe.name}_{name}"] = expression.format(**words)
    lines = "\n".join(f'        "{name}": {expression},' for name, expression in terms.items())
    return _HEAD.format(
        imports=imports,
        source=source or "problem = problem_of((inputs, targets))  # your tensors, as you gave them",
        epochs=base["epochs"],
        model=made,
        batch_size=base["batch_size"],
        optimizer=_OPTIMIZERS[base["optimizer"]],
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        before=before,
        training=training or _TRAINING.format(terms=lines),
    )


def _made(reference: str) -> str:
    module, _, name = reference.partition(":")
    return "make_model()  # yours" if module == "here" else f"__import__({module!r}, fromlist=['_']).{name}()"
