"""Image denoising as a lower problem: smoothed total variation and Fields of Experts, with their constants.

    TV:   h(x, theta) = [ 1/2 ||x - y||² + 1/2 e^theta_0 sum sqrt(|Dx|² + nu²) ] / N,   nu = e^theta_1
    FoE:  h(x, theta) = [ 1/2 ||x - y||² + 1/2 e^s sum_i e^a_i sum sqrt(|k_i * x|² + nu_i²) ] / N,   nu_i = e^b_i

for N noisy images y. The data term makes h strongly convex with mu = 1 / N. Its largest curvature is (1 + 1/2 max over
frequencies of sum_i w_i / nu_i |k_i^|²) / N with the weights w_i and the filters' Fourier transforms k_i^; for the
differences of TV that is at most (1 + 4 e^(theta_0 - theta_1)) / N. (The official code has sqrt(8) in place of 4, which
is too small, and forgets N in both.)
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FieldsOfExperts", "SquaredError", "TotalVariation", "add_noise", "psnr"]


def add_noise(images: Tensor, std: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Images with Gaussian noise of that standard deviation; the paper's is 0.1 for images in [0, 1].

    Examples:
        >>> add_noise(torch.zeros(2, 4, 4), 0.0).abs().max().item()
        0.0
    """
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return images + std * noise


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (N,), of images in [0, 1]; values beyond are clipped.

    Args:
        images: (N, H, W).
        clean: likewise.

    Examples:
        >>> psnr(torch.full((1, 2, 2), 0.6), torch.full((1, 2, 2), 0.5))
        tensor([20.0000])
    """
    error = (images.clamp(0.0, 1.0) - clean).square().mean(dim=(-2, -1))
    return -10.0 * torch.log10(error)


class SquaredError(nn.Module):
    """Upper loss ``1/2 ||x - clean||² / N``. Its gradient has the Lipschitz constant 1 / N, :attr:`lipschitz`.

    Args:
        clean: (N, H, W).

    Examples:
        >>> SquaredError(torch.zeros(2, 1, 1))(torch.ones(2, 1, 1))
        tensor(0.5000)
    """

    clean: Tensor

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.register_buffer("clean", clean.detach().clone())
        self.lipschitz: float = 1.0 / len(clean)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, H, W) to a scalar."""
        return 0.5 * (x - self.clean).square().sum() / len(x)


class _Denoising(nn.Module):
    """What both lower objectives share: the noisy images."""

    noisy: Tensor

    def __init__(self, noisy: Tensor) -> None:
        super().__init__()
        if noisy.dim() != 3 or not noisy.is_floating_point():
            raise ValueError(f"noisy must be grey images (N, H, W), floating point, got {tuple(noisy.shape)}")
        self.register_buffer("noisy", noisy.detach().clone())

    @property
    def mu(self) -> float:
        """Constant of strong convexity."""
        return 1.0 / len(self.noisy)

    def _misfit(self, x: Tensor) -> Tensor:
        return 0.5 * (x - self.noisy).square().sum()


class TotalVariation(_Denoising):
    """Denoising by smoothed total variation, with theta = (log weight, log smoothing).

    Args:
        noisy: y, (N, H, W).

    Raises:
        ValueError: the images have another shape.

    Examples:
        >>> lower = TotalVariation(torch.rand(2, 8, 8))
        >>> theta = lower.start()
        >>> lower(lower.noisy, theta).shape, float(lower.L(theta))
        (torch.Size([]), 2.5)
    """

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        """h, a scalar, of images (N, H, W)."""
        weight, smoothing = theta.exp()
        squared = smoothing**2
        variation = sum((x.diff(dim=dim).square() + squared).sqrt().sum() for dim in (1, 2))
        value: Tensor = (self._misfit(x) + 0.5 * weight * variation) / len(x)
        return value

    def L(self, theta: Tensor) -> Tensor:
        """Lipschitz constant of the gradient in x."""
        return (1.0 + 4.0 * (theta[0] - theta[1]).exp()) * self.mu

    def start(self) -> Tensor:
        """The paper's: (-5, -5)."""
        return torch.full((2,), -5.0, dtype=self.noisy.dtype, device=self.noisy.device)


class FieldsOfExperts(_Denoising):
    """Denoising by a Field of Experts: filters, their weights and their smoothing are all learned.

    theta is a dictionary: ``filters`` (K, 1, k, k), ``weights`` (K,) and ``smoothing`` (K,), both logarithms, and
    ``scale`` (), the logarithm of a common weight. Filters are applied where they fit into the image, without padding.

    Args:
        noisy: y, (N, H, W).

    Raises:
        ValueError: the images have another shape, or are smaller than the filters.

    Examples:
        >>> lower = FieldsOfExperts(torch.rand(2, 8, 8))
        >>> theta = lower.start(filters=3, size=5)
        >>> lower(lower.noisy, theta).shape, bool(lower.L(theta) > lower.mu)
        (torch.Size([]), True)
    """

    def forward(self, x: Tensor, theta: dict[str, Tensor]) -> Tensor:
        """h, a scalar, of images (N, H, W)."""
        responses = F.conv2d(x[:, None], theta["filters"])
        nu = theta["smoothing"].exp()[:, None, None]
        experts = (responses.square() + nu**2).sqrt().sum(dim=(0, 2, 3))
        return (self._misfit(x) + 0.5 * theta["scale"].exp() * (theta["weights"].exp() @ experts)) / len(x)

    def L(self, theta: dict[str, Tensor]) -> Tensor:
        """Lipschitz constant of the gradient in x, from the filters' Fourier transforms.

        Filters that are applied where they fit are rows of a circular convolution on a torus that is larger by the
        filter: its spectrum bounds theirs.
        """
        size = theta["filters"].shape[-1]
        torus = [side + size - 1 for side in self.noisy.shape[1:]]
        spectrum = torch.fft.rfft2(theta["filters"][:, 0], s=torus).abs().square()
        share = (theta["weights"] - theta["smoothing"] + theta["scale"]).exp()
        curvature: Tensor = (1.0 + 0.5 * (share[:, None, None] * spectrum).sum(dim=0).max()) * self.mu
        return curvature

    def start(self, filters: int = 48, size: int = 7, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A start: random filters of mean 0, weights e^-3, smoothing e^-3.5, as in the official code.

        Args:
            filters: K; default 48 (official code).
            size: k; default 7 (official code).
            generator: of the filters.
        """
        if size > min(self.noisy.shape[1:]):
            raise ValueError(f"filters of size {size} do not fit into images {tuple(self.noisy.shape[1:])}")
        like: Any = {"dtype": self.noisy.dtype, "device": self.noisy.device}
        # Normal values of Glorot's variance for one channel in and out.
        drawn = torch.randn(filters, 1, size, size, generator=generator, **like) / math.sqrt(size)
        return {
            "filters": drawn - drawn.mean(dim=(-2, -1), keepdim=True),
            "weights": torch.full((filters,), -3.0, **like),
            "smoothing": torch.full((filters,), -3.5, **like),
            "scale": torch.full((), -3.0, **like),
        }
