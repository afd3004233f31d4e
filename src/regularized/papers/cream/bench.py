"""Cost of a training step beside DPO with the reference's log-probabilities kept, and beside fine-tuning on one half.

The larger network is that of our measurements of the authors' code, which took 1.01 of DPO and 1.89 of fine-tuning.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.alignment.cream.procedure import CREAM
from regularized.alignment.sampling import sample_responses
from regularized.alignment.sequence_log_probs import next_token_logits, sequence_log_probs
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed
from regularized.evidence.language_models import LanguageModel
from regularized.training.progress import Progress
from regularized.training.step import Batch

_TOKENS, _LENGTH, _PROMPT = 2048, 128, 64
_BETA = 0.1


def _model(width: int, layers: int, seed: int) -> nn.Module:
    return placed(partial(LanguageModel, _TOKENS, width, layers, 4), seed=seed)


def _pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(_TOKENS, (count, 2, _LENGTH), generator=generator)
    mask = torch.arange(_LENGTH).expand(count, 2, -1) >= _PROMPT
    return tokens, mask, -400.0 + torch.randn(count, 2, generator=generator)


def _plain(model: nn.Module, tokens: Tensor, mask: Tensor, reference: Tensor | None) -> StepFunction:
    """DPO, or without a reference fine-tuning on the chosen half; with AdamW and clipping, as the method."""
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01)
    rows = slice(None) if reference is not None else slice(0, 1)
    tokens, mask = (given[:, rows].flatten(0, 1).to(device()) for given in (tokens, mask))
    kept = None if reference is None else reference.to(device())

    def step() -> None:
        log_probs = sequence_log_probs(next_token_logits(model, tokens), tokens, mask)
        if kept is None:
            loss = -log_probs.mean()
        else:
            gain = log_probs.view(-1, 2) - kept
            loss = -F.logsigmoid(_BETA * (gain[:, 0] - gain[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _workload(width: int, layers: int, count: int, *, dpo: bool) -> tuple[StepFunction, StepFunction]:
    tokens, mask, reference = _pairs(count)
    plain = _plain(_model(width, layers, 0), tokens, mask, reference if dpo else None)
    cream = CREAM(
        _model(width, layers, 0),
        _model(width, layers, 1),
        sample=partial(sample_responses, max_new_tokens=1),
        optimizer=partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.01),
        schedule=1.0,
    )
    label = torch.full((count,), 0.8)
    batch = Batch(
        {"tokens": tokens, "mask": mask}, None, torch.arange(count), {"reference": reference, "consistency": label}
    )

    def step() -> None:
        cream.training_step(batch, progress=Progress(0, 1))

    return plain, step


def workloads() -> list[Workload]:
    """Four pairs of 128 tokens, half of them the prompt."""
    small, large = "LM d 128 L 2, T 128, 4 pairs", "LM d 256 L 4, T 128, vocabulary 2,048, 4 pairs"
    halves = "chosen and rejected are twice the tokens of the chosen alone"
    return [
        Workload(f"{small}, beside DPO", partial(_workload, 128, 2, 4, dpo=True)),
        Workload(f"{large}, beside DPO", partial(_workload, 256, 4, 4, dpo=True)),
        Workload(
            f"{large}, beside fine-tuning on the chosen half",
            partial(_workload, 256, 4, 4, dpo=False),
            halves,
            floor=2.0,
        ),
    ]
