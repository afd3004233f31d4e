"""Avalanche's EWC and LwF beside ours: one network, one stream, one order of samples; do the weights agree?

    pip install avalanche-lib        # and torchvision of the index that torch is from
    python benchmarks/avalanche_parity.py [--seeds 1000] [--json]

A perceptron and the images of the experiment of ``rehearsal_free``, Fashion-MNIST of 8 x 8 pixels; about a minute for
each seed. *Domains* (for EWC) are permutations of the pixels with all ten classes in each; *classes* (for LwF) come two
at a time. Both sides take plain steps of SGD on the same batches. Each row is one of Avalanche's strategies with what
of it was exchanged, and our terms; printed are the mean accuracy over all tasks at the end, by Avalanche's metric and
by ours, and the largest difference of any weight, in float32 and in float64: rounding shrinks with the precision,
another method does not.

EWC: Avalanche's squares the gradient of a *batch's* mean loss ("as shipped"), which is no Fisher information of a
sample; ``per sample`` gives its ``compute_importances`` batches of one. Its mode ``online`` with decay 1 adds the
importances up and holds at the last weights, as ours; ``separate`` holds at those of each task. LwF: Avalanche's loss
of the labels takes in the columns of classes to come ("as shipped"), ours not; ``seen`` is cross-entropy over the
columns seen, handed to Avalanche as its criterion.
"""

import argparse
import copy
import importlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.continual.rehearsal_free import ContinualLoss, WeightAnchor
from regularized.continual.sequence import TaskSequence
from regularized.continual.tasks import Task, class_groups, class_incremental, domain_incremental
from regularized.evidence.experiment import Unavailable
from regularized.evidence.models import mlp, seeded
from regularized.evidence.requirements import need_package
from regularized.papers.rehearsal_free.experiment import load
from regularized.training import CrossEntropy, TensorData

INSTALL = "pip install avalanche-lib, and torchvision of the index that torch is from"
ROWS = {
    "domains": ("no penalty", "EWC online, per sample", "EWC online, as shipped", "EWC separate, per sample"),
    "classes": ("no penalty", "LwF seen", "LwF as shipped"),
}
"""Stream, and Avalanche's strategies on it."""


@dataclass(frozen=True)
class Sizes:
    """Of a run; the smallest that a test uses is far below these."""

    images: int = 300
    test: int = 1000
    tasks: int = 5
    epochs: int = 4
    batch: int = 32
    width: int = 64
    lr: float = 0.1
    strength: float = 5.0


@dataclass
class SeenCrossEntropy:
    """Cross-entropy over the columns of classes seen, and these alone: labels are columns, which are in their order."""

    sizes: Sequence[int]
    task: int = field(default=0)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, : sum(self.sizes[: self.task + 1])], targets)


def stream(kind: str, seed: int, s: Sizes, dtype: torch.dtype) -> list[Task]:
    """The tasks, whose batches come in the order of the data."""
    images = load("fashion_mnist", seed, s.images * (5 if kind == "classes" else 1), 0, s.test, 0)
    train, test = ((x.to(dtype), y) for x, y in (images.train, images.test))
    if kind == "classes":
        tasks = class_incremental(train, class_groups(10, 2)[: s.tasks], test=test, batch_size=s.batch)
    else:
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.arange(64), *(torch.randperm(64, generator=generator) for _ in range(s.tasks - 1))]
        sets = ([(x[:, order], y) for order in orders] for x, y in (train, test))
        tasks = domain_incremental(next(sets), test=next(sets), batch_size=s.batch)
    in_order = partial(TensorData, batch_size=s.batch, shuffle=False)
    return [replace(task, data=in_order(task.data.inputs, task.data.targets)) for task in tasks]


def ours(model: nn.Module, tasks: Sequence[Task], kind: str, row: str, s: Sizes) -> list[float]:
    """Train in place; accuracy on each task at the end."""
    terms: dict[str, nn.Module] = {"task": CrossEntropy()}
    if kind == "classes":
        terms["task"] = ContinualLoss(10, classifier="softmax", distil=float(row.startswith("LwF")), temperature=2.0)
    if row.startswith("EWC"):
        terms["anchor"] = WeightAnchor(weight=s.strength, importance="fisher", fisher="empirical", with_head=True)
    optimizer = partial(torch.optim.SGD, lr=s.lr)
    record = TaskSequence(model, tasks, terms=terms, optimizer=optimizer, epochs=s.epochs).fit()
    found: list[float] = record.whole[-1].tolist()
    return found


