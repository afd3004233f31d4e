"""Cost of BackSlash beside a plain step, and the size of the file that a model trained with it is written to.

The nearest competitor is the authors' repository, whose licence forbids to build on it; the sheet measured 1.07 for it.
What somebody would write without it, the formula by autograd with the shape looked up on the host, is timed here.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.compression.generalized_gaussian import GeneralizedGaussian, Shrinker, rate
from regularized.compression.generalized_gaussian.distribution import ratio_table
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, device, on_first_call, perceptron, placed, stepper
from regularized.evidence.experiment import run_arm
from regularized.evidence.language_models import next_token_loss, small_lm
from regularized.papers.generalized_gaussian import experiment

Penalty = Callable[[Iterable[nn.Parameter]], Callable[[], Tensor]]


def _in_loss(parameters: Iterable[nn.Parameter]) -> Callable[[], Tensor]:
    weights = list(parameters)
    return partial(rate, weights, table=ratio_table(weights[0].device))


def _by_autograd(parameters: Iterable[nn.Parameter]) -> Callable[[], Tensor]:
    weights = list(parameters)

    def penalty() -> Tensor:
        shape = GeneralizedGaussian.fit(*weights).shape
        number = sum(w.numel() for w in weights)
        return torch.stack([(w.abs() + 1e-3).pow(shape).sum() for w in weights]).sum() / number

    return penalty


def _step(build: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], penalty: Penalty | None) -> StepFunction:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if penalty is None:
        return stepper(lambda: loss(model), optimizer)
    pull = penalty(model.parameters())
    return stepper(lambda: loss(model) + 0.1 * pull(), optimizer)


def _decoupled_step(build: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor]) -> StepFunction:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shrinker = Shrinker(model.parameters(), 1e-3)
    optimizer.register_step_post_hook(lambda *_: shrinker.step() and None)
    return stepper(lambda: loss(model), optimizer)


def _pair(
    make: Callable[[], tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]], penalty: Penalty | None
) -> tuple[StepFunction, StepFunction]:
    build, loss = make()
    method = partial(_decoupled_step, build, loss) if penalty is None else partial(_step, build, loss, penalty)
    return on_first_call(partial(_step, build, loss, None)), on_first_call(method)


def _images() -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]:
    x, y = batch((128, 784))
    return partial(placed, perceptron), lambda model: F.cross_entropy(model(x), y)


def _text(
    width: int, layers: int, heads: int, windows: int
) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]:
    ids = torch.randint(1024, (windows, 65), generator=torch.Generator().manual_seed(0)).to(device())
    return (
        lambda: small_lm(0, 1024, width=width, layers=layers, heads=heads).to(device()),
        lambda model: next_token_loss(model, ids),
    )


def _kept() -> tuple[float, float]:
    """Bytes of a trained language model's numbers, and of the two files that are made of it."""
    measured = run_arm(experiment, "text_backslash", 1000, "laptop").metrics
    return measured["file_bytes"] / measured["file_ratio"], measured["file_bytes"]


def workloads() -> list[Workload]:
    """An MLP whose step is mostly weights, and language models of two sizes."""
    small, large = partial(_text, 64, 3, 2, 16), partial(_text, 128, 4, 4, 16)
    return [
        Workload(
            "MLP 784-256-10, B 128", partial(_pair, _images, _in_loss), "mostly weights: the worst case", floor=1.1
        ),
        Workload("LM 0.28M, 1,024 tokens", partial(_pair, small, _in_loss), "size: after training on text", kept=_kept),
        Workload("LM 1.07M, 1,024 tokens", partial(_pair, large, _in_loss)),
        Workload("LM 1.07M, 4,096 tokens", partial(_pair, partial(_text, 128, 4, 4, 64), _in_loss)),
        Workload("the same at 1,024, decoupled", partial(_pair, large, None)),
        Workload("the same at 1,024, by autograd", partial(_pair, large, _by_autograd), "what one would write"),
    ]
