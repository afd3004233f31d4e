"""Which patch goes into which hole: a classification within one image.

Symbols of arXiv 1906.02940 and their names here:

    B, N, D        images, patches of each, width of a patch's feature
    T              ``num_targets``  patches of each image that are cut out
    P              ``trunk``        the patch network, the first stages of the classifier that is wanted
    A              ``pool``         attention pooling
    h              ``candidates``   (B, T, D) features of the patches that were cut out: the answers to choose from
    u              ``summary``      (B, D) what is made of the other patches
    e(p)           ``places``       (B, T, D) embeddings of the holes: the questions
    v_t            u + e(p_t)

    logits         s[t, k] = <u + e(p_t), h_k>
    loss           - mean over images and holes of  log softmax_k s[t, k]  at  k = t

The wrong answers are the other patches of the same image, so there is no memory bank and no second network. Nothing is
normalised and nothing detached: gradients reach questions and answers.
"""

import torch
from torch import Tensor

__all__ = ["selection_accuracy", "selection_logits", "selection_loss"]


def selection_logits(summary: Tensor, places: Tensor, candidates: Tensor) -> Tensor:
    """How well each patch fits into each hole of its image.

    Args:
        summary: (B, D).
        places: (B, T, D) embeddings of the holes.
        candidates: (B, T, D) features of the patches that belong there, in the same order.

    Returns:
        (B, T, T), holes in rows and patches in columns, in float32 or wider.

    Raises:
        ValueError: shapes do not fit.

    Examples:
        >>> selection_logits(torch.zeros(1, 2), torch.eye(2)[None], 3 * torch.eye(2)[None]).tolist()
        [[[3.0, 0.0], [0.0, 3.0]]]
    """
    if candidates.ndim != 3 or places.shape != candidates.shape or summary.shape != candidates[:, 0].shape:
        raise ValueError(
            "need summary (B, D), places (B, T, D) and candidates (B, T, D), got "
            f"{tuple(summary.shape)}, {tuple(places.shape)} and {tuple(candidates.shape)}"
        )
    dtype = torch.promote_types(candidates.dtype, torch.float32)
    questions = summary.to(dtype).unsqueeze(1) + places.to(dtype)
    # Autocast makes the product one of half precision; what is summed from it is not.
    return (questions @ candidates.to(dtype).mT).to(dtype)


def selection_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of the holes with the patches that belong there: those on the diagonal.

    Args:
        logits: (B, T, T) of :func:`selection_logits`.

    Returns:
        Scalar, the mean over B T holes; ln T where nothing is known.

    Examples:
        >>> round(float(selection_loss(torch.zeros(2, 4, 4))), 4)
        1.3863
    """
    return (logits.logsumexp(dim=2) - logits.diagonal(dim1=1, dim2=2)).mean()


def selection_accuracy(logits: Tensor) -> Tensor:
    """Share of the holes whose patch has the highest logit, a scalar; 1 / T by chance. No gradient flows.

    Examples:
        >>> float(selection_accuracy(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])))
        0.5
    """
    own = torch.arange(logits.shape[1], device=logits.device)
    return (logits.detach().argmax(dim=2) == own).float().mean()
