"""Wrong labels found: by one training with early-learning regularization, and by cleanlab on out-of-fold probabilities.

    python benchmarks/label_issues.py [--seeds 10] [--samples 1500] [--markdown FILE]

Both use the same perceptron and number of epochs. cleanlab gets five-fold out-of-sample probabilities of the plain
network, as its documentation recommends, and each of its filters; the best of them by F1 is shown, chosen with
hindsight in its favour. Seconds are of one processor, so that what else runs does not count.
Wrong labels are drawn at random (symmetric) or are always the next class (pair).
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

from regularized import RegularizedClassifier, find_label_issues

Array = NDArray[Any]
FILTERS = ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given")


def digits(seed: int, samples: int) -> tuple[Array, Array]:
    X, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(seed).permutation(len(y))[:samples]
    return StandardScaler().fit_transform(X[rows]), y[rows]


def fashion(seed: int, samples: int) -> tuple[Array, Array]:
    """Images of a seed's own."""
    from regularized.evidence.datasets import draw

    sample = draw("fashion_mnist", seed, train=samples, validation=0, test=0)
    return sample.train_x.flatten(1).numpy(), sample.train_y.numpy()


def spoiled(y: Array, share: float, kind: str, rng: np.random.Generator) -> tuple[Array, Array]:
    wrong = rng.random(len(y)) < share
    step = rng.integers(1, 10, len(y)) if kind == "symmetric" else 1
    return np.where(wrong, (y + step) % 10, y), wrong


def scores(found: Array, wrong: Array) -> tuple[float, float, float]:
    hits = float((found & wrong).sum())
    precision, recall = hits / max(1, found.sum()), hits / max(1, wrong.sum())
    return precision, recall, 2 * precision * recall / max(1e-12, precision + recall)


def cleanlab(X: Array, y: Array) -> Iterator[tuple[str, Array]]:
    from cleanlab.filter import find_label_issues as find

    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    p = cross_val_predict(RegularizedClassifier(random_state=0), X, y, cv=folds, method="predict_proba")
    for name in FILTERS:
        yield name, find(y, p, filter_by=name, n_jobs=1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=10)
    arguments.add_argument("--samples", type=int, default=1500)
    arguments.add_argument("--markdown", type=Path)
    given = arguments.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = ["| data | noise | who | precision | recall | F1 | processor seconds |", "|---|---|---|---|---|---|---|"]
    sets: dict[str, Callable[[int, int], tuple[Array, Array]]] = {"digits": digits, "Fashion-MNIST": fashion}
    for data, load in sets.items():
        for kind in ("symmetric", "pair"):
            for share in (0.2, 0.4):
                results: dict[str, list[tuple[float, float, float, float]]] = {}
                for seed in range(given.seeds):
                    X, truth = load(seed, given.samples)
                    y, wrong = spoiled(truth, share, kind, np.random.default_rng(100 + seed))
                    start = time.process_time()
                    found = find_label_issues(X, y)
                    seconds = time.process_time() - start
                    results.setdefault("find_label_issues", []).append((*scores(found, wrong), seconds))
                    start = time.process_time()
                    for name, mask in cleanlab(X, y):
                        results.setdefault(f"cleanlab, {name}", []).append(
                            (*scores(mask, wrong), time.process_time() - start)
                        )
                ours = results.pop("find_label_issues")
                best = max(results, key=lambda name: float(np.mean([r[2] for r in results[name]])))
                for who, of in (("find_label_issues", ours), (best, results[best])):
                    p, r, f, s = np.mean(of, axis=0)
                    spread = np.std([one[2] for one in of], ddof=1) if len(of) > 1 else float("nan")
                    measured = f"{p:.3f} | {r:.3f} | {f:.3f} ± {spread:.3f} | {s:.1f}"
                    line = f"| {data} | {share:.0%} {kind} | {who} | {measured} |"
                    rows.append(line)
                    print(line, flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
