"""A disease that spreads in a tree, and the hyperbolic graph network that tells who falls ill."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from regularized.evidence.datasets.folder import data_folder
from regularized.evidence.requirements import need_files
from regularized.pretraining.sst.lorentz import LorentzLinear, lorentz_centroid, lorentz_lift, lorentz_product

__all__ = ["Graph", "HyperbolicGraphNetwork", "disease_graph", "spreading_tree"]

PARTS = (0.3, 0.1, 0.6)
"""Shares of the nodes for training, validation and test, as for HGCN's disease."""


class Graph(NamedTuple):
    """A graph whose nodes are to be classified.

    Attributes:
        features: (n, f).
        adjacency: (n, n) 0 or 1, symmetric, with loops.
        labels: (n,) int64.
        parts: indices of the nodes for training, validation and test.
    """

    features: Tensor
    adjacency: Tensor
    labels: Tensor
    parts: tuple[Tensor, Tensor, Tensor]


def spreading_tree(seed: int, nodes: int, *, features: int = 32, infectious: float = 0.9) -> Graph:
    """A random tree in which an infection goes from the root to the leaves, as in HGCN's disease data.

    Who stands below an ill node falls ill with a chance that depends on an own resistance, which the features show in a
    random mixture with noise, and who does not never infects anybody. So a label hangs on the whole way to the root.

    Args:
        seed: of all of it.
        nodes: n; each but the root hangs on an earlier one, which has at most four below it.
        features: f, coordinates in which resistance and noise are mixed.
        infectious: chance of falling ill without any resistance.

    Examples:
        >>> graph = spreading_tree(0, 100)
        >>> int(graph.adjacency.sum())  # 99 edges twice, and 100 loops
        298
        >>> 20 < int(graph.labels.sum()) < 80
        True
    """
    draw = np.random.default_rng(seed)
    resistance = draw.random(nodes)
    parents, ill = np.zeros(nodes, dtype=np.int64), np.zeros(nodes, dtype=bool)
    below = np.zeros(nodes, dtype=np.int64)
    ill[0] = True
    for node in range(1, nodes):
        parent = int(draw.choice(np.flatnonzero(below[:node] < 4)))
        parents[node] = parent
        below[parent] += 1
        ill[node] = ill[parent] and draw.random() < infectious * (1.0 - resistance[node] ** 4)
    shown = np.concatenate([resistance[:, None], 0.5 * draw.standard_normal((nodes, features - 1))], axis=1)
    mixed = shown @ np.linalg.qr(draw.standard_normal((features, features)))[0]
    adjacency = np.eye(nodes)
    adjacency[np.arange(1, nodes), parents[1:]] = adjacency[parents[1:], np.arange(1, nodes)] = 1.0
    return _graph(mixed, adjacency, ill, draw.permutation(nodes))


def disease_graph(seed: int) -> Graph:
    """HGCN's disease data for node classification: 1,044 nodes; the seed splits them.

    Raises:
        Unavailable: the files are not here.
    """
    import scipy.sparse

    folder = need_files(
        {
            f"hgcn/disease_nc/disease_nc.{part}": "of github.com/HazyResearch/hgcn, data/disease_nc"
            for part in ("edges.csv", "feats.npz", "labels.npy")
        },
        folder=data_folder(),
    )
    start = folder / "hgcn" / "disease_nc"
    labels = np.load(start / "disease_nc.labels.npy")
    features = scipy.sparse.load_npz(start / "disease_nc.feats.npz").toarray()
    edges = np.loadtxt(start / "disease_nc.edges.csv", delimiter=",", dtype=np.int64)
    adjacency = np.eye(len(labels))
    adjacency[edges[:, 0], edges[:, 1]] = adjacency[edges[:, 1], edges[:, 0]] = 1.0
    return _graph(features, adjacency, labels, np.random.default_rng(seed).permutation(len(labels)))


def _graph(features: np.ndarray, adjacency: np.ndarray, labels: np.ndarray, order: np.ndarray) -> Graph:
    ends = np.cumsum([round(share * len(order)) for share in PARTS[:2]])
    train, validation, test = (torch.from_numpy(part.copy()) for part in np.split(order, ends))
    return Graph(
        torch.from_numpy(features).float(),
        torch.from_numpy(adjacency).float(),
        torch.from_numpy(labels).long(),
        (train, validation, test),
    )


class HyperbolicGraphNetwork(nn.Module):
    """HyboNet for nodes: hyperbolic layers, each followed by a mean over the neighbours, and a point for each class.

    Args:
        features: f.
        width: coordinates of the hidden points, their time among them.
        classes: how many.
        layers: hyperbolic layers; default 2.
    """

    def __init__(self, features: int, width: int, classes: int, *, layers: int = 2) -> None:
        super().__init__()
        first = LorentzLinear(features + 1, width)
        self.layers = nn.ModuleList(
            [first, *(LorentzLinear(width, width, activation=torch.relu) for _ in range(layers - 1))]
        )
        self.classes = nn.Parameter(0.1 * torch.randn(classes, width - 1))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        """(n, f) and (n, n) to logits (n, classes): minus the squared Lorentz distances to the classes' points."""
        x = lorentz_lift(features)
        for layer in self.layers:
            x = lorentz_centroid(layer(x), adjacency)
        return 2.0 + 2.0 * lorentz_product(x[:, None, :], lorentz_lift(self.classes)) + self.bias
