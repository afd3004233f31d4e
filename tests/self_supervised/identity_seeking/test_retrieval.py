"""Retrieval scores against loops, and scikit-learn's average precision."""

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from regularized.self_supervised.identity_seeking import retrieval_scores


def drawn(seed=0, queries=20, gallery=40, people=8):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(people, (n,), generator=generator) for n in (queries, gallery)]
    cameras = [torch.randint(3, (n,), generator=generator) for n in (queries, gallery)]
    return [torch.randn(n, 4, generator=generator) for n in (queries, gallery)], ids, cameras


@pytest.mark.parametrize("by_camera", [False, True])
def test_against_loops(by_camera):
    """Fails when junk images count, ranks start at 0, or precision is averaged over the wrong places."""
    (query, gallery), (query_ids, gallery_ids), (query_cameras, gallery_cameras) = drawn()
    cameras = {"query_cameras": query_cameras, "gallery_cameras": gallery_cameras} if by_camera else {}
    scores = retrieval_scores(query, gallery, query_ids, gallery_ids, **cameras, ranks=(1, 5))
    similarity = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    averages, first = [], []
    for i in range(len(query)):
        kept = [
            j
            for j in range(len(gallery))
            if not (by_camera and gallery_ids[j] == query_ids[i] and gallery_cameras[j] == query_cameras[i])
        ]
        same = [bool(gallery_ids[j] == query_ids[i]) for j in kept]
        if any(same):
            values = similarity[i, kept]
            averages.append(average_precision_score(same, values))
            first.append(int((values > values[torch.tensor(same)].max()).sum()))
    assert scores.queries == len(averages)
    assert scores.mean_average_precision == pytest.approx(sum(averages) / len(averages), abs=1e-6)
    for k in (1, 5):
        assert scores.rank[k] == pytest.approx(sum(place < k for place in first) / len(first))


def test_perfect_and_chance():
    """Fails when a perfect embedding is not perfect, or an embedding of noise is better than chance."""
    ids = torch.arange(50)
    features = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert retrieval_scores(features, 2 * features, ids, ids).mean_average_precision == pytest.approx(1.0)
    noise = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    assert retrieval_scores(features, noise, ids, ids).rank[1] < 0.15
