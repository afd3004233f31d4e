"""What a technique declares so that it can be compared on anybody's data: a recipe.

It stands in ``papers/<slug>/recipe.py``, in ``RECIPES``, and is found by scanning; where there is none, ``NO_RECIPE``
says why. Nothing in this folder knows a technique by its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from importlib import import_module
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from regularized.evidence.comparison.space import Space
from regularized.training.data import TensorData
from regularized.training.progress import Coefficient

__all__ = [
    "ANY_PROBLEM",
    "Code",
    "Fitting",
    "Need",
    "Recipe",
    "Settings",
    "Setup",
    "Task",
    "last_linear",
    "load_recipe",
]

Task: TypeAlias = Literal["classification", "regression"]
Settings: TypeAlias = Mapping[str, Any]

ANY_PROBLEM = "any"
"""In ``Recipe.problems``: whatever the problem is."""


class Need(StrEnum):
    """What a technique needs of data or model beyond a network, inputs and targets."""

    CLASSES = "class labels"
    IMAGES = "square images"
    LINEAR_HEAD = "a last layer that is nn.Linear"
    CONVOLUTIONS = "a network with convolutions"
    TABLE = "a row of numbers for each sample"


@dataclass(frozen=True, slots=True)
class Setup:
    """What is known of the problem when a technique is put together.

    Args:
        task: classification or regression.
        num_samples: training samples; the ``index`` of a batch counts them.
        num_outputs: classes, or 1.
        input_shape: shape of one input.
        epochs: passes over the data.
        batch_size: samples in a step.
        seed: of this run.
    """

    task: Task
    num_samples: int
    num_outputs: int
    input_shape: tuple[int, ...]
    epochs: int
    batch_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Fitting:
    """What a recipe with a ``fit`` of its own is given: all that a training has.

    Args:
        model: initialised; to be trained in place.
        another: makes a further network, of other initial weights.
        data: training data, in an order of this seed.
        validation: the data on which settings are chosen: (inputs, targets). To choose on them, not to train.
        optimizer: builds the optimizer of a list of parameters or groups.
        schedule: factor of the learning rate.
        setup: of the problem.
        settings: of this trial.
    """

    model: nn.Module
    another: Callable[[], nn.Module]
    data: TensorData
    validation: tuple[torch.Tensor, torch.Tensor]
    optimizer: "partial[torch.optim.Optimizer]"
    schedule: Coefficient
    setup: Setup
    settings: Settings


@dataclass(frozen=True, slots=True)
class Code:
    """A recipe as code, for a person who takes the winner home; in braces stand settings of the trial.

    The names ``model``, ``data``, ``inputs``, ``targets``, ``optimizer``, ``epochs`` and ``num_classes`` exist there;
    ``{head}`` is the name of the last linear layer, and ``{model}`` makes a network.

    Args:
        imports: what the other parts need, beside torch and what the loop needs.
        before: statements in front of the training.
        terms: expressions by the names of the terms.
        training: statements that are the whole training, and leave ``model``; default the trainer with the terms.
    """

    imports: str = ""
    before: str = ""
    terms: Mapping[str, str] = field(default_factory=dict)
    training: str = ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a technique takes part in a comparison.

    Exactly one of ``terms``, ``prepare`` and ``fit`` says what it does to a training that is otherwise plain.

    Args:
        name: of the arm; a paper's slug, or that of a baseline.
        title: in a few words.
        problems: families of problems that it is for, see :data:`regularized.papers.card.FAMILIES`; or
            :data:`ANY_PROBLEM`.
        space: its own settings and their ranges; learning rate and weight decay are common to all arms.
        source: where the ranges come from.
        tasks: what it can be used for; default classification alone.
        needs: what else must be there.
        terms: terms of the loss from the setup and the settings of a trial. One named ``"task"`` takes the place of
            the plain one.
        prepare: changes the network before the training, and returns it.
        fit: the whole training; returns the network that predicts.
        epochs: name of the setting that is the share of the epochs to be trained; default none, all of them.
        by_steps: whether it is trained in the steps of all others; if not, whole trainings are timed. Default yes.
        code: the same for a person to use.

    Raises:
        ValueError: not exactly one of the three.
    """

    name: str
    title: str
    problems: frozenset[str]
    space: Space = field(default_factory=dict)
    source: str = ""
    tasks: frozenset[Task] = frozenset({"classification"})
    needs: frozenset[Need] = frozenset()
    terms: Callable[[Setup, Settings], Mapping[str, nn.Module]] | None = None
    prepare: Callable[[nn.Module, Setup, Settings], nn.Module] | None = None
    fit: Callable[[Fitting], nn.Module] | None = None
    epochs: str | None = None
    by_steps: bool = True
    code: Code = field(default_factory=Code)

    def __post_init__(self) -> None:
        given = [name for name in ("terms", "prepare", "fit") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"recipe {self.name!r} needs exactly one of terms, prepare and fit, got {given or 'none'}")
        if self.epochs is not None and self.epochs not in self.space:
            raise ValueError(f"recipe {self.name!r}: {self.epochs!r} is not in its space {sorted(self.space)}")

    def obstacles(self, task: Task, input_shape: tuple[int, ...], model: nn.Module) -> list[str]:
        """Why it cannot be used on a problem; empty where it can.

        Args:
            task: of the problem.
            input_shape: of one input.
            model: the network that is compared.
        """
        found = []
        if task not in self.tasks:
            found.append(f"it is for {' and '.join(sorted(self.tasks))}")
        kinds = [type(module) for module in model.modules()]
        square = len(input_shape) == 3 and input_shape[1] == input_shape[2]
        lacks = {
            Need.CLASSES: task != "classification",
            Need.IMAGES: not square,
            Need.LINEAR_HEAD: last_linear(model) is None,
            Need.CONVOLUTIONS: nn.Conv2d not in kinds,
            Need.TABLE: len(input_shape) != 1,
        }
        found += [f"it needs {need.value}" for need in sorted(self.needs) if lacks[need]]
        return found


def last_linear(model: nn.Module) -> str | None:
    """Name of the network's last module of its own weights if that is a plain ``nn.Linear``; None if it is not.

    A network that is nothing but a linear layer has no last one that could be replaced.

    Examples:
        >>> last_linear(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        '2'
        >>> last_linear(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))) is None
        True
    """
    last: str | None = None
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            last = name if name and type(module) is nn.Linear else None
    return last


def load_recipe(reference: str) -> Recipe:
    """The recipe that a text names, ``"module:name"``, in any process.

    Raises:
        ValueError: there is none of this name in the module.
    """
    module_name, _, name = reference.partition(":")
    recipes: Mapping[str, Recipe] = {recipe.name: recipe for recipe in import_module(module_name).RECIPES}
    if name not in recipes:
        raise ValueError(f"{module_name} has no recipe {name!r}; it has {sorted(recipes)}")
    return recipes[name]
