"""What the contract suite checks of the whole method: with a value function, without one, and the controller's idea."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.alignment.amft.controller import MetaWeightController
from regularized.alignment.amft.procedure import AMFT
from regularized.alignment.amft.puzzles import ALPHABET, END, Sums
from regularized.alignment.amft.rollouts import Critic
from regularized.evidence.contract import ProcedureSubject
from regularized.evidence.language_models import LanguageModel
from regularized.training.data import TensorData

_TASK = Sums(1, digits=1)


def _build(*, critic: bool = False, **options: Any) -> AMFT:
    settings = {"meta_lr": 0.2, "entropy_lr": 0.1, "every": 2, **options}
    return AMFT(
        LanguageModel(len(ALPHABET), 16, 1, 2),
        reward=_TASK.reward,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        end=END,
        length=_TASK.answer_length,
        controller=MetaWeightController(**settings),
        warmup=1,
        rollouts=2,
        critic=Critic(16) if critic else None,
    )


def _train(training: AMFT, epochs: int) -> None:
    draw = torch.Generator().manual_seed(0)
    shown = _TASK.demonstrate(_TASK.prompts(24, draw), draw, wrong=0.4)
    held_out = _TASK.demonstrate(_TASK.prompts(8, draw), draw)
    training.fit(TensorData(*shown, batch_size=8, seed=1), validation=held_out, epochs=training.epoch + epochs)


def _weights(training: AMFT) -> Mapping[str, Tensor]:
    return training.policy.state_dict()


def subjects() -> list[ProcedureSubject]:
    """Plain is the same training with a fixed weight."""
    fixed: dict[str, Any] = {"meta_lr": 0.0, "entropy_lr": 0.0}
    return [
        ProcedureSubject("compared answers", _build, partial(_build, **fixed), _train, _weights),
        ProcedureSubject(
            "value function", partial(_build, critic=True), partial(_build, critic=True, **fixed), _train, _weights
        ),
        ProcedureSubject("meta-gradient", _build, partial(_build, meta_lr=0.0), _train, _weights),
        ProcedureSubject("rule of entropy", _build, partial(_build, entropy_lr=0.0), _train, _weights),
    ]
