"""Published techniques for regularized training that work, compose, and are proven.

Names are loaded when first used: ``import regularized`` costs nothing, and a technique pulls in torch alone.
"""

from typing import TYPE_CHECKING, Any

from regularized._version import __version__

if TYPE_CHECKING:
    from regularized.training import CrossEntropy, Loss, Term, Trainer

# Public name -> module that defines it. Techniques are not listed here: they are found in the catalogue's cards, and
# imported from the module of their problem, e.g. ``from regularized.noisy_labels import EarlyLearningLoss``.
_LAZY = {
    "CrossEntropy": "regularized.training.terms",
    "Loss": "regularized.training.terms",
    "Term": "regularized.training.terms",
    "Trainer": "regularized.training.trainer",
}

__all__ = ["CrossEntropy", "Loss", "Term", "Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'regularized' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
