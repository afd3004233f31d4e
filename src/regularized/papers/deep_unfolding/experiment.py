"""Train unfolded ISTA and IHT on true signals, or on the objective: who recovers better, who minimises?

Bernoulli-Gaussian signals of 100 entries, 10 % of them not zero, 60 noisy measurements; the matrix is drawn anew for
each seed. 15 layers against the plain algorithms after 15 and 2,000 iterations. Claims on ISTA:
``supervised_recovers_better``, ``supervised_misses_objective``, ``unsupervised_reaches_optimum``; on IHT:
``better_nonconvex_minimum``, ``nonconvex_parity``, and ``mismatch``: signals twice as dense and noise three times as
strong as in training.
Controls: ``than_fista``, the known acceleration without learning at equal iterations, and ``schedule_not_learned``: the
learned steps in random order.

The step of the plain algorithms (in units of 1 / L) and the learning rate have as many trials; each arm is judged by
what it minimises, on validation signals. A claim is refuted by an interval below the smallest effect of the card. Three
minutes for five seeds on two cores. *Paper* scale: N = 500, as the literature has it; the paper's own constants could
not be read.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.experiment import About, Measurements, Tuning, data_fingerprint
from regularized.scientific.deep_unfolding.layer import UnfoldedIHT, UnfoldedISTA
from regularized.scientific.deep_unfolding.loss import SparseObjective
from regularized.scientific.deep_unfolding.procedure import BernoulliGaussian, IncrementalTraining

DEFAULTS: Mapping[str, Any] = {"how": "iterate", "step": 1.0, "lr": 0.01, "norm": "l1", "penalty": 0.3}

_PROBLEM = {"density": 0.1, "noise": 0.01, "test": 1000}
SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {**_PROBLEM, "signal": 20, "rows": 12, "layers": 3, "batch": 20, "steps": 5, "late": 50},
    # Ours: small enough for minutes, large enough that 15 iterations of ISTA are far from its optimum.
    "laptop": {**_PROBLEM, "signal": 100, "rows": 60, "layers": 15, "batch": 150, "steps": 60, "late": 2000},
    # "N = 300 to 500, M = 0.5 N to 0.6 N, batch 200, 200 to 500 batches per generation, T = 15 to 30": the literature.
    "paper": {**_PROBLEM, "signal": 500, "rows": 250, "layers": 20, "batch": 200, "steps": 500, "late": 20_000},
}

# A penalty that visibly shrinks for l1, and one that keeps about the true support for l0.
_L1, _L0 = {"norm": "l1", "penalty": 0.3}, {"norm": "l0", "penalty": 0.06}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "ista": {**_L1, "how": "iterate", "step": 1.99},
    "fista": {**_L1, "how": "fista", "step": 1.5},
    "ista_converged": {**_L1, "how": "converge", "step": 0.25},
    "ista_shuffled_steps": {**_L1, "how": "shuffled", "lr": 0.01},
    "ista_supervised": {**_L1, "how": "supervised", "lr": 0.03},
    "ista_unsupervised": {**_L1, "how": "unsupervised", "lr": 0.03},
    "iht": {**_L0, "how": "iterate", "step": 1.99},
    "iht_converged": {**_L0, "how": "converge", "step": 1.99},
    "iht_supervised": {**_L0, "how": "supervised", "lr": 0.01},
    "iht_unsupervised": {**_L0, "how": "unsupervised", "lr": 0.003},
}

_STEPS = [{"step": step} for step in (0.25, 0.5, 1.0, 1.5, 1.9, 1.99)]  # 2 is where gradient steps diverge
_RATES = [{"lr": lr} for lr in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]
TUNING = Tuning(
    metric="validation_loss",
    direction="lower",
    grids={arm: _STEPS if "step" in settings else _RATES for arm, settings in ARMS.items()},
    seeds=(1000, 1001),
)


def about(s: Mapping[str, Any]) -> About:
    """Synthetic signals, drawn anew for each seed and batch."""
    samples = s["layers"] * s["steps"] * s["batch"]
    data = f"Bernoulli-Gaussian signals of {s['signal']} entries, fresh in each batch"
    return About(data, samples, f"{s['layers']} unfolded layers, a step each", s["layers"])


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train (or iterate) one arm with one seed; mean squared error of an entry, and mean objective of a signal."""
    draws = torch.Generator().manual_seed(seed)
    matrix = torch.randn(s["rows"], s["signal"], generator=draws) / s["rows"] ** 0.5
    network = (UnfoldedISTA if s["norm"] == "l1" else UnfoldedIHT)(matrix, s["penalty"], layers=s["layers"])
    objective = SparseObjective(matrix, s["penalty"], norm=s["norm"])

    def signals(number: int, **other: float) -> BernoulliGaussian:
        return BernoulliGaussian(
            matrix, **{"density": s["density"], "noise": s["noise"], **other}, seed=10 * seed + number
        )

    if s["how"] in ("supervised", "unsupervised", "shuffled"):
        training = IncrementalTraining(
            network,
            signals(1),
            loss="supervised" if s["how"] == "supervised" else objective,
            steps_per_layer=s["steps"],
            batch_size=s["batch"],
            lr=s["lr"],
        )
        training.fit()
    if s["how"] == "shuffled":
        with torch.no_grad():
            network.steps.copy_(network.steps[torch.randperm(s["layers"], generator=draws)])

    def recover(y: Tensor) -> Tensor:
        """Outputs of all layers or iterations that are looked at, the last one at the end."""
        step = s["step"] / network.lipschitz
        if s["how"] == "iterate":
            return torch.stack([network.iterate(y, k, step=step) for k in range(1, s["layers"] + 1)])
        if s["how"] == "converge":
            return network.iterate(y, s["late"], step=step)[None]
        if s["how"] == "fista":
            return fista(network, y, s["layers"], step)
        with torch.no_grad():
            layers: Tensor = network(y, all_layers=True)
        return layers

    (x, y), (held_x, held_y) = signals(2)(s["test"]), signals(3)(s["test"])
    other_x, other_y = signals(4, density=2 * s["density"], noise=3 * s["noise"])(s["test"])
    outputs, held = recover(y), recover(held_y)[-1]
    by_layer = [(float(F.mse_loss(z, x)), float(objective(z, y).mean())) for z in outputs]
    on_objective = float(objective(held, held_y).mean())
    first = s["late"] if s["how"] == "converge" else 1
    return Measurements(
        metrics={
            "recovery_mse": by_layer[-1][0],
            "objective": by_layer[-1][1],
            "mismatch_mse": float(F.mse_loss(recover(other_y)[-1], other_x)),
            "validation_loss": float(F.mse_loss(held, held_x)) if s["how"] == "supervised" else on_objective,
            "largest_step": float(network.steps.detach().max()) * network.lipschitz,
        },
        curves={
            name: [(float(first + k), values[i]) for k, values in enumerate(by_layer)] if first == 1 else []
            for i, name in enumerate(("recovery_mse", "objective"))
        },
        data=data_fingerprint(matrix.numpy(), x.numpy(), y.numpy()),
        curve_unit="layer",
    )


def fista(network: UnfoldedISTA | UnfoldedIHT, y: Tensor, iterations: int, step: float) -> Tensor:
    """Beck and Teboulle's accelerated iteration, (iterations, B, N): acceleration without learning."""
    x = z = y.new_zeros(len(y), network.signal)
    t, outputs = 1.0, []
    gamma = torch.as_tensor(step)
    with torch.no_grad():
        for _ in range(iterations):
            new = network.prox(z - gamma * network.gradient(z, y), gamma)
            faster = (1.0 + (1.0 + 4.0 * t * t) ** 0.5) / 2.0
            z = new + (t - 1.0) / faster * (new - x)
            x, t = new, faster
            outputs.append(x)
    return torch.stack(outputs)
