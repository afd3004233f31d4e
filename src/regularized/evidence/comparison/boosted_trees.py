"""Boosted trees of scikit-learn: what a table is compared with from outside of neural networks.

A forest that stands where a network stands: it takes tensors and returns logits, so that nothing behind it is told.
"""

from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.comparison.recipe import ANY_PROBLEM, Code, Fitting, Need, Recipe, Task
from regularized.evidence.comparison.space import Log, Uniform

__all__ = ["RECIPE", "BoostedTrees", "fit_boosted_trees"]

_ROUNDS = 100  # scikit-learn's default


class BoostedTrees(nn.Module):
    """Predictions of fitted trees.

    Args:
        trees: a fitted ``HistGradientBoostingClassifier`` or ``...Regressor``.
        num_outputs: classes, also those that the trees have never seen; 1 for a regression.

    Shape:
        Inputs (B, D); output (B, num_outputs): logarithms of probabilities, or the predicted number.
    """

    def __init__(self, trees: Any, num_outputs: int) -> None:
        super().__init__()
        self.trees: Any = trees
        self.num_outputs: int = num_outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, or predictions."""
        rows = inputs.detach().cpu().numpy()
        if not hasattr(self.trees, "classes_"):
            return torch.as_tensor(self.trees.predict(rows), dtype=inputs.dtype, device=inputs.device)[:, None]
        found = torch.as_tensor(self.trees.predict_proba(rows), dtype=inputs.dtype)
        known = torch.as_tensor(self.trees.classes_, dtype=torch.long)
        # What was never seen is as unlikely as a float can say.
        shares = found.new_zeros(len(found), self.num_outputs).index_copy_(1, known, found)
        return shares.clamp_min(torch.finfo(inputs.dtype).tiny).log().to(inputs.device)


def fit_boosted_trees(
    inputs: Tensor,
    targets: Tensor,
    num_outputs: int,
    *,
    task: Task = "classification",
    shrinkage: float = 0.1,
    leaves: int = 31,
    l2: float = 0.0,
    seed: int = 0,
) -> BoostedTrees:
    """Fit 100 rounds of histogram gradient boosting.

    Args:
        inputs: (N, D).
        targets: (N,) class labels or numbers.
        num_outputs: classes, or 1.
        task: classification (default) or regression.
        shrinkage: scikit-learn's ``learning_rate``; default 0.1, scikit-learn's.
        leaves: at most, of a tree; default 31, scikit-learn's.
        l2: scikit-learn's ``l2_regularization``; default 0, scikit-learn's.
        seed: of the trees.

    Raises:
        ValueError: inputs are no table.

    Examples:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> trees = fit_boosted_trees(x, (x[:, 0] > 0).long(), 2)
        >>> trees(torch.tensor([[2.0, 0.0, 0.0]])).argmax().item()
        1
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    if inputs.ndim != 2:
        raise ValueError(f"boosted trees need a table, (N, D), got inputs of shape {tuple(inputs.shape)}")
    kind = HistGradientBoostingClassifier if task == "classification" else HistGradientBoostingRegressor
    trees = kind(
        learning_rate=shrinkage,
        max_leaf_nodes=leaves,
        l2_regularization=l2,
        max_iter=_ROUNDS,
        early_stopping=False,
        random_state=seed,
    )
    return BoostedTrees(trees.fit(inputs.cpu().numpy(), targets.cpu().numpy()), num_outputs)


def _fit(given: Fitting) -> nn.Module:
    inputs, targets, setup = given.data.inputs, given.data.targets, given.setup
    assert isinstance(inputs, Tensor)
    assert targets is not None
    settings = {**given.settings, "leaves": round(given.settings["leaves"])}
    return fit_boosted_trees(inputs, targets, setup.num_outputs, task=setup.task, seed=setup.seed, **settings)


RECIPE = Recipe(
    "boosted_trees",
    "no network: gradient-boosted trees of scikit-learn",
    frozenset({ANY_PROBLEM}),
    {"shrinkage": Log(0.02, 0.5), "leaves": Log(3, 63), "l2": Uniform(0.0, 10.0)},
    "ours, around scikit-learn's defaults of 0.1, 31 and 0",
    tasks=frozenset({"classification", "regression"}),
    needs=frozenset({Need.TABLE}),
    fit=_fit,
    by_steps=False,
    code=Code(
        imports="from regularized.evidence.comparison import fit_boosted_trees",
        training=(
            'model = fit_boosted_trees(inputs, targets, num_classes, task="{kind}", shrinkage={shrinkage}, '
            "leaves=round({leaves}), l2={l2})"
        ),
    ),
)
"""Tuned in three settings of its own; learning rate and weight decay of the other arms mean nothing to it."""
