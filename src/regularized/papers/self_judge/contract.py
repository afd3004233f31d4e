"""What the contract suite checks of Self-Judge: the term with a column that is hidden, and a judge of sequences."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.alignment.self_judge import (
    Answer,
    Judge,
    PrivilegedDistillation,
    PrivilegedView,
    Vocabulary,
    view_of,
)
from regularized.evidence.contract import Classification, ProcedureSubject, Subject, Terms, plain

TASK = Classification()


def _hide(x: Tensor) -> Tensor:
    """The last two of six columns are missing in use."""
    return torch.cat([x[:, :4], torch.zeros_like(x[:, 4:])], dim=1)


def _on(weight: float = 1.0) -> Terms:
    return {**plain(), "privileged": PrivilegedView(_hide, weight=weight)}


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(8, 4, generator=generator).requires_grad_() for _ in range(2))
    return PrivilegedDistillation(), (z1, z2, torch.arange(8) % 4)


class Reader(nn.Module):
    """The smallest causal language model: what was read so far decides the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.say = nn.Embedding(128, 8), nn.Linear(8, 128)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, L) tokens to (B, L, 128)."""
        seen = (self.read(tokens) * mask[..., None]).cumsum(1) / mask.cumsum(1).clamp(min=1).sqrt()[..., None]
        logits: Tensor = self.say(nn.functional.dropout(seen, 0.1, self.training))
        return logits


def _logits(model: nn.Module, tokens: Tensor, mask: Tensor, k: int) -> Tensor:
    logits: Tensor = model(tokens, mask)[:, -k:]
    return logits


def _encode(text: str) -> list[int]:
    return list(text.encode("ascii"))


def _build(alpha: float, alpha_kd: float) -> Judge:
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    vocabulary = Vocabulary.of(_encode, end=2)
    return Judge(Reader(), vocabulary, optimizer=optimizer, alpha=alpha, alpha_kd=alpha_kd, logits=_logits)


def _train(judge: Judge, epochs: int) -> None:
    graded = [Answer(str(n), f"{n} + 1?", str(n + n % 2), str(n + 1), 9 * (n % 2)) for n in range(12)]
    seen, blind = (view_of(graded, _encode, with_reference=with_it) for with_it in (True, False))
    judge.fit(seen, blind, epochs=judge.epochs.done + epochs, batch_size=4)


def _weights(judge: Judge) -> Mapping[str, Tensor]:
    return judge.model.state_dict()


def subjects() -> list[Subject | ProcedureSubject]:
    """The term beside cross-entropy; the judge, against one that learns from the view with reference alone."""
    return [
        Subject("term", TASK.model, _on, plain, TASK.data, off=partial(_on, 0.0), part=_part),
        ProcedureSubject("judge", partial(_build, 0.3, 2.0), partial(_build, 0.0, 0.0), _train, _weights),
    ]
