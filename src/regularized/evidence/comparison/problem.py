"""The data of a comparison: tensors, what is asked of them, how they are split, and the file that runs read.

=============  ==================================================================================
train          what networks are trained on
validation     where the settings of an arm are chosen
selection      where the technique is chosen, which no setting was chosen on
judge          what is reported, which nothing was chosen on
=============  ==================================================================================
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regularized.evidence.comparison.recipe import Task
from regularized.evidence.store import home

__all__ = ["PARTS", "Problem", "Split", "Units", "all_samples", "load", "new_samples", "save"]

PARTS = ("validation", "selection", "judge")

_SHARES = {"train": 0.6, "validation": 0.13, "selection": 0.13, "judge": 0.14}
_LEAST = 20  # samples of the smallest part


class Split(NamedTuple):
    """One way to deal the samples: rows of each part, disjoint.

    Attributes:
        train: (n,) int64.
        validation: likewise.
        selection: likewise.
        judge: likewise; of the clean test data where there are some.
    """

    train: Tensor
    validation: Tensor
    selection: Tensor
    judge: Tensor


class Units(NamedTuple):
    """What targets of a regression are centred on and divided by for a training; class labels stay as they are.

    Attributes:
        centre: mean of the training targets.
        scale: their standard deviation, 1 where they are all the same.
    """

    centre: float
    scale: float

    @classmethod
    def of(cls, targets: Tensor) -> "Units":
        """Those of training targets.

        Examples:
            >>> units = Units.of(torch.tensor([1.0, 3.0, 5.0]))
            >>> units, units.scaled(torch.tensor([7.0])), Units.of(torch.tensor([0, 1])).scaled(torch.tensor([1]))
            (Units(centre=3.0, scale=2.0), tensor([2.]), tensor([1]))
        """
        if not targets.is_floating_point():
            return cls(0.0, 1.0)
        return cls(float(targets.mean()), float(targets.std()) or 1.0)

    def scaled(self, targets: Tensor) -> Tensor:
        """Targets as a network is trained on them."""
        return (targets - self.centre) / self.scale if targets.is_floating_point() else targets


@dataclass(frozen=True, slots=True)
class Problem:
    """Data and what is asked of them.

    Args:
        inputs: (N, F) or (N, C, H, W) floating point; NaN where a value is missing.
        targets: (N,) int64 class labels, or (N,) floating point.
        classes: names of the classes; empty for regression.
        test_inputs: clean test data, of the same shape, to judge on; default none.
        test_targets: their targets.
        name: for reports.

    Raises:
        ValueError: too few samples, or shapes and types that do not fit together.
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...] = ()
    test_inputs: Tensor | None = None
    test_targets: Tensor | None = None
    name: str = "data"
    columns: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.inputs.ndim < 2 or not self.inputs.is_floating_point():
            raise ValueError(
                "inputs must be floating point, (N, features) or (N, channels, height, width); got "
                f"{self.inputs.dtype} of shape {tuple(self.inputs.shape)}"
            )
        if self.targets.shape != (len(self.inputs),):
            raise ValueError(
                f"there must be one target a sample, shape ({len(self.inputs)},); got {tuple(self.targets.shape)}"
            )
        least = round(_LEAST / min(_SHARES.values()))
        if len(self.inputs) < least:
            raise ValueError(
                f"{len(self.inputs)} samples are too few: training, choosing settings, choosing a technique and "
                f"judging need parts of their own, {least} samples in all at the least"
            )
        if self.task == "classification":
            counts = torch.bincount(self.targets, minlength=len(self.classes))
            if len(self.classes) < 2 or int(counts.min()) < 4:
                few = {name: int(n) for name, n in zip(self.classes, counts) if n < 4}
                raise ValueError(f"classification needs two classes or more with 4 samples each; too few: {few}")
        elif not self.targets.isfinite().all():
            raise ValueError("targets hold NaN or infinite numbers; leave those samples out")
        if self.inputs.isinf().any():
            raise ValueError("inputs hold infinite numbers; replace them, or make them NaN, which means missing")
        if (self.test_inputs is None) != (self.test_targets is None):
            raise ValueError("clean test data need inputs and targets")
        if self.test_inputs is not None and self.test_inputs.shape[1:] != self.inputs.shape[1:]:
            raise ValueError(
                f"clean test inputs have shape {tuple(self.test_inputs.shape[1:])} a sample, the data "
                f"{tuple(self.inputs.shape[1:])}"
            )

    @property
    def task(self) -> Task:
        """Classification where the targets are whole numbers."""
        return "regression" if self.targets.is_floating_point() else "classification"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input as networks see it: a table with missing values has a column more for each that misses."""
        shape = tuple(self.inputs.shape[1:])
        return shape if len(shape) > 1 else (shape[0] + int(self.missing().sum()),)

    @property
    def num_outputs(self) -> int:
        """Classes, or 1."""
        return len(self.classes) or 1

    @property
    def fingerprint(self) -> str:
        """Short hash of all tensors."""
        digest = hashlib.sha256("|".join(self.classes).encode())
        for tensor in (self.inputs, self.targets, self.test_inputs, self.test_targets):
            if tensor is not None:
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def clean_test(self) -> bool:
        """Whether it is judged on clean test data."""
        return self.test_inputs is not None

    def sizes(self) -> dict[str, int]:
        """How many samples each part has."""
        total = len(self.inputs)
        sizes = {part: max(_LEAST, int(share * total)) for part, share in _SHARES.items() if part != "train"}
        if self.test_inputs is not None:
            sizes["judge"] = len(self.test_inputs)
        inside = sum(size for part, size in sizes.items() if part != "judge" or not self.clean_test)
        return {"train": total - inside, **sizes}

    def split(self, number: int) -> Split:
        """The split of this number; classes have the same shares in all parts where that is possible.

        Args:
            number: from 0.
        """
        generator = torch.Generator().manual_seed(1_000_003 * (number + 1))
        order = torch.randperm(len(self.inputs), generator=generator)
        if self.task == "classification":
            order = order[_interleaved(self.targets[order])]
        sizes = self.sizes()
        inside = ["validation", "selection"] + ([] if self.clean_test else ["judge"])
        parts, start = {}, 0
        for part in inside:
            parts[part] = order[start : start + sizes[part]]
            start += sizes[part]
        if self.test_inputs is not None:
            parts["judge"] = torch.arange(len(self.test_inputs))
        return Split(train=order[start:], **parts)

    def prepared(self, split: Split) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and targets of each part, scaled by what the training part shows and nothing else.

        Tables are standardised by column; a missing value becomes the column's mean, and a column of its own says that
        it was missing. Images are standardised as a whole.

        Returns:
            Inputs and targets by part.
        """
        inputs = {"train": self.inputs[split.train]}
        targets = {"train": self.targets[split.train]}
        for part in PARTS:
            outside = part == "judge" and self.test_inputs is not None and self.test_targets is not None
            source, labels = (self.test_inputs, self.test_targets) if outside else (self.inputs, self.targets)
            assert source is not None
            assert labels is not None
            rows = getattr(split, part)
            inputs[part], targets[part] = source[rows], labels[rows]
        scaled = _standardised(inputs, self.missing())
        return scaled, targets

    def missing(self) -> Tensor:
        """(F,) which columns have missing values."""
        if self.inputs.ndim != 2:
            return torch.zeros(0, dtype=torch.bool)
        return self.inputs.isnan().any(dim=0)


