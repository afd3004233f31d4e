"""Cost of the term on pairs of the task's batch, and of the official second batch, beside a plain step."""

from functools import partial

import torch
from torch import nn

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper
from regularized.mechanisms.taps import Taps
from regularized.papers.homomorphism_error.experiment import Transformer, task_loss
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step
from regularized.understanding.homomorphism_error.command_language import MODIFIERS, VOCABULARY, WORDS, commands, encode
from regularized.understanding.homomorphism_error.penalty import CompositionOperators
from regularized.understanding.homomorphism_error.pool import PairPool
from regularized.understanding.homomorphism_error.term import Compositionality

_WORDS = [VOCABULARY.index(word) for word in WORDS]
_MODIFIERS = [VOCABULARY.index(word) for word in MODIFIERS]


def _build(width: int, layers: int, pool_size: int) -> tuple[StepFunction, StepFunction]:
    pairs = commands(2, noise=9, largest=64)
    x, y = (encode(side).to(device()) for side in zip(*pairs, strict=True))
    plain, net = (placed(Transformer, width, layers) for _ in range(2))
    names = [f"blocks.{k}" for k in sorted({(layers - 1) // 2, layers - 1})]
    operators = CompositionOperators(width, _MODIFIERS).to(device())
    term = Compositionality(width, words=_WORDS, modifiers=_MODIFIERS, layers=names).to(device())
    pool, draws = PairPool.mine(x, _WORDS, _MODIFIERS), torch.Generator().manual_seed(0)
    adam = partial(torch.optim.Adam, lr=1e-4)
    own: nn.Module = operators if pool_size else term
    optimizers = adam(plain.parameters()), adam([*net.parameters(), *own.parameters()])

    def with_pool() -> torch.Tensor:
        return task_loss(net(x), y) + 0.2 * pool.sample(pool_size, draws).loss(net, names, operators)

    def with_term() -> torch.Tensor:
        batch = Batch.of({"inputs": x, "targets": y})
        with Taps(net, names) as taps:
            step = Step(net, batch, Progress(0, 1), taps.states)
            loss: torch.Tensor = task_loss(step.logits, y) + 0.2 * term(step) / term.count(batch)
            return loss

    method = stepper(with_pool if pool_size else with_term, optimizers[1])
    return stepper(lambda: task_loss(plain(x), y), optimizers[0]), method


def workloads() -> list[Workload]:
    """Pairs of the batch, and the official pool of 256."""
    return [
        Workload("d 64, L 2, B 64 x 15", partial(_build, 64, 2, 0), "pairs of the task's batch"),
        Workload("d 128, L 4, B 64 x 15", partial(_build, 128, 4, 0), "pairs of the task's batch"),
        Workload(
            "d 128, L 4, B 64 x 15, pool 256",
            partial(_build, 128, 4, 256),
            "the official second batch, four times as many sequences",
            floor=5.0,
        ),
    ]
