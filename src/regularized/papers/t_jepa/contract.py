"""What the contract suite checks of T-JEPA: the pretraining, and the look at a collapse."""

from collections.abc import Mapping
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import DiagnosticSubject, ProcedureSubject
from regularized.self_supervised.t_jepa import (
    TJEPA,
    TabularTransformer,
    TargetPredictor,
    TJEPATraining,
    collapse_report,
)
from regularized.training.data import TensorData

NUMBERS, CATEGORIES = 5, {5: 3, 6: 2}


def rows(count: int) -> Tensor:
    """Five numbers and two categories in each; some are missing."""
    draws = torch.Generator().manual_seed(0)
    codes = [torch.randint(size, (count, 1), generator=draws).float() for size in CATEGORIES.values()]
    x = torch.cat([torch.rand(count, NUMBERS, generator=draws), *codes], dim=1)
    return x.masked_fill(torch.rand(x.shape, generator=draws) < 0.1, float("nan"))


def an_encoder(**settings: Any) -> TabularTransformer:
    """The smallest with a layer of its own for everything."""
    small = {"dim": 8, "depth": 1, "heads": 2, "feedforward": 16, "missing": True, "dropout": 0.1}
    return TabularTransformer(range(NUMBERS), CATEGORIES, **{**small, **settings})


def a_training(*, momentum: tuple[float, float] = (0.9, 1.0), total_steps: int = 12, **settings: Any) -> TJEPATraining:
    """Pretraining of that encoder."""
    encoder = an_encoder()
    predictor = TargetPredictor(encoder.tokenizer.num_tokens, encoder.dim, dim=4, depth=1, heads=2, feedforward=8)
    jepa = TJEPA(encoder, predictor, total_steps=total_steps, momentum=momentum, num_targets=2, **settings)
    return TJEPATraining(jepa, lr=1e-2, warmup=2)


def train(training: TJEPATraining, epochs: int) -> None:
    """So many further epochs of four steps."""
    training.fit(TensorData(rows(32), batch_size=8, seed=1), epochs=training.epochs.done + epochs)


def _weights(training: TJEPATraining) -> Mapping[str, Tensor]:
    return dict(training.jepa.named_parameters())


def _collapse(encoder: nn.Module) -> Mapping[str, Tensor]:
    with torch.no_grad():
        report = collapse_report(encoder(rows(20)))
    return {"report": torch.tensor(astuple(report))}


def subjects() -> list[ProcedureSubject | DiagnosticSubject]:
    """By the paper and as released, each against targets of the encoder itself; and the report."""
    without_average = {"momentum": (0.0, 0.0)}
    return [
        ProcedureSubject("pretraining", a_training, partial(a_training, **without_average), train, _weights),  # type: ignore[arg-type]
        ProcedureSubject(
            "as released",
            partial(a_training, reg_mode="official", repeat_targets=True),
            partial(a_training, reg_mode="official", repeat_targets=True, **without_average),  # type: ignore[arg-type]
            train,
            _weights,
        ),
        DiagnosticSubject("collapse", partial(an_encoder, dropout=0.0), _collapse),
    ]
