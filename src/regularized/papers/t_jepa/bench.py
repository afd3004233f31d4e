"""Cost of a pretraining step, beside a supervised step of the same encoder on the same rows."""

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper
from regularized.self_supervised.t_jepa import TJEPA, MaskSizes, RowClassifier, TabularTransformer, TargetPredictor

CLASSES = 4
CATEGORIES = 5

Shares: TypeAlias = tuple[tuple[float, float], tuple[float, float]]


def _rows(rows: int, numeric: int, categorical: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    codes = torch.randint(CATEGORIES, (rows, categorical), generator=draws).float()
    return torch.cat([torch.rand(rows, numeric, generator=draws), codes], dim=1).to(device())


def _encoder(numeric: int, categorical: int, encoder: dict[str, Any]) -> TabularTransformer:
    return TabularTransformer(range(numeric), {numeric + i: CATEGORIES for i in range(categorical)}, **encoder)


def _jepa(network: TabularTransformer, predictor: dict[str, Any], shares: Shares, targets: int) -> TJEPA:
    return TJEPA(
        network,
        TargetPredictor(network.tokenizer.num_tokens, network.dim, **predictor),
        total_steps=1_000_000,
        sizes=MaskSizes.of_shares(network.num_columns, *shares),
        num_targets=targets,
    )


def _classifier(numeric: int, categorical: int, encoder: dict[str, Any]) -> nn.Module:
    return RowClassifier(_encoder(numeric, categorical, encoder), CLASSES)


def _build(
    numeric: int,
    categorical: int,
    *,
    encoder: dict[str, Any],
    predictor: dict[str, Any],
    shares: Shares,
    targets: int,
    rows: int,
) -> tuple[StepFunction, StepFunction]:
    x = _rows(rows, numeric, categorical)
    y = torch.randint(CLASSES, (rows,), generator=torch.Generator().manual_seed(1)).to(device())
    plain = placed(partial(_classifier, numeric, categorical, encoder))
    network = placed(partial(_encoder, numeric, categorical, encoder))
    assert isinstance(network, TabularTransformer)
    jepa = _jepa(network, predictor, shares, targets).to(device())
    adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    supervised = stepper(lambda: F.cross_entropy(plain(x), y), adamw(plain.parameters()))
    optimizer = adamw(jepa.param_groups(1e-5))

    def pretraining() -> None:
        optimizer.zero_grad()
        jepa(x).backward()
        jepa.before_step()
        optimizer.step()
        jepa.after_step()

    return supervised, pretraining


# The shape in which the official code takes 1.85 times the supervised step, and the official parser's shares.
_MIXED: dict[str, Any] = {
    "numeric": 10,
    "categorical": 6,
    "encoder": {"dim": 64, "depth": 4, "heads": 8, "feedforward": 256},
    "shares": ((0.2, 0.4), (0.2, 0.4)),
    "rows": 256,
}
_PREDICTOR: dict[str, Any] = {"dim": 32, "depth": 4, "heads": 4, "feedforward": 128}
# The authors' run on Jannis, with a quarter of its layers.
_WIDE: dict[str, Any] = {
    "numeric": 54,
    "categorical": 0,
    "encoder": {"dim": 64, "depth": 4, "heads": 2, "feedforward": 64},
    "shares": ((0.136, 0.368), (0.156, 0.622)),
    "rows": 128,
}


def workloads() -> list[Workload]:
    """Sixteen mixed columns, with what makes the predictor cheaper; and the many columns of Jannis."""
    size = "16 columns, B256, d 64 L4"
    return [
        Workload(
            f"{size}, predictor d 32 L4, K 4",
            partial(_build, **_MIXED, predictor=_PREDICTOR, targets=4),
            note="the official code in this shape, without its masks: 1.74",
        ),
        Workload(
            f"{size}, predictor d 32 L2, K 4",
            partial(_build, **_MIXED, predictor={**_PREDICTOR, "depth": 2}, targets=4),
            note="the official parser's depth of the predictor",
        ),
        Workload(
            f"{size}, predictor d 32 L4, K 4, shared context",
            partial(_build, **_MIXED, predictor={**_PREDICTOR, "share_context": True}, targets=4),
        ),
        Workload(
            f"{size}, predictor d 32 L4, K 1",
            partial(_build, **_MIXED, predictor=_PREDICTOR, targets=1),
            note="what the released runs amount to, where all four targets are the same",
        ),
        Workload(
            "54 columns, B128, d 64 L4, predictor d 16 L4, K 4",
            partial(_build, **_WIDE, predictor={"dim": 16, "depth": 4, "heads": 4, "feedforward": 64}, targets=4),
        ),
    ]
