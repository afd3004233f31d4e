"""How well an embedding finds the same individual: rank-k and mean average precision, as re-identification has them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Retrieval", "retrieval_scores"]


class Retrieval(NamedTuple):
    """What retrieval came to.

    Attributes:
        rank: share of the queries that find their individual among the first k, by k.
        mean_average_precision: mean over the queries.
        queries: queries that have a counterpart in the gallery; the others do not count.
    """

    rank: dict[int, float]
    mean_average_precision: float
    queries: int


@torch.no_grad()
def retrieval_scores(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    *,
    query_cameras: Tensor | None = None,
    gallery_cameras: Tensor | None = None,
    ranks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Rank-k and mean average precision by cosine similarity.

    Where cameras are given, images of the query's individual by the query's own camera are left out of its gallery, as
    usual: finding the neighbouring frame is no feat. Of equally similar images the earlier one comes first.

    Args:
        query: (n, d) features.
        gallery: (m, d) features.
        query_ids: (n,) individuals.
        gallery_ids: (m,) individuals.
        query_cameras: (n,) cameras; default None, no image is left out.
        gallery_cameras: (m,) cameras.
        ranks: the k to report.

    Returns:
        The scores.

    Raises:
        ValueError: only one side has cameras, lengths differ, or no query has a counterpart.

    Examples:
        >>> features = torch.eye(3)
        >>> ids, others = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 1])
        >>> scores = retrieval_scores(features, features, ids, others, ranks=(1, 3))
        >>> {k: round(share, 2) for k, share in scores.rank.items()}
        {1: 0.33, 3: 1.0}
    """
    if (query_cameras is None) != (gallery_cameras is None):
        raise ValueError("give cameras of both sides, or of neither")
    for name, values, features in (("query_ids", query_ids, query), ("gallery_ids", gallery_ids, gallery)):
        if len(values) != len(features):
            raise ValueError(f"{name} must have one individual for each of {len(features)} rows, got {len(values)}")
    similarity = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    same = query_ids[:, None] == gallery_ids
    kept = torch.ones_like(same)
    if query_cameras is not None and gallery_cameras is not None:
        kept = ~(same & (query_cameras[:, None] == gallery_cameras))
    order = similarity.masked_fill(~kept, -torch.inf).argsort(dim=1, descending=True, stable=True)
    hits = (same & kept).gather(1, order)
    counted = hits.any(dim=1)
    if not bool(counted.any()):
        raise ValueError("no query has a counterpart in the gallery; are ids, or cameras, of two kinds?")
    hits = hits[counted]
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.cumsum(dim=1) / places
    average = (precision * hits).sum(dim=1) / hits.sum(dim=1)
    first = hits.int().argmax(dim=1)
    return Retrieval({k: float((first < k).double().mean()) for k in ranks}, float(average.double().mean()), len(hits))
