"""Ridge and early-learning strengths learnt on a small clean validation set, against a grid of equal cost.

    python benchmarks/learn_strengths.py [--seeds 5] [--json]

scikit-learn's digits, a linear softmax model; 600 training labels of which 40 % are wrong (uniformly one of the nine
others), 200 clean validation samples, 797 for test. Five epochs of SGD fill the memory of the early-learning term;
then it is held still. The cost of everything is counted in gradients of the training objective and products with its
Hessian. Arms, on the same data and memory:

- start: the strengths that learning begins with (ridge 0.01, early learning 1), trained to the minimum;
- ridge alone, learnt (early learning 0);
- grid: the best on validation of a g x g grid (ridge 1e-4 to 1, early learning 1 to 1000, equal factors), g at least 3
  and as large as learning's cost allows, judged by the grid before; each point trained to a gradient of norm 0.001, or
  500 gradients, from its neighbour's parameters;
- learnt.
"""

import argparse
import json
import statistics
import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized import CrossEntropy, EarlyLearning, Ridge, Trainer
from regularized.evidence.datasets import digits, flip_labels
from regularized.evidence.statistics import interval_of_mean
from regularized.scientific.inexact_bilevel.adaptive_fista import AdaptiveFista
from regularized.scientific.inexact_bilevel.learn_strengths import learn_strengths
from regularized.scientific.inexact_bilevel.lower_solvers import InnerToleranceNotReached, solve_lower
from regularized.scientific.inexact_bilevel.problem import FlatTree
from regularized.scientific.inexact_bilevel.strength_problem import StrengthProblem
from regularized.training import Compute, Logging, Objective, TensorData

TRAIN, VALID, NOISE, EPOCHS = 600, 200, 0.4, 5
RIDGE, EARLY = (1e-4, 1.0), (1.0, 1000.0)
GRADIENT, PATIENCE = 1e-3, 500  # of a grid point: norm of the gradient at which it ends, and gradients at most
NAMES = ("ridge", "early")

Row = dict[str, float]


class Task:
    """Data, model and memory of one seed."""

    def __init__(self, seed: int) -> None:
        split = digits(TRAIN + VALID, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        labels = flip_labels(split.train_y[:TRAIN], NOISE, num_classes=10, generator=generator)
        self.train = split.train_x[:TRAIN], labels
        self.valid = split.train_x[TRAIN:], split.train_y[TRAIN:]
        self.test = split.test_x.double(), split.test_y
        torch.manual_seed(seed)
        self.model = nn.Linear(64, 10)
        self.early = EarlyLearning(TRAIN, 10, weight=1.0)
        warm_up = Trainer(
            self.model,
            terms={"task": CrossEntropy(), "early": self.early},
            optimizer=partial(torch.optim.SGD, lr=0.1),
            seed=seed,
            compute=Compute(device="cpu"),
            logging=Logging(progress_bar=False),
        )
        warm_up.fit(TensorData(*self.train, batch_size=50), epochs=EPOCHS)

    def objective(self, *, early: bool = True) -> Objective:
        terms: dict[str, nn.Module] = {"task": CrossEntropy(), "ridge": Ridge(weight=1e-2)}
        return Objective({**terms, "early": self.early} if early else terms)

    def row(self, parameters: dict[str, Tensor], validation: float, strengths: dict[str, float], cost: int) -> Row:
        logits = self.test[0] @ parameters["weight"].T + parameters["bias"]
        accuracy = (logits.argmax(dim=1) == self.test[1]).double().mean()
        return {
            "validation": validation,
            "test": float(F.cross_entropy(logits, self.test[1])),
            "accuracy": float(accuracy),
            "cost": float(cost),
            **strengths,
        }

    def learn(self, *, early: bool = True) -> Row:
        names = NAMES if early else NAMES[:1]
        objective = self.objective(early=early)
        found = learn_strengths(objective, names, self.valid, model=self.model, data=self.train)
        return self.row(found.parameters, found.validation_loss, found.strengths, found.iterations)

    def grid(self, ridges: list[float], earlies: list[float]) -> Row:
        """The best point on validation; its cost is that of all points."""
        problem = StrengthProblem(
            self.objective(), NAMES, self.valid, model=self.model, data=self.train, deterministic=True
        )
        x, cost, best = problem.start, 0, None
        L = 1.0
        for i, early in enumerate(earlies):
            for ridge in ridges[:: -1 if i % 2 == 0 else 1]:  # the strongest ridge first: it is the easiest
                theta = torch.tensor([ridge, early], dtype=torch.float64).log()
                solver = AdaptiveFista()
                try:
                    solution = solve_lower(
                        problem.lower,
                        x,
                        theta,
                        mu=ridge,
                        L=max(L, ridge),
                        eps=GRADIENT / ridge,
                        max_iterations=PATIENCE,
                        solver=solver,
                    )
                    x, cost = solution.x, cost + solution.iterations
                except InnerToleranceNotReached as error:  # as a grid would: take what there is
                    x, cost = FlatTree(x, "x").unflatten(error.x), cost + error.iterations
                L = 0.8 * solver.L
                with torch.no_grad():
                    validation = float(problem.upper(x))
                if best is None or validation < best[0]:
                    best = validation, problem.public(x), {"ridge": ridge, "early": early}
        assert best is not None
        return self.row(best[1], best[0], best[2], cost)


def spaced(ends: tuple[float, float], count: int) -> list[float]:
    """Equal factors from end to end; the geometric mean where there is one."""
    low, high = ends
    return [low * (high / low) ** (i / (count - 1) if count > 1 else 0.5) for i in range(count)]


def measure(seed: int) -> dict[str, Row]:
    torch.set_num_threads(1)
    task = Task(seed)
    rows = {"start": task.grid([1e-2], [1.0]), "ridge alone, learnt": task.learn(early=False), "learnt": task.learn()}
    for size in range(3, 13):
        rows["grid"] = {**task.grid(spaced(RIDGE, size), spaced(EARLY, size)), "points": float(size**2)}
        if rows["grid"]["cost"] * ((size + 1) / size) ** 2 > rows["learnt"]["cost"]:
            break
    return rows


def interval(values: list[float]) -> str:
    low, high = interval_of_mean(values)
    return f"{statistics.mean(values):8.4f} [{low:8.4f}, {high:8.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    seeds = [measure(seed) for seed in range(arguments.seeds)]
    if arguments.json:
        print(json.dumps(seeds))
        return
    arms = ("start", "ridge alone, learnt", "grid", "learnt")
    print(f"mean over {len(seeds)} seeds [95 % interval]; cost: gradients and Hessian products, median")
    for arm in arms:
        rows = [seed[arm] for seed in seeds]
        columns = "  ".join(
            f"{name} {interval([row[name] for row in rows])}" for name in ("validation", "test", "accuracy")
        )
        print(f"{arm:20s} cost {statistics.median(row['cost'] for row in rows):6.0f}  {columns}")
    for name in ("validation", "test", "accuracy"):
        print(f"learnt - grid, {name}: {interval([seed['learnt'][name] - seed['grid'][name] for seed in seeds])}")
    for arm in ("grid", "learnt"):
        print(
            f"{arm}: " + "; ".join(f"ridge {seed[arm]['ridge']:.3g}, early {seed[arm]['early']:.3g}" for seed in seeds)
        )
    print(f"points of the grid: {[int(seed['grid']['points']) for seed in seeds]}; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
