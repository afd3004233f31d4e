"""SST in pretraining: a language model from scratch, and a hyperbolic graph network, at equal numbers of trained weights.

(a) A small Llama on Python's standard library, every seed with text of its own. The linear layers of its blocks are
trained in full, by LoRA on frozen random weights, by ReLoRA* (folded in and begun anew as often as SST draws), or by
SST. LoRA and ReLoRA* get one rank more, since SST trains the singular values, too: SST has the fewest trained numbers.
Controls of SST: the same directions for good, which is everything but the sampling; the largest ones in place of drawn
ones; the default gradient; random factors in place of a decomposition. All train embeddings, norms and head in full.

(b) A hyperbolic network tells who falls ill in a tree, likewise.

Learning rates of all arms come from grids of one size, judged on validation text, or validation nodes, of seeds 1000
and 1001. Paper scale: OPT-125M on OpenWebText (``language.py``), and HGCN's disease data.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.corpora import draw_text
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, data_fingerprint
from regularized.evidence.language_models import evaluate, fit, small_lm
from regularized.evidence.models import seeded
from regularized.papers.sst.graphs import Graph, HyperbolicGraphNetwork, disease_graph, spreading_tree
from regularized.papers.sst.low_rank import LowRankUpdate, add_updates, restart_every
from regularized.pretraining.sst.layer import SpectralLinear
from regularized.pretraining.sst.term import SST

DEFAULTS: Mapping[str, Any] = {
    "problem": "language",
    "method": "full",
    "lr": 1e-2,
    "rank": 0,
    "draws": True,
    "sampling": "mixed",
    "gradient": "enhanced",
    "init": "svd",
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "text": "library",
        "width": 16,
        "layers": 1,
        "steps": 6,
        "batch": 4,
        "characters": 40_960,
        "iteration": 2,
        "warm_up": 1,
        "graph": "tree",
        "nodes": 60,
        "graph_width": 9,
        "graph_steps": 6,
        "graph_iteration": 2,
    },
    # Ours. Steps of an iteration by the share of the training that they have in the paper's; a tenth of them warm up, and
    # a round is d / r iterations, as there.
    "laptop": {
        "text": "library",
        "width": 64,
        "layers": 2,
        "steps": 400,
        "batch": 8,
        "characters": 620_000,
        "iteration": 10,
        "warm_up": 1,
        "graph": "tree",
        "nodes": 500,
        "graph_width": 33,
        "graph_steps": 200,
        "graph_iteration": 10,
    },
    # 19.7 billion tokens (paper, section 5.2) are 40,000 steps of 480 windows of 1,024; 200 steps an iteration, of which
    # 20 warm up (appendix F).
    "paper": {
        "text": "openwebtext",
        "width": 768,
        "layers": 12,
        "steps": 40_000,
        "batch": 480,
        "characters": 0,
        "iteration": 200,
        "warm_up": 20,
        "graph": "disease",
        "nodes": 1044,
        "graph_width": 16,
        "graph_steps": 5000,
        "graph_iteration": 70,
    },
}
