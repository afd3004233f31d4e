"""What the contract suite checks of DreamID-Omni: a training through three stages."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from regularized.evidence.contract import ProcedureSubject
from regularized.generation.dreamid_omni.glyphs import TalkingGlyphs
from regularized.generation.dreamid_omni.model import SymmetricConditionalDiT
from regularized.generation.dreamid_omni.positions import Placing, SynRoPE
from regularized.generation.dreamid_omni.procedure import OmniTraining
from regularized.generation.dreamid_omni.stages import ProgressivePlan, Stage

TASKS = {"r2av": 1, "rv2av": 1, "ra2v": 1}


def small_training(placing: Placing = "slots") -> OmniTraining:
    """A stage of pairs, one across and one of all tasks; one block."""
    world = TalkingGlyphs()
    config = replace(world.config(), dim=24, heads=2, layers=1, ffn=32)
    plan = ProgressivePlan(
        [Stage("in_pair", 1, {"r2av": 1}), Stage("cross_pair", 1, {"r2av": 1}), Stage("cross_pair", 4, TASKS)]
    )
    return OmniTraining(
        SymmetricConditionalDiT(config, syn_rope=SynRoPE(placing=placing)),
        world,
        plan,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        batch_size=4,
    )


def _train(training: OmniTraining, steps: int) -> None:
    training.fit(until=training.done + steps)


def _weights(training: OmniTraining) -> Mapping[str, Tensor]:
    assert training.average is not None
    mean = {f"average.{name}": p.detach() for name, p in training.average.module.named_parameters()}
    return {**{name: p.detach() for name, p in training.model.named_parameters()}, **mean}


def subjects() -> list[ProcedureSubject]:
    """Shared slots, against references that follow the target."""
    return [ProcedureSubject("stages", small_training, partial(small_training, "consecutive"), _train, _weights)]
