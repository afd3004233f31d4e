"""NVIDIA ModelOpt's two recipes for 2:4 beside the arms of CAST's experiment, on the texts of its tuning seeds.

    pip install nvidia-modelopt
    python benchmarks/modelopt_sparsity.py [--seeds 1000 1001] [--lr 4e-3] [--json]

A recipe is a mask, by magnitude or by SparseGPT (which looks at 64 windows of training text, and moves the weights that
stay), and training under it. All else is that of the arm ``fixed_mask``: dense start, steps, batches, AdamW. Printed
are perplexities on the validation text, which no claim of the card is judged on, and whether the masks by magnitude are
ours.
"""

import argparse
import copy
import importlib
import json
import math
from typing import Any

import torch
from torch import nn

from regularized.evidence.experiment import resolve, run_arm
from regularized.evidence.language_models import evaluate, fit, random_windows
from regularized.papers.cast import experiment
from regularized.papers.cast.controls import cut


def recipe(model: nn.Module, mode: str, tokens: torch.Tensor) -> nn.Module:
    """ModelOpt's surgery on a copy of the dense start, on the linear layers of the blocks alone."""
    sparsity = importlib.import_module("modelopt.torch.sparsity")
    windows = random_windows(tokens, 64, 64, torch.Generator().manual_seed(0)).split(16)
    rules = {"nn.Linear": {"*": {}, "head": None}}
    options: dict[str, Any] = {"verbose": False}
    if mode == "sparsegpt":
        options |= {"data_loader": windows, "collect_func": lambda batch: batch}
    sparse: nn.Module = sparsity.sparsify(copy.deepcopy(model), mode=[(mode, rules)], config=options)
    return sparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001])
    parser.add_argument("--lr", type=float, default=resolve(experiment, "fixed_mask", "laptop")["lr"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    s = resolve(experiment, "fixed_mask", "laptop")
    rows = []
    for seed in options.seeds:
        row: dict[str, Any] = {"seed": seed}
        start, text = experiment._dense_start(
            seed, s["text"], s["vocabulary"], s["width"], s["layers"], s["dense_steps"]
        )
        ours = cut(copy.deepcopy(start), experiment._linear(start), s["pattern"])
        for mode in ("sparse_magnitude", "sparsegpt"):
            model = recipe(start, mode, text.train)
            masks = {f"{n}.weight": m._weight_mask for n, m in model.named_modules() if f"{n}.weight" in ours}
            if mode == "sparse_magnitude":
                row["same_masks"] = all(torch.equal(masks[name], mask) for name, mask in ours.items())
            row[f"{mode}_cut"] = math.exp(evaluate(model, text.validation, context=s["context"]))
            optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
            sizes = {"steps": s["steps"], "batch": s["batch"], "context": s["context"]}
            fit(model, text.train, optimizer, seed=seed + 1, **sizes)
            row[mode] = math.exp(evaluate(model, text.validation, context=s["context"]))
        for arm in ("fixed_mask", "cast"):
            row[arm] = math.exp(run_arm(experiment, arm, seed, "laptop").metrics["validation_loss"])
        rows.append(row)
        print(json.dumps(row) if options.json else "  ".join(f"{k} {v:.5g}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
