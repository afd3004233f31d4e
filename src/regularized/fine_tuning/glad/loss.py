"""The loss of few-shot tuning: a class is what its description says, its logit the similarity of image and text."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["clip_logits", "few_shot_loss"]

# Shapes: B images, C classes, D width of the shared space.


def clip_logits(image: Tensor, text: Tensor, *, logit_scale: float | Tensor = 100.0) -> Tensor:
    """Similarity of images with the texts of the classes: the scaled cosine.

    Args:
        image: (B, D) image features.
        text: (C, D) text features, one description a class.
        logit_scale: s, inverse temperature; default 100, CLIP's.

    Returns:
        (B, C) ``s cos(image, text)``.

    Examples:
        >>> import torch
        >>> clip_logits(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), logit_scale=10.0)
        tensor([[10.,  0.]])
    """
    return logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def few_shot_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the described classes.

    Args:
        logits: (B, C).
        labels: (B,) int64 in [0, C). Looked at on the CPU; on another device torch's own assertion answers.

    Raises:
        ValueError: a label has no description.

    Examples:
        >>> import torch
        >>> few_shot_loss(torch.zeros(3, 4), torch.tensor([0, 3, 1]))
        tensor(1.3863)
    """
    classes = logits.shape[-1]
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be in [0, {classes}), the classes that have a description; got {int(labels.min())} to "
            f"{int(labels.max())}. Number the classes of the few shots from 0, in the order of their descriptions"
        )
    return F.cross_entropy(logits, labels)
