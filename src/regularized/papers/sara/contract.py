"""What the contract suite checks of SaRA."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Subject, plain
from regularized.fine_tuning.sara.penalty import Polar, polar_factor
from regularized.fine_tuning.sara.term import SaRA
from regularized.training.terms import CrossEntropy


def small_convolutions() -> nn.Module:
    """One convolution with its normalisation."""
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def _both() -> nn.Module:
    """Convolution, normalisation, biases, and matrices of which two are large enough for the penalty."""
    return nn.Sequential(
        small_convolutions(), nn.Linear(24, 72), nn.ReLU(), nn.Linear(72, 72), nn.Linear(72, 72), nn.Linear(72, 4)
    )


def _sara() -> Mapping[str, nn.Module]:
    # On a GPU as its page advises: a singular value decomposition there makes the host wait.
    polar: Polar = "newton_schulz" if torch.cuda.is_available() else "svd"
    return {"task": CrossEntropy(), "sara": SaRA(fraction=0.3, polar=polar)}


def _everything() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "sara": SaRA(threshold=float("inf"), reselect_at=0, lambda_rank=0)}


def _data(n: int, seed: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    return {"inputs": x, "targets": torch.arange(n) % 4, "index": torch.arange(n)}


def _part() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    return partial(polar_factor, method="newton_schulz"), (torch.randn(5, 7),)


def subjects() -> list[Subject]:
    """With penalty and second selection; an infinite threshold without them is plain training, the limit."""
    return [Subject("sara", _both, _sara, plain, _data, off=_everything, part=_part)]
