"""A hierarchy as a graph, and the hyperbolic network that tells in which branch a node stands."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from regularized.evidence.datasets.folder import data_folder
from regularized.evidence.requirements import need_files
from regularized.pretraining.sst.lorentz import LorentzLinear, lorentz_centroid, lorentz_lift, lorentz_product

__all__ = ["Graph", "HyperbolicGraphNetwork", "disease_graph", "hierarchy"]

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


def hierarchy(seed: int, nodes: int, *, branches: int = 8, features: int = 32, noise: float = 3.0) -> Graph:
    """A random tree whose nodes show traces of their ancestors; to be told is the branch in which a node stands.

    Every node has a random vector. Its features are the sum of the vectors from its branch's first node down to itself,
    each step upwards counted 0.7 times as much, and noise. So siblings are alike, cousins less.

    Args:
        seed: of all of it.
        nodes: n; one is the root, on which the branches hang. Each later node joins a branch at random, and hangs there
            on any node.
        branches: how many classes.
        features: f.
        noise: its standard deviation; the vectors have 1.

    Examples:
        >>> graph = hierarchy(0, 100)
        >>> int(graph.adjacency.sum())  # 99 edges twice, and 100 loops
        298
        >>> graph.labels.bincount().tolist()
        [18, 15, 15, 9, 15, 12, 7, 9]
    """
    draw = np.random.default_rng(seed)
    own = draw.standard_normal((nodes, features))
    shown, branch = own.copy(), np.zeros(nodes, dtype=np.int64)
    adjacency = np.eye(nodes)
    for node in range(1, nodes):
        branch[node] = node - 1 if node <= branches else draw.integers(branches)
        parent = 0 if node <= branches else int(draw.choice(np.flatnonzero(branch[1:node] == branch[node]))) + 1
        shown[node] += 0.7 * shown[parent] * (parent > 0)
        adjacency[node, parent] = adjacency[parent, node] = 1.0
    shown += noise * draw.standard_normal((nodes, features))
    return _graph(shown, adjacency, branch, draw.permutation(nodes))


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
