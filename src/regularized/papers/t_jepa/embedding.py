"""T-JEPA as a scikit-learn transformer: a table of numbers, words and gaps becomes numbers for any estimator."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from regularized.mechanisms.ranges import Choice
from regularized.papers.saved_estimators import read_estimator, write_estimator
from regularized.self_supervised.t_jepa import (
    TJEPA,
    CollapseReport,
    MaskSizes,
    TabularTransformer,
    TargetPredictor,
    TJEPATraining,
)
from regularized.training.data import TensorData
from regularized.training.randomness import preserved, seed_all

__all__ = ["TJEPAEmbedding"]

Array = NDArray[Any]

_FILES = "embedding"
_BATCH = 1024  # rows that are embedded at once


class TJEPAEmbedding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Learn a representation of rows from the rows alone, and put it in front of any estimator.

    Numbers are scaled to [0, 1] by the rows of :meth:`fit`, words become codes. Gaps (NaN, None) may be anywhere, and a
    category that :meth:`fit` had not seen counts as one. Labels are not looked at: fit it on all the rows there are.

    Args:
        categorical: columns that hold categories, by name or position; default ``"auto"``: all that are not numbers.
        dim: width of the representation of a column; default 32.
        depth: layers of the encoder; default 2.
        heads: of its attention; default 4.
        reg_tokens: learned tokens that belong to no column; default 1 (the paper).
        num_targets: predictions for a row in a step; default 4 (the authors' runs).
        epochs: passes over the rows; default 100.
        batch_size: default 256.
        lr: default 1e-3: the authors' search spans 1e-5 to 1e-3, for runs of many more steps.
        momentum: of the averaged encoder in the first step, rising to 1; default 0.98, since 0.996 (the paper) keeps
            the fresh encoder through the few hundred steps of a small table.
        output: ``"columns"`` (default): ``dim`` numbers for each column; ``"mean"``: their mean over the columns.
        random_state: as in scikit-learn.

    Attributes:
        jepa_: the trained :class:`~regularized.self_supervised.t_jepa.TJEPA`; ``jepa_.encoder`` can be fine-tuned.
        losses_: mean loss of each epoch.
        report_: how much the representation differs from row to row.
        categories_: the categories of each categorical column.
        n_features_in_: columns.

    Raises:
        ValueError: in :meth:`fit`, a table or a setting that is not usable.

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"age": [31, 45, None, 27] * 8, "city": ["Bern", "Rome", "Bern", None] * 8})
        >>> TJEPAEmbedding(dim=8, epochs=2, random_state=0).fit_transform(table).shape
        (32, 16)
    """

    def __init__(
        self,
        *,
        categorical: str | Sequence[str | int] = "auto",
        dim: int = 32,
        depth: int = 2,
        heads: int = 4,
        reg_tokens: int = 1,
        num_targets: int = 4,
        epochs: int = 100,
        batch_size: int = 256,
        lr: float = 1e-3,
        momentum: float = 0.98,
        output: str = "columns",
        random_state: Any = None,
    ) -> None:
        self.categorical = categorical
        self.dim = dim
        self.depth = depth
        self.heads = heads
        self.reg_tokens = reg_tokens
        self.num_targets = num_targets
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.momentum = momentum
        self.output = output
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from rows.

        Args:
            X: (N, D), an array or a data frame; at least 2 rows and 2 columns.
            y: not looked at.

        Raises:
            ValueError: the table or a setting is not usable.

        Warns:
            UserWarning: a column of numbers is constant, and says nothing.
            CollapseWarning: the representation hardly differs from row to row.
        """
        Choice("columns", "mean")("output", self.output)
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size are at least 1, got {self.epochs} and {self.batch_size}")
        kinds = getattr(X, "dtypes", None)
        table = self._validated(X, reset=True)
        self._categorical = self._find_categorical(table, kinds)
        self._numeric = [column for column in range(table.shape[1]) if column not in self._categorical]
        self._learn_columns(table)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        rows = self._encoded(table)
        with preserved():
            seed_all(seed)
            self._train(rows, seed)
        return self

    def transform(self, X: Any) -> Array:
        """Represent rows.

        Args:
            X: (N, D).

        Returns:
            (N, D dim) float32, or (N, dim) with ``output="mean"``.
        """
        embedded = [
            self.jepa_.embed(rows).mean(dim=1) if self.output == "mean" else self.jepa_.embed(rows).flatten(1)
            for rows in self.to_tensor(X).double().split(_BATCH)
        ]
        return torch.cat(embedded).float().numpy()

    def to_tensor(self, X: Any) -> Tensor:
        """Rows as ``jepa_.encoder`` takes them, for fine-tuning: scaled numbers, codes, NaN in the gaps.

        Args:
            X: (N, D).

        Returns:
            (N, D) float32.
        """
        check_is_fitted(self, "jepa_")
        return self._encoded(self._validated(X, reset=False))

    @property
    def _n_features_out(self) -> int:
        return self.dim * (1 if self.output == "mean" else self.n_features_in_)

    def _validated(self, X: Any, *, reset: bool) -> Array:
        table = validate_data(
            self,
            X,
            reset=reset,
            dtype=None,
            ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1,
            ensure_min_features=2 if reset else 1,
        )
        return cast(Array, table)

    def _find_categorical(self, table: Array, kinds: Any) -> list[int]:
        """Positions of the categorical columns."""
        if isinstance(self.categorical, str):
            Choice("auto", remedy="or give a list of columns")("categorical", self.categorical)
            if kinds is not None and hasattr(kinds, "__len__"):  # of a data frame: what it says of each column
                # Nullable numbers and plain ones have a letter; words, categories and what pandas adds next do not.
                letters = [getattr(kind, "kind", "O") for kind in kinds]
                return [column for column, letter in enumerate(letters) if letter not in "iuf"]
            return [column for column in range(table.shape[1]) if not _is_number(table[:, column])]
        names = list(getattr(self, "feature_names_in_", []))
        found = [names.index(one) if isinstance(one, str) and one in names else one for one in self.categorical]
        wrong = [one for one in found if isinstance(one, str) or not 0 <= one < table.shape[1]]
        if wrong:
            there = names or f"positions 0 to {table.shape[1] - 1}"
            raise ValueError(f"categorical names {wrong}, which are no columns of this table; it has {there}")
        return sorted({int(one) for one in found})

    def _learn_columns(self, table: Array) -> None:
        """Smallest and largest of each number, and the categories."""
        self.categories_: list[Array] = []
        for column in self._categorical:
            words, gaps = _words(table[:, column])
            self.categories_.append(np.unique(words[~gaps]))
        numbers = _numbers(table[:, self._numeric])
        known = ~np.isnan(numbers)
        self._low: Array = np.where(known, numbers, np.inf).min(axis=0)
        self._high: Array = np.where(known, numbers, -np.inf).max(axis=0)
        constant = [self._numeric[i] for i in np.flatnonzero(~(self._high > self._low))]
        if constant:
            names = getattr(self, "feature_names_in_", np.arange(table.shape[1]))
            warnings.warn(
                f"columns {[str(names[column]) for column in constant]} are constant and become 0: they say nothing; "
                "leave them out",
                stacklevel=4,
            )

    def _encoded(self, table: Array) -> Tensor:
        rows = np.empty(table.shape, dtype=np.float32)
        for column, known in zip(self._categorical, self.categories_, strict=True):
            words, gaps = _words(table[:, column])
            if words.dtype.kind != known.dtype.kind and known.dtype.kind == "U":
                words = words.astype(known.dtype.kind)
            rows[:, column] = np.nan
            if len(known) and (words.dtype.kind == "U") == (known.dtype.kind == "U"):
                codes = np.searchsorted(known, words).clip(0, len(known) - 1)
                rows[:, column] = np.where(gaps | (known[codes] != words), np.nan, codes)
        spread = self._high - self._low
        numbers = _numbers(table[:, self._numeric]) - np.where(spread >= 0, self._low, 0.0)
        varies = spread > 0
        scaled = numbers / np.where(varies, spread, 1.0)
        rows[:, self._numeric] = np.where(varies | np.isnan(numbers), scaled, 0.0)
        return torch.from_numpy(rows)

    def _network(self, total_steps: int, seed: int) -> TJEPA:
        sizes = {column: max(1, len(known)) for column, known in zip(self._categorical, self.categories_, strict=True)}
        encoder = TabularTransformer(
            self._numeric,
            sizes,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            feedforward=2 * self.dim,
            reg_tokens=self.reg_tokens,
            missing=True,
        )
        half = self.dim // 2
        width = half + half % 2
        predictor = TargetPredictor(encoder.tokenizer.num_tokens, self.dim, dim=width, heads=1, feedforward=self.dim)
        return TJEPA(
            encoder,
            predictor,
            total_steps=total_steps,
            sizes=MaskSizes.any_table(encoder.num_columns),
            num_targets=self.num_targets,
            momentum=(self.momentum, 1.0),
            seed=seed,
        )

    def _train(self, rows: Tensor, seed: int) -> None:
        data = TensorData(rows, batch_size=min(self.batch_size, len(rows)), seed=seed)
        training = TJEPATraining(self._network(self.epochs * len(data), seed), lr=self.lr, seed=seed)
        self.losses_: list[float] = training.fit(data, epochs=self.epochs)
        self.report_: CollapseReport = training.report(rows[:_BATCH])
        # Embeddings must not depend on which rows are embedded together; in double precision they do not.
        self.jepa_: TJEPA = training.jepa.double().eval()

    # -- files ---------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> Path:
        """Write what was fitted as safetensors and JSON, for :meth:`load`.

        Args:
            folder: made when missing.
        """
        check_is_fitted(self, "jepa_")
        about = {
            "settings": {**self.get_params(), "random_state": None},
            "n_features": self.n_features_in_,
            "names": [str(name) for name in getattr(self, "feature_names_in_", [])],
            "categorical": self._categorical,
            "categories": [known.tolist() for known in self.categories_],
            "ranges": [[str(low), str(high)] for low, high in zip(self._low, self._high, strict=True)],
            "losses": self.losses_,
            "report": asdict(self.report_),
        }
        return write_estimator(folder, _FILES, self, about, self._weights())

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what :meth:`save` wrote; nothing in it is run.

        Args:
            folder: of :meth:`save`.

        Raises:
            ValueError: it is another estimator's, or damaged.
        """
        with read_estimator(folder, _FILES, cls) as (about, weights):
            embedding = cls(**about["settings"])
            embedding.n_features_in_ = int(about["n_features"])
            if about["names"]:
                embedding.feature_names_in_ = np.array(about["names"], dtype=object)
            embedding._categorical = [int(column) for column in about["categorical"]]
            embedding._numeric = [c for c in range(embedding.n_features_in_) if c not in embedding._categorical]
            embedding.categories_ = [np.array(known) for known in about["categories"]]
            embedding._low, embedding._high = np.array(about["ranges"], dtype=np.float64).reshape(-1, 2).T
            embedding.losses_, embedding.report_ = about["losses"], CollapseReport(**about["report"])
            with preserved():
                embedding.jepa_ = embedding._network(1, 0).double().eval()
            embedding.jepa_.load_state_dict({**embedding.jepa_.state_dict(), **weights})
        return embedding

    def _weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.jepa_.state_dict().items() if "extra_state" not in name}

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn may give: words, categories and gaps."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags


def _is_gap(value: Any) -> bool:
    """None, NaN, and pandas' own sign, which can be compared with nothing and needs pandas to be named."""
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and np.isnan(value))


def _is_number(column: Array) -> bool:
    try:
        _numbers(column[:, None])
    except (TypeError, ValueError):
        return False
    return column.dtype.kind != "b"


def _numbers(columns: Array) -> Array:
    if columns.dtype.kind == "O":
        columns = np.array([[np.nan if _is_gap(v) else v for v in row] for row in columns]).reshape(columns.shape)
    return columns.astype(np.float64)


def _words(column: Array) -> tuple[Array, Array]:
    """Categories that can be sorted, numbers as they are and all else as words, and where there is none."""
    if column.dtype.kind in "iufb":
        numbers = column.astype(np.float64)
        return numbers, np.isnan(numbers)
    gaps = np.array([_is_gap(value) for value in column])
    return np.array(["" if gap else str(value) for value, gap in zip(column, gaps, strict=True)]), gaps
