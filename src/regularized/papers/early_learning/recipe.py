"""How early-learning regularization takes part in a comparison on anybody's data."""

from regularized.evidence.comparison.recipe import Code, Need, Recipe
from regularized.evidence.comparison.space import Log, Uniform
from regularized.noisy_labels.early_learning import EarlyLearning

RECIPES = (
    Recipe(
        "early_learning",
        "targets that remember what the network believed of each sample before it memorised the labels",
        frozenset({"noisy_labels"}),
        {"strength": Log(0.5, 15.0), "momentum": Uniform(0.5, 0.95)},
        "around the authors' lambda 3 and 7, momentum 0.7 and 0.9 (CIFAR); a prototype of ours on digits",
        needs=frozenset({Need.CLASSES}),
        terms=lambda setup, settings: {
            "regulariser": EarlyLearning(
                setup.num_samples, setup.num_outputs, weight=settings["strength"], momentum=settings["momentum"]
            )
        },
        code=Code(
            imports="from regularized import EarlyLearning",
            terms={"regulariser": "EarlyLearning(len(inputs), num_classes, weight={strength}, momentum={momentum})"},
        ),
    ),
)
