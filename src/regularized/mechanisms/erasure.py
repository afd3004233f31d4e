"""Least-squares concept erasure: the smallest change of embeddings after which nothing linear finds a concept in them.

    Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman, "LEACE: Perfect linear concept erasure in closed
    form", NeurIPS 2023, arXiv 2306.03819.

It needs labels of the concept, and knows no iterations and no settings. The package concept-erasure of the authors
does more (streams of batches, oracles, whole language models); this is the affine map of the paper's theorem.
"""

import torch
from torch import Tensor, nn

__all__ = ["ConceptErasure"]

# Shapes: N rows, d width of an embedding, q columns of the concept, r <= q rank of what is erased.

_NEGLIGIBLE = 1e-10  # of the largest eigenvalue: a direction without variance holds no concept


class ConceptErasure(nn.Module):
    """``x - W^+ P W (x - mean)``: W whitens x, P projects on what the whitened x and the concept have in common.

    On the rows it was fitted to, the erased embeddings and the concept have no covariance, so that the best linear
    predictor of the concept is a constant. Of all affine maps that achieve this it moves the rows least, in the mean of
    squares. What is not linear, or not true of the rows it was fitted to, stays.

    Args:
        embeddings: (N, d) to fit to; any floating type, computed in float64.
        concept: (N,) of 0 and 1 or of numbers, or (N, q) such as one-hot classes.

    Raises:
        ValueError: shapes do not fit, fewer than two rows, or values that are not finite.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 1.0]])
        >>> ConceptErasure(x, torch.tensor([0, 0, 1, 1]))(x)
        tensor([[1., 0.],
                [1., 1.],
                [1., 0.],
                [1., 1.]])
    """

    mean: Tensor
    reads: Tensor
    writes: Tensor

    def __init__(self, embeddings: Tensor, concept: Tensor) -> None:
        super().__init__()
        if embeddings.ndim != 2 or concept.ndim not in (1, 2) or len(concept) != len(embeddings):
            raise ValueError(
                "embeddings must be (N, d) and the concept (N,) or (N, q), got "
                f"{tuple(embeddings.shape)} and {tuple(concept.shape)}"
            )
        if len(embeddings) < 2:
            raise ValueError(f"a covariance needs two rows or more, got {len(embeddings)}")
        x, z = embeddings.double(), concept.double().reshape(len(concept), -1)
        if not (torch.isfinite(x).all() and torch.isfinite(z).all()):
            raise ValueError("embeddings and concept must be finite; leave out the rows that are not")
        mean = x.mean(dim=0)
        x, z = x - mean, z - z.mean(dim=0)
        variances, axes = torch.linalg.eigh(x.T @ x / len(x))
        kept = variances > _NEGLIGIBLE * variances.max()
        deviations, axes = variances[kept].sqrt(), axes[:, kept]
        # In whitened coordinates: (kept, q) covariance with the concept; its left singular vectors span what goes.
        shared = (axes.T @ (x.T @ z / len(x))) / deviations[:, None]
        left, values, _ = torch.linalg.svd(shared, full_matrices=False)
        # Correlations: below rounding there is nothing to erase.
        left = left[:, values > _NEGLIGIBLE * z.square().mean().sqrt()]
        self.register_buffer("mean", mean.to(embeddings))
        self.register_buffer("reads", (axes @ (left / deviations[:, None])).to(embeddings))  # (d, r)
        self.register_buffer("writes", (axes @ (left * deviations[:, None])).to(embeddings))  # (d, r)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(..., d) embeddings to erased ones of the same shape."""
        return embeddings - (embeddings - self.mean) @ self.reads @ self.writes.T

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"width={self.reads.shape[0]}, erased={self.reads.shape[1]}"
