"""How progressive self-knowledge distillation takes part in a comparison on anybody's data."""

from regularized.evidence.comparison.recipe import Code, Need, Recipe
from regularized.evidence.comparison.space import Uniform
from regularized.overfitting.ps_kd import ProgressiveDistillation

RECIPES = (
    Recipe(
        "ps_kd",
        "labels softened by the network's own predictions of the epoch before",
        frozenset({"overfitting", "noisy_labels"}),
        {"alpha": Uniform(0.2, 1.0)},
        "the authors tune alpha over 0.1 to 1 and take 0.8",
        needs=frozenset({Need.CLASSES}),
        terms=lambda setup, settings: {
            "task": ProgressiveDistillation(setup.num_samples, setup.num_outputs, alpha=settings["alpha"])
        },
        code=Code(
            imports="from regularized import ProgressiveDistillation",
            terms={"task": "ProgressiveDistillation(len(inputs), num_classes, alpha={alpha})"},
        ),
    ),
)
