"""How the weight compander takes part in a comparison on anybody's data."""

from regularized.evidence.comparison.recipe import Code, Recipe
from regularized.evidence.comparison.space import Log
from regularized.overfitting.weight_compander import WeightCompander

RECIPES = (
    Recipe(
        "weight_compander",
        "weights bent by a function that holds back the large ones",
        frozenset({"overfitting"}),
        {"a": Log(1.9, 8.0), "b": Log(0.5, 8.0)},
        "around the authors' a = 2 and b = 1; a prototype of ours on digits",
        tasks=frozenset({"classification", "regression"}),
        terms=lambda setup, settings: {"compander": WeightCompander(a=settings["a"], b=settings["b"], init="preserve")},
        code=Code(
            imports="from regularized import WeightCompander",
            terms={"compander": 'WeightCompander(a={a}, b={b}, init="preserve")'},
        ),
    ),
)