def theirs(model: nn.Module, tasks: Sequence[Task], kind: str, row: str, s: Sizes) -> list[float]:
    """The same by Avalanche."""
    avalanche = _avalanche()
    benchmark = avalanche.benchmarks.tensors_benchmark(
        train_tensors=[(task.data.inputs, task.data.targets) for task in tasks],
        test_tensors=[task.test for task in tasks],
        task_labels=[0] * len(tasks),
    )
    seen = SeenCrossEntropy([len(task.classes) for task in tasks])
    accuracy = avalanche.evaluation.metrics.accuracy_metrics(experience=True)
    strategy = avalanche.training.Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=s.lr),
        criterion=nn.CrossEntropyLoss() if kind == "domains" or "as shipped" in row else seen,
        train_mb_size=s.batch,
        train_epochs=s.epochs,
        eval_mb_size=s.test,
        plugins=_plugins(avalanche, row, s),
        evaluator=avalanche.training.plugins.EvaluationPlugin(accuracy),
    )
    for number, experience in enumerate(benchmark.train_stream):
        seen.task = number
        strategy.train(experience, shuffle=False)
    found = strategy.eval(benchmark.test_stream)
    return [value for name, value in sorted(found.items()) if name.startswith("Top1_Acc_Exp")]


def _plugins(avalanche: Any, row: str, s: Sizes) -> list[Any]:
    """What makes its plain training the strategy of the row, as ``EWC`` and ``LwF`` do themselves."""
    if row.startswith("LwF"):
        return [avalanche.training.plugins.LwFPlugin(alpha=1.0, temperature=2.0)]
    if not row.startswith("EWC"):
        return []
    mode: dict[str, Any] = {"mode": "online", "decay_factor": 1.0} if "online" in row else {"mode": "separate"}
    ewc = avalanche.training.plugins.EWCPlugin(s.strength, **mode)
    if "per sample" in row:
        batches = ewc.compute_importances

        def of_samples(
            model: Any, criterion: Any, optimizer: Any, data: Any, device: Any, size: int, **more: Any
        ) -> Any:
            return batches(model, criterion, optimizer, data, device, 1, **more)

        ewc.compute_importances = of_samples
    return [ewc]


def compare(kind: str, row: str, seed: int, s: Sizes) -> dict[str, float]:
    """One row: accuracies in %, and the largest difference of a weight in both precisions."""
    result: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        tasks = stream(kind, seed, s, dtype)
        start = seeded(seed, mlp, [64, s.width, s.width // 2, 10]).to(dtype)
        both = {"avalanche": copy.deepcopy(start), "ours": copy.deepcopy(start)}
        for side, train in (("avalanche", theirs), ("ours", ours)):
            with _default(dtype):  # in which Avalanche keeps its importances, whatever the weights are
                accuracies = train(both[side], tasks, kind, row, s)
            if dtype == torch.float32:
                result[side] = 100.0 * sum(accuracies) / len(accuracies)
        pairs = zip(both["avalanche"].parameters(), both["ours"].parameters(), strict=True)
        result[name] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return result


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _avalanche() -> Any:
    """The package with the parts that are used here.

    Raises:
        Unavailable: it is not installed, or does not import.
    """
    need_package("avalanche", INSTALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solvers and loggers that take no part here
        try:
            for part in ("benchmarks", "evaluation.metrics", "training.plugins"):
                importlib.import_module(f"avalanche.{part}")
            return importlib.import_module("avalanche")
        except Exception as error:
            raise Unavailable(f"avalanche is here but does not import ({error}): {INSTALL}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        _avalanche()
    except Unavailable as error:
        parser.error(str(error))
    for kind, rows in ROWS.items():
        for row in rows:
            found = [compare(kind, row, seed, Sizes()) for seed in options.seeds]
            mean = {side: sum(one[side] for one in found) / len(found) for side in ("avalanche", "ours")}
            worst = {name: max(one[name] for one in found) for name in ("float32", "float64")}
            if options.json:
                print(json.dumps({"stream": kind, "strategy": row, "seeds": found}), flush=True)
            else:
                told = f"accuracy {mean['avalanche']:.2f} and {mean['ours']:.2f} %"
                print(f"{kind}  {row:26}{told}   weights {worst['float32']:.1e} {worst['float64']:.1e}", flush=True)


if __name__ == "__main__":
    main()
