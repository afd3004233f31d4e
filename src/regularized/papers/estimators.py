"""Techniques as scikit-learn estimators: :class:`RegularizedClassifier`, :class:`RegularizedRegressor`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from regularized.evidence.comparison.models import check_output, default_model
from regularized.evidence.comparison.recipe import Recipe, Task
from regularized.evidence.comparison.training import OPTIMIZERS, fit_recipes
from regularized.papers.comparison import candidates
from regularized.papers.saved_estimators import read_estimator, write_estimator
from regularized.training.randomness import preserved

__all__ = ["RegularizedClassifier", "RegularizedRegressor"]

Array = NDArray[Any]

_FILES = "estimator"


class _Regularized(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What both estimators share; arguments as there."""

    _task: Task

    def __init__(
        self,
        technique: str = "plain",
        *,
        settings: Mapping[str, Any] | None = None,
        model: Callable[[int, int], nn.Module] | None = None,
        epochs: int = 30,
        batch_size: int = 32,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        optimizer: str = "adamw",
        random_state: Any = None,
    ) -> None:
        self.technique = technique
        self.settings = settings
        self.model = model
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.random_state = random_state

    def _fit(self, X: Any, targets: Tensor, num_outputs: int, on_terms: Any = None) -> None:
        recipe, own = self._recipe()
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        make: Callable[[int, int], nn.Module] = self.model or _default
        inputs = torch.tensor(X, dtype=torch.float32)
        with preserved():
            probe = make(X.shape[1], num_outputs)
        check_output(probe, inputs[:2], num_outputs)
        if obstacles := recipe.obstacles(self._task, (X.shape[1],), probe):
            raise ValueError(f"technique {self.technique!r} cannot be used here: {'; '.join(obstacles)}")
        training, validation = (inputs, targets), (inputs, targets)
        if recipe.fit is not None:  # it may choose something: on samples that it does not train on
            held_out = max(2, len(inputs) // 10)
            order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
            training = (inputs[order[held_out:]], targets[order[held_out:]])
            validation = (inputs[order[:held_out]], targets[order[:held_out]])
        with preserved():
            self.network_: nn.Module = fit_recipes(
                [recipe],
                {recipe.name: own},
                make_model=partial(make, X.shape[1], num_outputs),
                data=training,
                validation=validation,
                task=self._task,
                num_outputs=num_outputs,
                optimizer=partial(OPTIMIZERS[self.optimizer], lr=self.lr, weight_decay=self.weight_decay),
                epochs=self.epochs,
                batch_size=min(self.batch_size, len(training[0])),
                seed=seed,
                on_terms=on_terms,
            )

    def _recipe(self) -> tuple[Recipe, dict[str, Any]]:
        """The technique, and its settings: those that were given, the middle of its range for the others."""
        known = {candidate.recipe.name: candidate.recipe for candidate in candidates()}
        if self.technique not in known:
            raise ValueError(f"technique {self.technique!r} is not known; there are {sorted(known)}")
        recipe, given = known[self.technique], dict(self.settings or {})
        if unknown := sorted(set(given) - set(recipe.space)):
            raise ValueError(f"{self.technique} has no settings {unknown}; it has {sorted(recipe.space)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {sorted(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size are at least 1, got {self.epochs} and {self.batch_size}")
        return recipe, {name: given.get(name, values.at(0.5)) for name, values in recipe.space.items()}

    def _output(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        inputs = torch.tensor(validate_data(self, X, dtype=np.float32, reset=False))
        with torch.no_grad():
            return torch.cat([cast(Tensor, self.network_(part)) for part in inputs.split(1000)]).double()

    # -- files ---------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> Path:
        """Write a fitted estimator as safetensors and JSON, for :meth:`load`.

        Args:
            folder: made when missing.

        Raises:
            ValueError: the network is not of the default's form, so that weights alone do not bring it back.
        """
        check_is_fitted(self)
        fresh = _default(self.n_features_in_, self._outputs())
        weights = self.network_.state_dict()
        if self.model is not None or {n: w.shape for n, w in weights.items()} != {
            n: w.shape for n, w in fresh.state_dict().items()
        }:
            raise ValueError(
                f"the trained network is not the default one (technique {self.technique!r}), so its weights alone do "
                "not bring it back; save `network_` yourself, or the whole estimator with skops"
            )
        settings = {**self.get_params(), "model": None, "random_state": None}
        about = {"settings": settings, "n_features": self.n_features_in_, **self._fitted()}
        return write_estimator(folder, _FILES, self, about, weights)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what :meth:`save` wrote; nothing in it is run.

        Raises:
            ValueError: it is another estimator's, or damaged.
        """
        with read_estimator(folder, _FILES, cls) as (about, weights):
            estimator = cls(**about["settings"])
            estimator.n_features_in_ = int(about["n_features"])
            estimator._restore(about)
            estimator.network_ = _default(estimator.n_features_in_, estimator._outputs()).eval()
            estimator.network_.load_state_dict(weights)
        return estimator

    def _outputs(self) -> int:
        raise NotImplementedError

    def _fitted(self) -> dict[str, Any]:
        raise NotImplementedError

    def _restore(self, about: Mapping[str, Any]) -> None:
        raise NotImplementedError


class RegularizedClassifier(ClassifierMixin, _Regularized):  # type: ignore[misc]  # scikit-learn has no types
    """A network of scikit-learn's form, trained with one of the techniques.

    Inputs are taken as they are: put a scaler in front, in a pipeline.

    Args:
        technique: name of a recipe, see ``regularized.papers.comparison.candidates()``; default ``"plain"``.
        settings: of the technique, by name; default the middle of the range that ``compare`` tries.
        model: ``model(features, outputs)`` makes a network; default a perceptron with two hidden layers of 128.
        epochs: passes over the data; default 30.
        batch_size: default 32.
        lr: learning rate, falling to 0 along a cosine; default 1e-3, AdamW's habit.
        weight_decay: default 1e-4.
        optimizer: ``"adamw"`` (default, since inputs of any scale must do) or ``"sgd"`` with momentum 0.9.
        random_state: as in scikit-learn.

    Attributes:
        classes_: labels, sorted.
        network_: the trained network; (B, F) to (B, classes) logits.
        n_features_in_: F.

    Examples:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = RegularizedClassifier("label_smoothing", random_state=0).fit(X, y)
        >>> model.score(X, y) > 0.9
        True
    """

    _task = "classification"

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train.

        Args:
            X: (N, F).
            y: (N,) labels.

        Raises:
            ValueError: data or settings are not usable.
        """
        return self.fit_with_terms(X, y, None)

    def fit_with_terms(
        self, X: ArrayLike, y: ArrayLike, on_terms: Callable[[Mapping[str, nn.Module]], None] | None
    ) -> Self:
        """Train, and hand out the terms of the loss before: for what remembers something of the samples.

        Args:
            X: (N, F).
            y: (N,) labels.
            on_terms: called with the terms by name; not by techniques that train otherwise.
        """
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("needs samples of at least 2 classes; the data hold one class")
        self._fit(X, torch.tensor(codes), len(self.classes_), on_terms)
        return self

    def predict_proba(self, X: ArrayLike) -> Array:
        """(B, classes) probabilities."""
        return self._output(X).softmax(dim=1).numpy()

    def predict(self, X: ArrayLike) -> Array:
        """(B,) labels."""
        best = self.predict_proba(X).argmax(axis=1)
        labels: Array = self.classes_[best]
        return labels

    def _outputs(self) -> int:
        return len(self.classes_)

    def _fitted(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist()}

    def _restore(self, about: Mapping[str, Any]) -> None:
        self.classes_ = np.asarray(about["classes"])


class RegularizedRegressor(RegressorMixin, _Regularized):  # type: ignore[misc]  # scikit-learn has no types
    """A network of scikit-learn's form for numbers, trained with one of the techniques that can.

    Targets are standardised for the training, and predictions are in their units. Arguments and attributes as of
    :class:`RegularizedClassifier`; ``network_`` gives (B, 1).

    Examples:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = RegularizedRegressor("dropout", settings={"rate": 0.1}, random_state=0).fit(X, y)
        >>> model.score(X, y) > 0.3
        True
    """

    _task = "regression"

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train.

        Args:
            X: (N, F).
            y: (N,) numbers.

        Raises:
            ValueError: data or settings are not usable.
        """
        X, y = validate_data(self, X, y, dtype=np.float32, y_numeric=True)
        targets = np.asarray(y, dtype=np.float64)
        self.centre_, self.scale_ = float(targets.mean()), float(targets.std()) or 1.0
        self._fit(X, torch.tensor((targets - self.centre_) / self.scale_, dtype=torch.float32), 1)
        return self

    def predict(self, X: ArrayLike) -> Array:
        """(B,) numbers."""
        return (self._output(X).squeeze(1) * self.scale_ + self.centre_).numpy()

    def _outputs(self) -> int:
        return 1

    def _fitted(self) -> dict[str, Any]:
        return {"centre": self.centre_, "scale": self.scale_}

    def _restore(self, about: Mapping[str, Any]) -> None:
        self.centre_, self.scale_ = float(about["centre"]), float(about["scale"])


def _default(features: int, outputs: int) -> nn.Module:
    return default_model((features,), outputs)
