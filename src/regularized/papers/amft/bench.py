"""Cost of a learned weight beside the same mixture with a fixed one, of two losses on one forward pass, and of a step.

No package has it. A step of the mixture costs what answers cost; what the controller adds comes once in twenty steps.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from regularized.alignment.amft.controller import MetaWeightController
from regularized.alignment.amft.loss import imitation_loss, log_probs_and_entropy, masked_mean, policy_loss
from regularized.alignment.amft.mixing import Mixer
from regularized.alignment.amft.schedule import ScheduledWeight
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed
from regularized.evidence.language_models import LanguageModel

_VOCABULARY, _PROMPT, _ANSWER = 128, 16, 16


def _tokens(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_VOCABULARY, (rows, _PROMPT + _ANSWER), generator=generator).to(device())


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens[:, :-1])[:, _PROMPT - 1 :]
    return logits


def _losses(model: nn.Module, shown: Tensor, drawn: Tensor, *, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    answers = drawn[:, _PROMPT:]
    advantages = torch.linspace(-1.0, 1.0, len(drawn), device=drawn.device)[:, None].expand_as(answers)
    if shared:  # both losses look at the same rows
        logits = _logits(model, drawn)
        sft = imitation_loss(logits, answers)
    else:
        sft = imitation_loss(_logits(model, shown), shown[:, _PROMPT:])
        logits = _logits(model, drawn)
    log_probs, entropies = log_probs_and_entropy(logits, answers)
    entropy = masked_mean(entropies)
    return sft, policy_loss(log_probs, log_probs.detach(), advantages) - 0.01 * entropy, entropy.detach()


def _step(controller: Callable[[], Mixer], steps: int, *, shared: bool) -> StepFunction:
    model = placed(LanguageModel, _VOCABULARY, 64, 2, 2)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    mixer = controller()
    mixer.set_target_entropy(5.0)
    shown, drawn, held_out = _tokens(4, 0), _tokens(16, 1), _tokens(4, 2)

    def step() -> None:
        for _ in range(steps):
            sft, rl, entropy = _losses(model, shown, drawn, shared=shared)
            mixer.backward(
                sft=sft,
                rl=rl,
                params=params,
                entropy=entropy,
                val_loss=lambda: imitation_loss(_logits(model, held_out), held_out[:, _PROMPT:]),
                lr=1e-4,
            )
            optimizer.step()

    return step


def _pair(every: int, *, shared: bool = False) -> tuple[StepFunction, StepFunction]:
    """As many steps as lie between two meta-gradients, so that each measurement holds one."""
    return (
        _step(lambda: ScheduledWeight(0.5), every, shared=shared),
        _step(lambda: MetaWeightController(every=every), every, shared=shared),
    )


def workloads() -> list[Workload]:
    """One cycle of a controller beside the same steps with a fixed weight; answers are given, not drawn."""
    size = "LM 117k weights, 4 demonstrations and 16 answers of 32 tokens"
    return [
        Workload(
            f"{size}, meta-gradient every 20 steps",
            partial(_pair, 20),
            "20 steps; drawing answers would come on top of both",
        ),
        Workload(f"{size}, meta-gradient on every step", partial(_pair, 1), floor=1.2),
        Workload(
            "the same, both losses on one forward pass of 16 answers, every 20 steps", partial(_pair, 20, shared=True)
        ),
        Workload(
            "the same, both losses on one forward pass, on every step",
            partial(_pair, 1, shared=True),
            "a second backward pass through the same graph",
            floor=1.67,
        ),
    ]
