"""A loop as small as it gets, so that the checks of a term do not depend on the trainer that they check, too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regularized.evidence.contract.subjects import Subject, Terms
from regularized.mechanisms.taps import Taps
from regularized.training.objective import Objective
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step, call_model

__all__ = ["BATCH", "EPOCHS", "SAMPLES", "Trained", "distance", "equal", "train"]

SAMPLES, BATCH, EPOCHS = 24, 8, 3


@dataclass(frozen=True, slots=True)
class Trained:
    """Where a training ended.

    Args:
        model: the model.
        objective: its terms.
        weights: the model's parameters by name.
        gradients: the gradients of the last step.
    """

    model: nn.Module
    objective: Objective
    weights: Mapping[str, Tensor]
    gradients: list[Tensor]


def train(
    subject: Subject,
    terms: Terms,
    *,
    accumulate: int = 1,
    epochs: int = EPOCHS,
    device: str = "cpu",
    autocast: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Trained:
    """Train a subject's model on 24 samples in batches of 8.

    Args:
        subject: model, data and optimizer.
        terms: the terms.
        accumulate: micro-batches of a batch.
        epochs: how often it sees the samples.
        device: where.
        autocast: forward passes in bfloat16.
        rank: this process, of
        world: so many, each with its part of every batch; above 1 there must be a process group.
    """
    torch.manual_seed(0)
    model = subject.model()
    objective = Objective(terms)
    for attach in objective.moments("attach"):
        attach(model)
    torch.manual_seed(1)  # surgery may draw; that alone must not change what training draws
    model.to(device)
    objective.to(device)
    optimizer = subject.optimizer(objective.parameter_groups(model))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    wrapped: nn.Module = DistributedDataParallel(model) if world > 1 else model
    taps = Taps(model, objective.taps)

    def call(target: nn.Module, inputs: Any) -> Any:
        return call_model(wrapped if target is model else target, inputs)

    data = {name: tensor.to(device) for name, tensor in subject.data(SAMPLES, 0).items()}
    steps_an_epoch = SAMPLES // BATCH
    gradients: list[Tensor] = []
    for epoch in range(epochs):
        start = Progress(epoch * steps_an_epoch, epochs * steps_an_epoch, epoch, epochs)
        for moment in objective.moments("epoch_start"):
            moment(start)
        for i in range(steps_an_epoch):
            progress = Progress(start.step + i, start.total_steps, epoch, epochs)
            whole = torch.arange(i * BATCH, (i + 1) * BATCH, device=device)
            mine = whole.chunk(world)[rank].chunk(accumulate)
            window = [Batch.of({name: tensor[rows] for name, tensor in data.items()}) for rows in mine]
            for transform in objective.moments("transform"):
                window = [transform(batch) for batch in window]
            counts = objective.counts(window, device=torch.device(device))
            for m, batch in enumerate(window):
                taps.clear()
                step = Step(model, batch, progress, taps.states, call=call)
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                    loss = objective.loss(step, counts, first=m == 0, scale=float(world))
                loss.backward()
            if world > 1:  # what a term trains itself is outside the wrapped model
                own = {id(p) for p in model.parameters()}
                for p in objective.parameters():
                    if p.grad is not None and id(p) not in own:
                        dist.all_reduce(p.grad)
                        p.grad /= world
            for moment in objective.moments("before_step"):
                moment(step)
            gradients = [p.grad.clone() for p in trained if p.grad is not None]
            optimizer.step()
            for moment in objective.moments("after_step"):
                moment(step)
            optimizer.zero_grad()
    taps.remove()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Trained(model, objective, weights, gradients)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest difference of two entries.

    Raises:
        AssertionError: the names differ.
    """
    assert a.keys() == b.keys(), f"parameters differ: {sorted(a.keys() ^ b.keys())}"
    return max(float((a[name].detach().double() - b[name].detach().double()).abs().max()) for name in a)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether names and values are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
