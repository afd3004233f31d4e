"""What users say of generated samples: which of them must not be made any more."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, between, count, share
from regularized.training.randomness import preserved, seed_all

__all__ = ["Feedback", "Latents", "Oracle", "collect_feedback", "latent_sampler", "percent_unlearned", "sample"]

Oracle: TypeAlias = Callable[[Tensor], Tensor]
"""From samples (n, ...) to bool (n,): whether each has what must go. A person, or a classifier."""

Latents: TypeAlias = int | Callable[[int], Tensor]
"""Width of normal latents, or a function from a number to so many latents."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """Generated samples, sorted.

    Args:
        positives: (n, ...) without what must go, S_p.
        negatives: (m, ...) with it, S_n.

    Raises:
        ValueError: one of them is empty.

    Examples:
        >>> Feedback(torch.zeros(5, 2), torch.ones(3, 2)).negatives.shape
        torch.Size([3, 2])
    """

    positives: Tensor
    negatives: Tensor

    def __post_init__(self) -> None:
        if not len(self.negatives):
            raise ValueError(
                "the feedback has no negatives: nothing says what must go. Generate more samples, or look at the oracle"
            )
        if not len(self.positives):
            raise ValueError(
                "the feedback has no positives: nothing says what shall stay. Does the oracle call everything negative?"
            )


def latent_sampler(latents: Latents, model: nn.Module) -> Callable[[int], Tensor]:
    """What draws latents: standard normal ones of a width, on the model's device, or the given function."""
    if callable(latents):
        return latents
    width, like = latents, next(model.parameters(), torch.empty(0))
    return lambda number: torch.randn(number, width, device=like.device, dtype=like.dtype)


@allowed(number=count(1), batch_size=count(1))
def sample(generator: nn.Module, latents: Latents, number: int, *, seed: int = 0, batch_size: int = 500) -> Tensor:
    """Samples of a generator, which runs in evaluation mode and is as it was afterwards.

    Args:
        generator: from latents to samples.
        latents: width of its normal latents, or what draws so many of them.
        number: how many samples.
        seed: of their latents; the global generators are left alone. Default 0.
        batch_size: made at a time; default 500.

    Examples:
        >>> sample(nn.Identity(), 2, 3).shape
        torch.Size([3, 2])
    """
    return torch.cat(_sampled(generator, latents, number, seed, batch_size))


@torch.no_grad()
def _sampled(generator: nn.Module, latents: Latents, number: int, seed: int, batch_size: int) -> list[Tensor]:
    draw = latent_sampler(latents, generator)
    modes = {part: part.training for part in generator.modules()}
    generator.eval()
    try:
        with preserved():
            seed_all(seed)
            return [generator(draw(min(batch_size, number - start))) for start in range(0, number, batch_size)]
    finally:
        for part, mode in modes.items():
            part.training = mode


@allowed(samples=count(1), batch_size=count(1))
def collect_feedback(
    generator: nn.Module,
    oracle: Oracle,
    *,
    latents: Latents,
    samples: int = 5000,
    seed: int = 0,
    batch_size: int = 500,
) -> Feedback:
    """Generate samples, and have each of them judged.

    Args:
        generator: the pretrained one; best its averaged copy (EMA), which is what users see.
        oracle: judges a batch of samples.
        latents: width of its normal latents, or what draws so many of them.
        samples: how many are generated in all; default 5000 (the authors keep so many positives).
        seed: of their latents; default 0.
        batch_size: generated and judged at a time; default 500.

    Raises:
        TypeError: the oracle does not answer by booleans.
        ValueError: its answer has another shape, or all samples are alike.

    Examples:
        >>> feedback = collect_feedback(nn.Identity(), lambda x: x[:, 0] > 1.0, latents=2, samples=100)
        >>> len(feedback.positives) + len(feedback.negatives), bool((feedback.negatives[:, 0] > 1.0).all())
        (100, True)
    """
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for made in _sampled(generator, latents, samples, seed, batch_size):
        unwanted = oracle(made)
        _check_answer(unwanted, made)
        unwanted = unwanted.to(made.device)
        kept[0].append(made[~unwanted])
        kept[1].append(made[unwanted])
    return Feedback(torch.cat(kept[0]), torch.cat(kept[1]))


def _check_answer(answer: Tensor, samples: Tensor) -> None:
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
        got = f"a tensor of {answer.dtype}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise TypeError(
            f"the oracle must answer by booleans, True for what must go; got {got}. Compare its scores or labels "
            "first: `lambda x: classifier(x).argmax(dim=1) == 3`"
        )
    if answer.shape != samples.shape[:1]:
        raise ValueError(
            f"the oracle must answer once for each sample, ({len(samples)},), got {tuple(answer.shape)}; squeeze it"
        )


@allowed(
    before=between(0.0, 1.0, "(]", remedy="where nothing unwanted is generated, there is nothing to unlearn"),
    after=share(),
)
def percent_unlearned(before: float, after: float) -> float:
    """PUL of the paper: by how many per cent the share of unwanted samples fell.

    Args:
        before: share among samples of the pretrained generator, above 0.
        after: share among samples of the unlearned one.

    Raises:
        ValueError: a share is outside [0, 1], or nothing was unwanted before.

    Examples:
        >>> round(percent_unlearned(0.25, 0.025), 6)
        90.0
    """
    return 100.0 * (before - after) / before
