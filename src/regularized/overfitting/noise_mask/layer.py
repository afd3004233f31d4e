"""Policy-gradient noise mask: a small network learns where to hide the image while the classifier is pre-trained.

For image classifiers that are pre-trained on a mix of modalities, where plain noise augmentation hurts. A policy looks
at each image and gives Beta distributions on a coarse grid; a mask drawn from them is enlarged, blurred and multiplied
with the image. The policy learns by the score-function gradient (REINFORCE) of the classifier's loss. Afterwards it is
thrown away and the classifier is fine-tuned without masks.

    Yavuz, Yang, "Policy Gradient-Driven Noise Mask", 2024, arXiv 2406.14568. Official code:
    github.com/convergedmachine/Policy-Gradient-Driven-Noise-Mask at ece96ae (read from a mirror; no licence file).

==========  =====================  ====================================================================
paper       here                   meaning
==========  =====================  ====================================================================
A, B        ``base_alpha, _beta``  (1, D) running log concentrations, D = grid^2
a, b        ``alpha, beta``        (B, D) log concentrations of each image: decay A + (1 - decay) head
m           ``cells``              (B, D) mask on the grid, drawn from Beta(exp a, exp b), a constant
q           ``log_density``        (B,) log sum over the cells of the density of the drawn mask
==========  =====================  ====================================================================

Paper and code differ: the abstract speaks of additive noise, the code multiplies; we follow the code. Its loss is the
*product* of the batch's mean cross-entropy with the mean q, so q also scales the classifier's gradient (log D at
first) and turns its sign where q < 0. That is the default, for parity; ``coupled=False`` and ``credit="sample"`` are
the cures.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, count, positive, share
from regularized.overfitting.noise_mask.loss import beta_log_density

__all__ = ["BetaMaskPolicy", "MaskedInput", "NoiseMask", "gaussian_blur"]

# Shapes: B images, C channels, S side of the image, G side of the grid, D = G * G cells.

_LARGEST_LOG = 10.0  # concentrations beyond e^10 overflow the density in float32; the official code has no bound


def gaussian_blur(images: Tensor, kernel: int, sigma: float) -> Tensor:
    """Separable Gaussian blur with reflected borders; the weights sum to 1, so a constant stays one.

    Args:
        images: (B, C, S, S).
        kernel: width of the kernel, odd; 1 changes nothing. ``kernel // 2`` must be below S.
        sigma: standard deviation in pixels.

    Returns:
        (B, C, S, S).

    Examples:
        >>> torch.allclose(gaussian_blur(torch.full((1, 1, 5, 5), 0.3), 3, 1.0), torch.tensor(0.3))
        True
    """
    if kernel == 1:
        return images
    half = kernel // 2
    at = torch.arange(-half, half + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (at / sigma) ** 2)
    weights = weights / weights.sum()
    channels = images.shape[1]
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    rows = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


class BetaMaskPolicy(nn.Module):
    """Gives the log concentrations of the mask for each image.

    Two heads (linear, batch norm, ReLU, twice, then linear) on the pooled features of a small network, averaged with a
    running state that all images share.

    Args:
        backbone: maps images to features (B, features); the authors use a ResNet-10t.
        features: width of the features; 512 there.
        grid: side G of the mask's grid; default 64 (official code), for images of 224 pixels.
        decay: share of the running state in the concentrations of an image; default 0.9 (official code).
        momentum: share of the running state that stays at each update; default 0.99 (official code).
        twice: update the heads' batch statistics twice a step, as the official code does by running the heads twice;
            default False.
        seed: of the starting state, uniform in [0, 1).

    Attributes:
        base_alpha: (1, D) buffer, running log of the first concentration.
        base_beta: (1, D) buffer, running log of the second one.

    Raises:
        ValueError: a setting is outside its range.

    Examples:
        >>> policy = BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), features=8, grid=4)
        >>> alpha, beta = policy(torch.randn(5, 1, 8, 8))
        >>> alpha.shape
        torch.Size([5, 16])
    """

    base_alpha: Tensor
    base_beta: Tensor

    @allowed(features=count(1), grid=count(1), decay=share(), momentum=share())
    def __init__(
        self,
        backbone: nn.Module,
        *,
        features: int = 512,
        grid: int = 64,
        decay: float = 0.9,
        momentum: float = 0.99,
        twice: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.grid = grid
        self.decay = decay
        self.momentum = momentum
        cells = grid * grid
        self.alpha_head: nn.Sequential = _head(features, cells)
        self.beta_head: nn.Sequential = _head(features, cells)
        if twice:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d):
                    # Twice the same batch with momentum p moves the statistics as once with 1 - (1 - p)^2.
                    module.momentum = 1 - (1 - (module.momentum or 0.0)) ** 2
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("base_alpha", torch.rand(1, cells, generator=generator))
        self.register_buffer("base_beta", torch.rand(1, cells, generator=generator))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Log concentrations (B, D) of both kinds; in training mode the running state moves afterwards.

        Raises:
            ValueError: a batch of one image in training mode, which batch normalisation cannot take.
        """
        if self.training and len(images) < 2:
            raise ValueError(
                "BetaMaskPolicy needs at least 2 images in a training batch, since its heads normalise over the batch; "
                f"got {len(images)}. Drop the last incomplete batch"
            )
        features = self.backbone(images)
        heads = self.alpha_head(features), self.beta_head(features)
        alpha = torch.lerp(heads[0], self.base_alpha.to(heads[0].dtype), self.decay)
        beta = torch.lerp(heads[1], self.base_beta.to(heads[1].dtype), self.decay)
        if self.training:
            with torch.no_grad():
                for base, head in zip((self.base_alpha, self.base_beta), heads, strict=True):
                    base.lerp_(head.mean(dim=0, keepdim=True).to(base.dtype), 1 - self.momentum)
        return alpha, beta


