"""Published techniques for regularized training that work, compose, and are proven.

Names are loaded when first used: ``import regularized`` costs nothing, and a technique pulls in torch alone::

    from regularized import Trainer, CrossEntropy

Techniques are here, too, by the public names on their papers' cards; ``regularized papers`` lists the papers, and
``regularized show`` tells the names of one.
"""

from typing import TYPE_CHECKING, Any

from regularized._version import __version__

if TYPE_CHECKING:
    from regularized.papers.comparison import compare
    from regularized.papers.estimators import RegularizedClassifier, RegularizedRegressor
    from regularized.training import CrossEntropy, Loss, Ridge, Term, Trainer

# Techniques are not listed here: the catalogue knows them.
_LAZY = {
    "RegularizedClassifier": "regularized.papers.estimators",
    "RegularizedRegressor": "regularized.papers.estimators",
    "compare": "regularized.papers.comparison",
    "CrossEntropy": "regularized.training.terms",
    "Loss": "regularized.training.terms",
    "Ridge": "regularized.training.terms",
    "Term": "regularized.training.terms",
    "Trainer": "regularized.training.trainer",
}

__all__ = [
    "CrossEntropy",
    "Loss",
    "RegularizedClassifier",
    "RegularizedRegressor",
    "Ridge",
    "Term",
    "Trainer",
    "__version__",
    "compare",
]


def _techniques() -> dict[str, str]:
    from regularized.papers.catalogue import public_names

    return public_names()


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    # Tools ask every module for names such as __path__ or _pytestfixturefunction: no card is read for those.
    if module is None and not name.startswith("_"):
        module = _techniques().get(name)
    if module is None:
        raise _unknown(name)
    from importlib import import_module

    return getattr(import_module(module), name)


def _unknown(name: str) -> Exception:
    """The error of a name that is not here; with what may have been meant."""
    text = f"module 'regularized' has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(text, name=name)
    import difflib
    import sys
    from importlib.util import find_spec

    if find_spec(f"regularized.{name}") is not None:  # a folder that is about to be imported
        return AttributeError(text, name=name)
    near = difflib.get_close_matches(name, __dir__(), n=3, cutoff=0.75)
    meant = f". Did you mean {' or '.join(near)}?" if near else ""
    # `from regularized import X` turns an AttributeError into its own words, without ours.
    if near and sys._getframe(2).f_code.co_name == "_handle_fromlist":
        return ImportError(f"cannot import name {name!r} from 'regularized'{meant}", name="regularized")
    return AttributeError(text + meant, name=name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_techniques()})
