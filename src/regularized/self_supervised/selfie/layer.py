"""Attention pooling, and where a patch stands.

:mod:`regularized.self_supervised.selfie.loss` has the symbols.
"""

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, between, count

__all__ = ["AttentionPool", "GridPositions", "grid_table"]


class AttentionPool(nn.Module):
    """A learned query that attends, together with the vectors, through transformer layers: their summary.

    Args:
        width: D, a multiple of ``heads``.
        depth: layers, norm behind each sum, and one more norm at the end; default 3 (a re-implementation, which follows
            the paper by its own word).
        heads: default 32 (the same).
        hidden: width inside the feed-forward part, GELU; default 640 (the same).
        dropout: default 0.1 (the same).

    Raises:
        ValueError: ``width`` is no multiple of ``heads``, or a setting outside its range.

    Examples:
        >>> AttentionPool(16, depth=1, heads=4, hidden=32)(torch.randn(5, 12, 16)).shape
        torch.Size([5, 16])
    """

    @allowed(depth=count(1), heads=count(1), hidden=count(1), dropout=between(0.0, 1.0, "[)"))
    def __init__(self, width: int, *, depth: int = 3, heads: int = 32, hidden: int = 640, dropout: float = 0.1) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.query: nn.Parameter = nn.Parameter(0.02 * torch.randn(1, 1, width))
        layers = (
            nn.TransformerEncoderLayer(width, heads, hidden, dropout=dropout, activation="gelu", batch_first=True)
            for _ in range(depth)
        )
        self.layers: nn.Sequential = nn.Sequential(*layers)
        self.norm: nn.LayerNorm = nn.LayerNorm(width)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, K, D) to (B, D); without positions among the vectors, their order does not count."""
        query = self.query.expand(len(vectors), -1, -1).to(vectors.dtype)
        summary: Tensor = self.norm(self.layers(torch.cat([query, vectors], dim=1))[:, 0])
        return summary


def grid_table(rows: Tensor, columns: Tensor) -> Tensor:
    """Embeddings of a grid from those of its rows and of its columns: their sums, in raster order.

    Args:
        rows: (R, D).
        columns: (C, D).

    Returns:
        (R C, D).

    Examples:
        >>> grid_table(torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [2.0]])).flatten().tolist()
        [1.0, 2.0, 11.0, 12.0]
    """
    return (rows.unsqueeze(1) + columns).flatten(0, 1)


class GridPositions(nn.Module):
    """A learned vector for each place of a grid.

    Args:
        grid: rows and columns.
        width: D.
        factored: a vector for each row and each column, added, instead of one for each place (the paper: at 224 pixels,
            14 vectors instead of 49; default False, as at 32 pixels).

    Raises:
        RuntimeError: a size is negative (torch's own).

    Examples:
        >>> GridPositions((7, 7), 8, factored=True).table().shape
        torch.Size([49, 8])
    """

    def __init__(self, grid: tuple[int, int], width: int, *, factored: bool = False) -> None:
        super().__init__()
        rows, columns = grid
        self.factored = factored
        if factored:
            self.rows: nn.Parameter = nn.Parameter(torch.randn(rows, width))
            self.columns: nn.Parameter = nn.Parameter(torch.randn(columns, width))
        else:
            self.places: nn.Parameter = nn.Parameter(torch.randn(rows * columns, width))

    def table(self) -> Tensor:
        """(N, D), in raster order."""
        return grid_table(self.rows, self.columns) if self.factored else self.places