class MaskedInput(NamedTuple):
    """Images under their masks.

    Attributes:
        images: (B, C, S, S) image times mask.
        log_density: (B,) q, log of the summed density of the drawn cells; differentiable in the policy.
        mask: (B, 1, S, S) what the images were multiplied with.
        cells: (B, D) the mask on its grid, as drawn.
    """

    images: Tensor
    log_density: Tensor
    mask: Tensor
    cells: Tensor


class NoiseMask(nn.Module):
    """Draw a mask from the policy, enlarge it, blur it, and multiply.

    Masks are drawn in training mode only. In evaluation mode the images come back as they are, unless
    ``mask_in_evaluation``: then one mask drawn from the running state is laid on the whole batch, as in the official
    evaluation between the phases.

    Args:
        policy: a :class:`BetaMaskPolicy`, or a module of the same form.
        kernel: width of the blur, odd; default 13 (official code). 1 does not blur.
        sigma: standard deviation of the blur in pixels; default 6 (official code).
        mask_in_evaluation: default False.

    Raises:
        ValueError: an even kernel, a sigma that is not positive; at the first batch, a grid larger than the image or a
            kernel too wide for it.

    Warns:
        UserWarning: a log concentration is beyond +-10 and is clamped. Looked at on the CPU only, without a sync.

    Examples:
        >>> policy = BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), features=8, grid=4)
        >>> out = NoiseMask(policy, kernel=3, sigma=1.0)(torch.ones(5, 1, 8, 8))
        >>> out.images.shape, out.log_density.shape, bool((out.images < 1).all())
        (torch.Size([5, 1, 8, 8]), torch.Size([5]), True)
    """

    @allowed(sigma=positive("in pixels"))
    def __init__(
        self, policy: BetaMaskPolicy, *, kernel: int = 13, sigma: float = 6.0, mask_in_evaluation: bool = False
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {kernel}; try {kernel + 1}")
        self.policy = policy
        self.kernel = kernel
        self.sigma = sigma
        self.mask_in_evaluation = mask_in_evaluation

    def forward(self, images: Tensor, *, cells: Tensor | None = None) -> MaskedInput:
        """Mask a batch.

        Args:
            images: (B, C, S, S).
            cells: (B, D) a mask to use instead of a drawn one, in (0, 1).

        Returns:
            The masked images with the log density of their masks.
        """
        self._check(images)
        if not self.training and cells is None:
            return self._evaluate(images)
        alpha, beta = self.policy(images)
        alpha, beta = _bounded(alpha), _bounded(beta)
        if cells is None:
            with torch.no_grad():  # REINFORCE: no gradient flows through the mask itself
                cells = _draw(alpha.exp(), beta.exp())
        log_density = torch.logsumexp(beta_log_density(cells, alpha, beta), dim=1)
        mask = self.enlarge(cells, images.shape[-1])
        return MaskedInput(images * mask, log_density, mask, cells)

    def enlarge(self, cells: Tensor, side: int) -> Tensor:
        """(B, D) cells to (B, 1, side, side): nearest neighbours, then blur."""
        grid = self.policy.grid
        mask = cells.view(-1, 1, grid, grid)
        if grid != side:
            mask = F.interpolate(mask, size=(side, side))
        return gaussian_blur(mask, self.kernel, self.sigma)

    def _evaluate(self, images: Tensor) -> MaskedInput:
        none = images.new_zeros(len(images))
        if not self.mask_in_evaluation:
            ones = images.new_ones(len(images), 1, *images.shape[-2:])
            return MaskedInput(images, none, ones, images.new_ones(len(images), self.policy.grid**2))
        cells = _draw(self.policy.base_alpha.exp(), self.policy.base_beta.exp()).to(images.dtype)
        mask = self.enlarge(cells, images.shape[-1])
        return MaskedInput(images * mask, none, mask.expand(len(images), -1, -1, -1), cells.expand(len(images), -1))

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
            raise ValueError(f"NoiseMask needs square images of shape (B, C, S, S), got {tuple(images.shape)}")
        side = images.shape[-1]
        if self.policy.grid > side:
            raise ValueError(
                f"the grid of {self.policy.grid} is larger than the image of {side} pixels; use grid <= {side}"
            )
        if self.kernel // 2 >= side:
            raise ValueError(
                f"a kernel of {self.kernel} cannot be reflected at the border of an image of {side} pixels; use at "
                f"most {2 * side - 1}"
            )


def _head(features: int, cells: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, features),
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, features),
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, cells),
    )


def _draw(one: Tensor, two: Tensor) -> Tensor:
    cells = torch.distributions.Beta(one, two, validate_args=False).sample()
    tiny = torch.finfo(cells.dtype).eps  # at exactly 0 or 1 a density can be infinite
    return cells.clamp_(tiny, 1 - tiny)


def _bounded(logs: Tensor) -> Tensor:
    if not logs.is_cuda and bool((logs.detach().abs() > _LARGEST_LOG).any()):
        warnings.warn(
            f"log concentrations reach {float(logs.detach().abs().max()):.3g} and are clamped to +-{_LARGEST_LOG:g}, "
            "where no gradient flows; lower the policy's learning rate",
            stacklevel=4,
        )
    return logs.clamp(-_LARGEST_LOG, _LARGEST_LOG)
