"""A recipe as a term of a training: the model is converted, the loss stays as it is."""

from collections.abc import Iterable

from torch import Tensor, nn

from regularized.compression.low_precision.convert import as_recipe, convert
from regularized.compression.low_precision.layer import LowPrecisionLinear
from regularized.compression.low_precision.recipe import Recipe
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["LowPrecision"]


class LowPrecision(Term):
    """Train with the three products of every linear layer in the formats of a recipe.

    The parameters stay float32 and are trained as ever. What the recipe draws and remembers lies in the model's state,
    so a checkpoint holds it.

    Args:
        recipe: a recipe, or the name of one.
        include: patterns of names of layers; default all linear ones.
        exclude: patterns of names that stay; default none.
        seed: of what the recipe draws.

    Raises:
        ValueError: no such recipe; at ``attach``: nothing to convert.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from regularized.training import CrossEntropy, TensorData, Trainer
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> terms = {"task": CrossEntropy(), "formats": LowPrecision("mxfp8", exclude=["2"])}
        >>> trainer = Trainer(model, terms=terms, optimizer=partial(torch.optim.SGD, lr=0.1))
        >>> model[0].recipe.name
        'mxfp8, gradients e4m3, rceil'
    """

    sharding = "forward"
    contributes = False

    def __init__(
        self,
        recipe: Recipe | str,
        *,
        include: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.recipe: Recipe = as_recipe(recipe)
        self.include: tuple[str, ...] = tuple(include)
        self.exclude: tuple[str, ...] = tuple(exclude)
        self.seed = seed
        self._layers: list[LowPrecisionLinear] = []

    def attach(self, model: nn.Module) -> None:
        """Convert the model; one that is converted already is left as it is."""
        if not self._layers:
            convert(model, self.recipe, include=self.include, exclude=self.exclude, seed=self.seed)
            self._layers = [module for module in model.modules() if isinstance(module, LowPrecisionLinear)]

    def reset(self) -> None:
        """Draw again what an interrupted step had drawn."""
        for layer in self._layers:
            layer.stream.rewind()

    def after_step(self, step: Step) -> None:
        """What was drawn belongs to a step that is done."""
        for layer in self._layers:
            layer.stream.settle()

    def forward(self, step: Step) -> Tensor:
        """Never called: the term adds nothing to the loss."""
        return step.logits.new_zeros(())

    def extra_repr(self) -> str:
        """The recipe, for ``repr``."""
        return f"recipe={self.recipe.name!r}"
