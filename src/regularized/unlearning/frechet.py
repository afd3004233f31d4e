"""How far generated samples are from real ones: the Fréchet distance between Gaussians fitted to their features.

With features of Inception-v3 it is the FID. Those weights are made for photographs, and must be downloaded; here the
features come from a network of the user's own, such as the classifier that judges the samples. So numbers compare only
where the network is the same one. The distance itself is that of torchmetrics, which takes any features.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["frechet_distance"]


@torch.no_grad()
def frechet_distance(real: Tensor, generated: Tensor) -> Tensor:
    """``|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))`` of means and covariances of two sets of features.

    It is biased upwards where there are few samples: compare at equal numbers of them, many more than features.

    Args:
        real: (n, d) features of real samples.
        generated: (m, d) features of generated ones, by the same network.

    Returns:
        Scalar, float64, in squared units of the features; 0 for equal sets, up to rounding.

    Raises:
        ImportError: torchmetrics is not installed; the extra ``lightning`` brings it.
        ValueError: features are no table, of different widths, fewer than two, or not finite.

    Examples:
        >>> real = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> round(frechet_distance(real, real + 2.0).item(), 6)  # the shift alone
        4.0
        >>> round(frechet_distance(real, 3.0 * real).item(), 6)  # (1 - 3)^2, of standard deviations
        4.0
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(
                f"{name} must be features (n, d) of at least two samples, got {tuple(features.shape)}; flatten them, "
                "or average them over positions"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} features are not finite; look at the samples, or at the network that maps them")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real and generated features differ in width: {real.shape[1]} and {generated.shape[1]}; map both by the "
            "same network"
        )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError('torchmetrics is not installed: pip install "regularized[lightning]"') from error
    features_as_they_are: Any = nn.Identity()
    features_as_they_are.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=features_as_they_are).set_dtype(torch.float64).to(real.device)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    distance: Tensor = metric.compute()
    return distance
