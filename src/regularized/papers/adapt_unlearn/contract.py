"""What the contract suite checks: the whole procedure on points, and the repulsion as a term of a classifier."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, ProcedureSubject, Subject, plain
from regularized.evidence.models import mlp, seeded
from regularized.training.terms import CrossEntropy
from regularized.unlearning.adapt_unlearn.feedback import collect_feedback
from regularized.unlearning.adapt_unlearn.gan import GANSettings
from regularized.unlearning.adapt_unlearn.penalty import repel
from regularized.unlearning.adapt_unlearn.procedure import AdaptThenUnlearn
from regularized.unlearning.adapt_unlearn.term import Repulsion

TASK = Classification()


def _references() -> list[nn.Module]:
    """Two models of the same structure, with weights of their own."""
    models: list[nn.Module] = []
    for seed in (11, 12):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(TASK.model())
    return models


def _repelled(weight: float) -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "away": Repulsion(_references(), weight=weight)}


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return repel, (torch.tensor(0.7, requires_grad=True), "exponential")


def _build(weight: float = 30.0) -> AdaptThenUnlearn:
    generator, discriminator = seeded(0, mlp, [2, 16, 2]), seeded(1, mlp, [2, 16, 1])
    feedback = collect_feedback(generator, lambda x: x[:, 0] > x[:, 0].median(), latents=2, samples=100)
    return AdaptThenUnlearn(
        generator,
        discriminator,
        feedback,
        latents=2,
        anchor=1.0,
        repulsion=Repulsion(weight=weight),
        adaptations=1,
        adapt_steps=8,
        unlearn_steps=8,
        settings=GANSettings(r1_every=2),
    )


def _train(procedure: AdaptThenUnlearn, stages: int) -> None:
    procedure.fit(until=procedure.stage + stages)


def _weights(procedure: AdaptThenUnlearn) -> Mapping[str, Tensor]:
    parts = {"generator": procedure.gan.generator, "average": procedure.gan.ema, "critic": procedure.gan.discriminator}
    return {f"{name}.{key}": value for name, net in parts.items() for key, value in net.state_dict().items()}


def subjects() -> list[Subject | ProcedureSubject]:
    """A classifier that keeps away from two others; a GAN that adapts, then unlearns; there, a stage is an epoch."""
    return [
        Subject(
            "repulsion", TASK.model, partial(_repelled, 0.3), plain, TASK.data, off=partial(_repelled, 0.0), part=_part
        ),
        ProcedureSubject("adapt, then unlearn", _build, partial(_build, 0.0), _train, _weights),
    ]