def _interleaved(labels: Tensor) -> Tensor:
    """An order in which every stretch has the classes in the shares that they have in all.

    Examples:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[_interleaved(labels)].tolist()
        [0, 1, 0, 0, 1, 0]
    """
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        place[mine] = (torch.arange(len(mine), dtype=torch.float64) + 0.5) / len(mine)
    return place.argsort(stable=True)


def _standardised(inputs: Mapping[str, Tensor], missing: Tensor) -> dict[str, Tensor]:
    train = inputs["train"]
    over = 0 if train.ndim == 2 else tuple(range(train.ndim))
    known = ~train.isnan()
    count = known.sum(dim=over, keepdim=True).clamp(min=1)
    mean = train.nan_to_num(0.0).sum(dim=over, keepdim=True) / count
    spread = ((train - mean).nan_to_num(0.0).square().sum(dim=over, keepdim=True) / count).sqrt()
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    scaled = {}
    for part, values in inputs.items():
        filled = ((values - mean) / spread).nan_to_num(0.0)
        if train.ndim == 2 and missing.any():
            filled = torch.cat([filled, values[:, missing].isnan().to(filled)], dim=1)
        scaled[part] = filled
    return scaled


def all_samples(problem: Problem) -> tuple[Tensor, Tensor]:
    """Inputs scaled by all samples, and targets: for the training after a comparison. Targets of regression too.

    Returns:
        (N, ...) inputs and (N,) targets.
    """
    inputs = _standardised({"train": problem.inputs}, problem.missing())["train"]
    return inputs, Units.of(problem.targets).scaled(problem.targets)


def new_samples(problem: Problem, inputs: Tensor) -> Tensor:
    """Inputs that the problem does not hold, scaled as :func:`all_samples` scales its own: what the network is to see.

    Args:
        problem: whose samples were trained on.
        inputs: (M, ...) of the same columns or shape; NaN where a value is missing.

    Raises:
        ValueError: they have another shape.

    Examples:
        >>> problem = Problem(torch.arange(200.0)[:, None], torch.arange(200) % 2, ("a", "b"))
        >>> new_samples(problem, torch.tensor([[99.5]]))
        tensor([[0.]])
    """
    if inputs.shape[1:] != problem.inputs.shape[1:]:
        raise ValueError(
            f"new inputs have shape {tuple(inputs.shape[1:])} a sample, those of the problem "
            f"{tuple(problem.inputs.shape[1:])}"
        )
    return _standardised({"train": problem.inputs, "new": inputs}, problem.missing())["new"]


# -- the file ------------------------------------------------------------------------------------


def save(problem: Problem) -> Path:
    """Write a problem where the runs of every process find it; the same problem is written once.

    Returns:
        The file, named after the content.
    """
    path = home() / "comparisons" / f"{problem.fingerprint}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.contiguous()
            for name in ("inputs", "targets", "test_inputs", "test_targets")
            if (tensor := getattr(problem, name)) is not None
        }
        temporary = path.with_suffix(".part")
        save_file(tensors, temporary, {"classes": json.dumps(problem.classes), "name": problem.name})
        temporary.replace(path)
    return path


@lru_cache(maxsize=2)
def load(path: str) -> Problem:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: it is damaged, or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Problem(**tensors, classes=tuple(json.loads(about["classes"])), name=about["name"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no data of a comparison ({error}); start the comparison again") from error
