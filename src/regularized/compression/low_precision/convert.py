"""Put a recipe into a model and take it out again."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

from regularized.compression.low_precision.layer import LowPrecisionLinear
from regularized.compression.low_precision.recipe import RECIPES, Operand, Recipe
from regularized.compression.low_precision.straight_through import fake_quantize
from regularized.mechanisms.surgery import check_called, close_names

__all__ = ["RoundedWeight", "as_recipe", "convert", "to_plain"]


class RoundedWeight(nn.Module):
    """A parametrization that rounds a weight at each use and lets its gradient through: for embeddings and norms.

    Args:
        operand: format and rounding.

    Examples:
        >>> table = nn.Embedding(5, 32)
        >>> _ = parametrize.register_parametrization(table, "weight", RoundedWeight(Operand("mxfp8_e4m3")))
        >>> bool((table.weight == Operand("mxfp8_e4m3").form.quantize(table.weight)).all())
        True
    """

    def __init__(self, operand: Operand) -> None:
        super().__init__()
        self.operand = operand

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        form = self.operand.form
        return weight if form is None else fake_quantize(weight, form, rounding=self.operand.rounding)


def as_recipe(recipe: Recipe | str) -> Recipe:
    """A recipe, or the one of a name in :data:`~regularized.compression.low_precision.recipe.RECIPES`.

    Raises:
        ValueError: there is none of that name; those that there are stand in the message.

    Examples:
        >>> as_recipe("mxfp8").name
        'mxfp8, gradients e4m3, rceil'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(
            f"there is no recipe {recipe!r}; {close_names([recipe], RECIPES)}. All: {', '.join(RECIPES)}; or make a "
            "Recipe of your own"
        )
    return RECIPES[recipe]


def convert(
    model: nn.Module,
    recipe: Recipe | str,
    *,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    seed: int = 0,
) -> list[str]:
    """Give linear layers the formats of a recipe, in place. Parameters stay the same objects: an optimizer stays good.

    Args:
        model: changed in place. Layers that have a recipe already get this one.
        recipe: a recipe or the name of one.
        include: patterns of dotted names; default all. Patterns mean linear layers alone; an embedding or a
            normalisation is taken where its whole name is given, and then its weight is rounded at each use.
        exclude: patterns of names that stay; the last layer (``"head"``, ``"lm_head"``) usually should.
        seed: of what the recipe draws; each layer draws its own.

    Returns:
        The names of what was changed, in the order of the model.

    Raises:
        ValueError: nothing matches; a pattern matches nothing that is linear; or a layer whose weight is read by what
            it is part of instead of being called.

    Examples:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 10))
        >>> convert(model, "mxfp8", exclude=["2"])
        ['0']
        >>> _ = to_plain(model)
        >>> type(model[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    recipe = as_recipe(recipe)
    patterns, left_out = _patterns("include", include), _patterns("exclude", exclude)
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: list[str] = []
    for pattern in patterns:
        matched = [name for name in modules if fnmatchcase(name, pattern)]
        linear = [name for name in matched if isinstance(modules[name], nn.Linear)]
        weighty = [name for name in matched if isinstance(getattr(modules[name], "weight", None), Tensor)]
        if matched == [pattern] and not linear and weighty:
            linear = matched
        if not linear and weighty:
            kinds = sorted({type(modules[name]).__name__ for name in weighty})
            raise ValueError(
                f"include={pattern!r} matches no linear layer, but {', '.join(kinds)}: in {recipe.fewest_bits:g} bits "
                f"these usually break a model. Give whole names, such as {weighty[0]!r}, if you mean them"
            )
        if not linear and pattern != "*":
            raise ValueError(f"include: no linear layer matches {pattern!r}; {close_names([pattern], modules)}")
        chosen += linear
    names = [n for n in modules if n in chosen and not any(fnmatchcase(n, out) for out in left_out)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to convert"
            + (f": exclude={list(left_out)} leaves none" if chosen else "")
        )
    check_called(model, names)
    for key, name in enumerate(modules):
        if name not in names:
            continue
        module = modules[name]
        if isinstance(module, nn.Linear):
            model.set_submodule(name, LowPrecisionLinear.of(module, recipe, seed=seed, key=key))
        elif not parametrize.is_parametrized(module, "weight"):
            parametrize.register_parametrization(module, "weight", RoundedWeight(recipe.forward.right))
    return names


def to_plain(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`, in place: plain layers with the same parameters, in full precision.

    Args:
        model: the model.

    Returns:
        The same model.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LowPrecisionLinear) and name:
            model.set_submodule(name, module.plain())
        elif parametrize.is_parametrized(module, "weight") and isinstance(
            module.parametrizations["weight"][0],
            RoundedWeight,
        ):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return model


def _patterns(option: str, given: Iterable[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise ValueError(f"{option} must be a list of patterns, got the string {given!r}; write [{given!r}]")
    return tuple(given)
