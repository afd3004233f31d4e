"""What predictions are judged by: one metric decides, the others guard it. Loads torch only where it measures."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METRICS", "Metric", "default_metric", "measure"]


class Metric(NamedTuple):
    """A number that says how good predictions are.

    Attributes:
        task: ``"classification"`` or ``"regression"``.
        direction: ``"higher"`` or ``"lower"`` is better.
        unit: of the number; ``"points"`` are percentage points.
        words: what it is.
    """

    task: str
    direction: str
    unit: str
    words: str


METRICS = {
    "accuracy": Metric("classification", "higher", "points", "share of right predictions, in per cent"),
    "balanced_accuracy": Metric("classification", "higher", "points", "mean over classes of their accuracies"),
    "nll": Metric("classification", "lower", "nats", "negative log-likelihood"),
    "ece": Metric("classification", "lower", "points", "expected calibration error, ten bins"),
    "rmse": Metric("regression", "lower", "target units", "root of the mean squared error"),
    "mae": Metric("regression", "lower", "target units", "mean absolute error"),
    "r2": Metric("regression", "higher", "", "explained share of the variance"),
}


def default_metric(task: str) -> str:
    """Accuracy, or the root mean squared error."""
    return "accuracy" if task == "classification" else "rmse"


def measure(task: str, output: "Tensor", targets: "Tensor") -> dict[str, float]:
    """All metrics of a task.

    Args:
        task: of the problem.
        output: (N, C) logits, or (N,) predictions in the units of the targets.
        targets: (N,).

    Examples:
        >>> import torch
        >>> measure("regression", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))["mae"]
        1.0
    """
    if task == "classification":
        from regularized.evidence.classification import quality

        right = output.argmax(dim=1) == targets
        each = [right[targets == label].double().mean() for label in targets.unique()]
        return {**quality(output, targets), "balanced_accuracy": 100.0 * float(sum(each)) / len(each)}
    error = (output - targets).double()
    squared = float(error.square().mean())
    around_mean = float((targets.double() - targets.double().mean()).square().mean())
    return {
        "rmse": squared**0.5,
        "mae": float(error.abs().mean()),
        "r2": 1.0 - squared / around_mean if around_mean else float("nan"),
    }
