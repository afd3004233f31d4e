"""Cost of the penalty in a classifier's step, of cleaning, and of a step of the autoencoder beside a dense one."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper
from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE, normalized_error
from regularized.fine_tuning.sae_regularization.penalty import SelfReg
from regularized.fine_tuning.sae_regularization.procedure import SAETraining

ROWS = 4096  # embeddings in memory, from which each step takes its batch


def _sae(width: int, features: int, k: int) -> TopKSAE:
    sae = placed(TopKSAE, width, features, k=k)
    assert isinstance(sae, TopKSAE)
    return sae


def _classifier(
    batch: int, width: int, features: int, unintended: int, clean: bool
) -> tuple[StepFunction, StepFunction]:
    """A step on embeddings that were cleaned before training; with ``clean`` they are cleaned in every step."""
    z, y = torch.randn(ROWS, width, device=device()), torch.rand(ROWS, device=device()).round()
    mask = torch.arange(features) < unintended
    reg = SelfReg(_sae(width, features, 20).requires_grad_(False), mask, strength=1.0).to(device())

    def build(method: bool) -> StepFunction:
        head = placed(nn.Linear, width, 1, seed=1)
        weight = next(head.parameters())
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0)
        before = reg.clean(z) if method else z

        def loss() -> torch.Tensor:
            rows = torch.randint(ROWS, (batch,), device=device())
            x = reg.clean(z[rows]) if method and clean else before[rows]
            value = F.binary_cross_entropy_with_logits(head(x)[:, 0], y[rows])
            return value + reg(weight) if method else value

        return stepper(loss, optimizer)

    return build(False), build(True)


class _Dense(nn.Module):
    """The same autoencoder without top-k: relu codes, tied weights, a dense decoder."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, width) * (2.0 / width) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x - self.shift, self.weight, self.bias).relu(), self.weight.T, self.shift)


def _autoencoder(batch: int, width: int, features: int, k: int) -> tuple[StepFunction, StepFunction]:
    x = torch.randn(batch, width, device=device())
    dense = placed(_Dense, width, features)
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-3)
    training = SAETraining(_sae(width, features, k))

    def sparse_step() -> None:
        training.training_step(x)

    return stepper(lambda: normalized_error(dense(x), x).mean(), optimizer), sparse_step


def workloads() -> list[Workload]:
    """Penalty at the paper's sizes and at a small one; cleaning in the step; the autoencoder at two sizes."""
    return [
        Workload(
            "penalty, d 4096, 300 unintended features, B 64",
            partial(_classifier, 64, 4096, 4096, 300, False),
            "cleaned once before training; a linear head on 64 rows is less work than the product with 300 directions",
        ),
        Workload(
            "penalty, d 768, 30 unintended features, B 64",
            partial(_classifier, 64, 768, 4096, 30, False),
            "cleaned once before training; a step of a fraction of a millisecond, in which every call counts",
        ),
        Workload(
            "penalty, d 768, 30 unintended features, B 1024",
            partial(_classifier, 1024, 768, 4096, 30, False),
            "cleaned once before training",
        ),
        Workload(
            "penalty and cleaning in every step, d 768, 30 unintended features, B 1024",
            partial(_classifier, 1024, 768, 4096, 30, True),
            "what cleaning once before training saves",
        ),
        Workload(
            "autoencoder, d 256, C 2048, k 16, B 256",
            partial(_autoencoder, 256, 256, 2048, 16),
            "beside a dense autoencoder of the same size; of its five dense products one is left",
            floor=0.2,
        ),
        Workload(
            "autoencoder, d 768, C 6144, k 20, B 256",
            partial(_autoencoder, 256, 768, 6144, 20),
            "beside a dense autoencoder of the same size; of its five dense products one is left",
            floor=0.2,
        ),
    ]
