"""References as the encoders get them: a picture fitted into the target, a second of a voice."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fit_picture", "reference_voice"]


def fit_picture(picture: Tensor, size: tuple[int, int], *, white: float = 1.0) -> Tensor:
    """Scale a picture so that it fits, and pad the rest white, on both sides alike.

    Args:
        picture: (C, H, W).
        size: rows and columns of the target.
        white: value of white; default 1.

    Returns:
        (C, *size).

    Raises:
        ValueError: it is no picture, or a size is below 1.

    Examples:
        >>> fit_picture(torch.zeros(1, 2, 2), (2, 4)).tolist()
        [[[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]]
    """
    if picture.ndim != 3 or min(size) < 1:
        raise ValueError(
            f"need a picture (C, H, W) and a size of at least 1 x 1, got {tuple(picture.shape)} and {size}"
        )
    scale = min(size[0] / picture.shape[1], size[1] / picture.shape[2])
    rows, columns = (max(1, round(side * scale)) for side in picture.shape[1:])
    fitted = F.interpolate(picture.unsqueeze(0), (rows, columns), mode="bilinear", antialias=True, align_corners=False)
    above, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    return F.pad(fitted[0], (left, size[1] - columns - left, above, size[0] - rows - above), value=white)


def reference_voice(samples: Tensor, rate: int = 16_000) -> Tensor:
    """A second of a recording: the second one, as in the released code, or the last one of a shorter recording.

    Args:
        samples: (n,) or (channels, n), which are averaged.
        rate: samples a second; default 16000 (released code).

    Returns:
        (rate,).

    Raises:
        ValueError: it is shorter than a second, or the rate is below 1.

    Examples:
        >>> reference_voice(torch.arange(30.0), rate=10).tolist()[:3]
        [10.0, 11.0, 12.0]
    """
    mono = samples.mean(dim=0) if samples.ndim == 2 else samples
    if rate < 1 or len(mono) < rate:
        seconds = len(mono) / max(rate, 1)
        raise ValueError(f"a reference voice must be at least 1 s long, got {seconds:.2f} s at {rate} samples a second")
    start = min(rate, len(mono) - rate)
    return torch.as_tensor(mono[start : start + rate])
