"""What the contract suite checks: the distillation that forgets, and the second of two stages."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.contract import ProcedureSubject
from regularized.evidence.models import seeded
from regularized.papers.score_forgetting.networks import Perceptron
from regularized.unlearning.score_forgetting.diffusion import ConditionalDiffusion
from regularized.unlearning.score_forgetting.procedure import ScoreForgettingDistillation

_ADAM = partial(torch.optim.Adam, lr=1e-3, betas=(0.0, 0.999))
_STEPS = 3


def _distillation(**options: Any) -> ScoreForgettingDistillation:
    network = seeded(0, Perceptron, 4, 3, width=16, blocks=1)
    teacher = ConditionalDiffusion(network, shape=(1, 2, 2), num_classes=3, prediction="v")
    settings = {"forget": 0, "override": 1, "optimizer": _ADAM, "decay": 0.5, "forget_weight": 0.5, **options}
    return ScoreForgettingDistillation(teacher.eval().requires_grad_(False), **settings)


def _second_stage(**options: Any) -> ScoreForgettingDistillation:
    first = _distillation(forget=None, override=None)
    first.fit(steps=1, batch_size=8)
    return _distillation(start=first, **options)


def _train(distillation: ScoreForgettingDistillation, epochs: int) -> None:
    distillation.fit(steps=distillation.steps + _STEPS * epochs, batch_size=8)


def _weights(distillation: ScoreForgettingDistillation) -> Mapping[str, Tensor]:
    parts = {"fake": distillation.fake, "generator": distillation.generator, "average": distillation.sampler}
    return {f"{part}.{name}": value for part, net in parts.items() for name, value in net.state_dict().items()}


def subjects() -> list[ProcedureSubject]:
    """Plain is the same without weight on what is to be forgotten."""
    at_random = partial(_distillation, override=None, through_networks=False)
    return [
        ProcedureSubject("distillation", _distillation, partial(_distillation, forget_weight=0.0), _train, _weights),
        ProcedureSubject("random override", at_random, partial(at_random, forget_weight=0.0), _train, _weights),
        ProcedureSubject("second stage", _second_stage, partial(_second_stage, forget_weight=0.0), _train, _weights),
    ]
