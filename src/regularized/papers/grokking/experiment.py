"""Memorise or grok: what a network on modular addition does with corrupted labels, under which regulariser.

Networks with a square between two layers, trained on part of all pairs, of which 20 to 35 % have a random label; test
pairs are right. Settings are those of the official notebook and of pilots that were made before this experiment
existed, as the sheet has them. The claims are the sentences of the paper's abstract:

- *Both at once*: ``coexistence``, against a control in which all labels are random; ``coexistence_mild_decay``; and
  whether it costs accuracy: ``complete_without_decay``, ``complete_with_decay``.
- *Memorising neurons can be pruned*: ``pruning``, ``pruning_keeps_the_rule``, and the controls
  ``pruning_beats_random`` and ``pruning_beats_norm``: as many neurons at random, or those of the smallest weights.
- *Regularisers drop the noise*: ``memorization``, ``generalization`` (decay), ``dropout_drops_noise``,
  ``dropout_drops_all_noise``, ``dropout_generalizes``, ``batch_norm``, ``batch_norm_generalizes``; other remedies:
  ``beats_early_stopping``, ``beats_label_smoothing``.
- *What they do to neurons*: ``decay_makes_periodic``, ``dropout_makes_periodic``, ``batch_norm_gains``.
- *Two stages*: ``fits_first``, ``fits_first_almost_all`` and ``knows_first`` compare the network where it is best at
  training labels and test together with the same network at its end.
- In a transformer: ``transformer_drops_noise``, ``transformer_generalizes``.

The strengths of decay and dropout and the share that is pruned are settings of the phenomena, and fixed. What is tuned
are the remedies that compete: the rate of early stopping, the amount of smoothing, the decay, each with as many
trials, by accuracy on validation pairs *with corrupted labels*, as a user would have them. A claim is refuted by an
interval below the smallest effect of the card. Seven minutes for five seeds on two cores. *Paper* scale: the paper's
sizes for all arms and, for its regularisers, the phase diagram of 17 x 17 networks; needs a GPU.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.experiment import About, Measurements, Tuning, Unavailable, data_fingerprint
from regularized.evidence.models import seeded
from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    ModularTransformer,
    QuadraticMLP,
    modular_optimizer,
)
from regularized.understanding.grokking.phase_diagram import phase_diagram
from regularized.understanding.grokking.phases import Phase, detect_phases
from regularized.understanding.grokking.pruning import prune_by_score_, pruning_sweep
from regularized.understanding.grokking.report import MemorizationProbe
from regularized.understanding.grokking.scores import score_correlation

_TINY = {"p": 11, "width": 16, "frac": 0.7, "noise": 0.3, "steps": 12}
# Official notebook: "p = 97", "N = 500", "data_frac = 0.5", "noise_level = 0.35"; and "0.65", "0.2", "bs = 64",
# "steps = 2000" for batch normalisation.
_LARGE = {"p": 97, "width": 500, "frac": 0.5, "noise": 0.35}
_BATCHES = {"p": 97, "width": 500, "frac": 0.65, "noise": 0.2, "batch_size": 64, "steps": 2000}
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "small": _TINY,
        "large": _TINY,
        "batches": {**_TINY, "batch_size": 32},
        "transformer": {**_TINY, "lr": 0.01},
    },
    "laptop": {
        # Ours: the smallest modulus at which a pilot showed all phases.
        "small": {"p": 53, "width": 256, "frac": 0.6, "noise": 0.3, "steps": 500},
        "large": {**_LARGE, "steps": 500},
        "batches": _BATCHES,
        # Ours: of six settings tried with one seed, the one in which decay came far enough in ten seconds.
        "transformer": {"p": 53, "width": 64, "frac": 0.7, "noise": 0.1, "steps": 800, "lr": 0.003},
    },
    "paper": {
        # "data_steps = np.array([2000])" of the phase diagrams; "n_embd = 128", "lr = 0.01" of the transformer.
        "small": {**_LARGE, "steps": 2000},
        "large": {**_LARGE, "steps": 2000},
        "batches": _BATCHES,
        "transformer": {"p": 97, "width": 128, "frac": 0.5, "noise": 0.35, "steps": 2000, "lr": 0.01},
    },
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"records": 4},
    "laptop": {"records": 50},
    # "np.linspace(0.1, 0.9, 17)" both ways.
    "paper": {"records": 100, "cells": tuple(k / 20 for k in range(2, 19)), "device": "cuda"},
}

DEFAULTS: Mapping[str, Any] = {
    "on": "small",
    "show": "",
    **_SIZES["laptop"]["small"],
    "steps_factor": 1.0,
    "batch_size": None,
    "lr": 0.01,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "norm": None,
    "smoothing": 0.0,
    "keep": "",
    "prune": "",
    "cells": (),
    "diagrams": (),
    "device": "cpu",
}

DISPLAY = {"show"}  # the arms whose curves belong into one picture

ARMS: Mapping[str, Mapping[str, Any]] = {
    "no_decay": {"on": "small", "show": "decay"},
    "mild_decay": {"on": "small", "show": "decay", "weight_decay": 5.0},
    "strong_decay": {"on": "small", "show": "decay", "weight_decay": 10.0},
    "strong_decay_at_peak": {"on": "small", "weight_decay": 10.0, "keep": "peak"},
    "no_rule": {"on": "large", "show": "modulus 97", "noise": 1.0},
    "coexisting": {"on": "large", "show": "modulus 97"},
    "pruned_random": {"on": "large", "prune": "random"},
    "pruned_by_norm": {"on": "large", "prune": "norm"},
    "pruned": {"on": "large", "prune": "ipr"},
    "no_dropout": {"on": "small", "show": "dropout", "steps_factor": 1.6},
    "dropout": {"on": "small", "show": "dropout", "steps_factor": 1.6, "dropout": 0.5},
    "no_norm": {"on": "batches", "show": "normalisation"},
    "batch_norm": {"on": "batches", "show": "normalisation", "norm": "batch"},
    "early_stopped": {"on": "small", "show": "remedies", "keep": "validation", "lr": 0.1},
    "label_smoothing": {"on": "small", "show": "remedies", "smoothing": 0.5},
    "tuned_decay": {"on": "small", "show": "remedies", "weight_decay": 10.0},
    "transformer": {"on": "transformer", "show": "transformer"},
    "transformer_decay": {"on": "transformer", "show": "transformer", "weight_decay": 2.0},
}

# Phase diagrams, for each strength that the scripts have, at the arm it belongs to.
_DIAGRAMS: Mapping[str, Any] = {
    "no_decay": [{"weight_decay": 0.0}],
    "mild_decay": [{"weight_decay": 5.0}],
    "strong_decay": [{"weight_decay": 15.0}, {"weight_decay": 20.0}],
    "dropout": [{"dropout": 0.3}, {"dropout": 0.6}, {"dropout": 0.9}],
    "batch_norm": [{"norm": "batch", "batch_size": size} for size in (8, 32, 64, 256)],
}

# The sizes of what an arm is trained on, at each scale; an arm's own settings stand above them.
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    scale: {
        arm: {
            **sizes[settings["on"]],
            **settings,
            "diagrams": _DIAGRAMS.get(arm, ()) if scale == "paper" else (),
        }
        for arm, settings in ARMS.items()
    }
    for scale, sizes in _SIZES.items()
}

PRUNED = 0.6  # share of the neurons that goes
TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={
        "early_stopped": [{"lr": lr} for lr in (0.01, 0.03, 0.1, 0.3)],
        "label_smoothing": [{"smoothing": share} for share in (0.1, 0.3, 0.5, 0.7)],
        "tuned_decay": [{"weight_decay": decay} for decay in (2.5, 5.0, 10.0, 15.0)],
    },
    seeds=(1000, 1001),
)


def about(s: Mapping[str, Any]) -> About:
    """Pairs of residues; each seed has split, wrong labels and start of its own."""
    pairs = round(s["frac"] * s["p"] ** 2)
    data = f"{pairs:,} sums modulo {s['p']}, {s['noise']:.0%} of the labels random"
    if s["on"] == "transformer":
        weights = 2 * s["p"] * s["width"] + 12 * s["width"] ** 2
        return About(data, pairs, f"1-layer transformer, {weights // 1000}k weights", weights)
    weights = 3 * s["p"] * s["width"]
    return About(data, pairs, f"quadratic MLP, {weights // 1000}k weights", weights)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train one arm with one seed; accuracies in per cent.

    Raises:
        Unavailable: paper scale without a GPU.
    """
    device = torch.device(s["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Unavailable(
            "paper scale trains 17 x 17 networks of 500 neurons for each regulariser and needs a CUDA GPU; there is "
            "none here. The laptop scale shows the same phases"
        )
    # Split, random labels, start and batches are all of this seed, the same in all arms.
    task = ModularArithmetic(s["p"], frac=s["frac"], noise=s["noise"], pair_seed=seed, label_seed=seed)
    if s["on"] == "transformer":
        net = seeded(seed, ModularTransformer, s["p"], width=s["width"])
    else:
        settings = {"width": s["width"], "dropout": s["dropout"], "norm": s["norm"]}
        net = seeded(seed, QuadraticMLP, s["p"], **settings)
    net.to(device)
    probe = MemorizationProbe(task)
    log = _train(net, task, probe, s, seed)
    if s["prune"]:
        scores = _order(net, probe, s["prune"], seed)
        sweep = pruning_sweep(net, probe, scores)
        prune_by_score_(net, scores, fraction=PRUNED)
        accuracies = list(_SHOWN.items())[:3]
        curves = {f"pruning: {long}": _curve(sweep, short, x="fraction") for short, long in accuracies}
        unit = "% of the neurons pruned"
    else:
        curves = {f"{s['show']}: {long}": _curve(log, short) for short, long in _SHOWN.items()} if s["show"] else {}
        unit = "step"
    metrics = {**_final(net, task, probe, log, seed), **_diagrams(s, device)}
    # Split and right labels: which of them are replaced is the seed's, and how many the arm's.
    fingerprint = data_fingerprint(task.pairs.numpy(), task.clean.numpy())
    return Measurements(metrics=metrics, curves=curves, data=fingerprint, curve_unit=unit)


_SHOWN = {"test": "test accuracy", "memorized": "corrupted labels", "train": "training accuracy", "ipr": "mean IPR"}


def _curve(records: list[dict[str, float]], name: str, *, x: str = "step") -> list[tuple[float, float]]:
    """In per cent, but for steps and scores."""
    across, up = (1.0 if axis in ("step", "ipr") else 100.0 for axis in (x, name))
    return [(across * record[x], up * record[name]) for record in records]


def _held_out(task: ModularArithmetic, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Validation pairs with labels corrupted as in training, and test pairs that had no part in any choice."""
    pairs, labels = task.test.tensors
    draws = torch.Generator().manual_seed(seed + 7)
    noisy = labels[::2].clone()
    replaced = torch.rand(len(noisy), generator=draws) < task.noise
    noisy[replaced] = torch.randint(task.p, (int(replaced.sum()),), generator=draws)
    return (pairs[::2], noisy), (pairs[1::2], labels[1::2])


def _train(
    net: nn.Module, task: ModularArithmetic, probe: MemorizationProbe, s: Mapping[str, Any], seed: int
) -> list[dict[str, float]]:
    """AdamW on squared errors; leaves the network at its end, or at the best record of what ``keep`` names."""
    device = next(net.parameters()).device
    x, y = (part.to(device) for part in task.train.tensors)
    target = F.one_hot(y, task.p).float()
    smoothing = s["smoothing"]
    target = target * (1 - smoothing) + smoothing / task.p
    loss_of = _cross_entropy(y) if s["on"] == "transformer" else _squared_error(target)
    batch = s["batch_size"]
    optimizer = modular_optimizer(net.parameters(), weight_decay=s["weight_decay"], lr=s["lr"], batch_size=batch)
    steps = round(s["steps"] * s["steps_factor"])
    every = max(1, steps // s["records"])
    draws = torch.Generator().manual_seed(seed)
    validation, _ = _held_out(task, seed)
    log, best, kept = [], -1.0, None
    rows: list[Tensor] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout
        net.train()
        for step in range(1, steps + 1):
            if batch is not None and not rows:
                rows = list(torch.randperm(len(x), generator=draws)[: len(x) // batch * batch].split(batch))
            at = rows.pop().to(device) if batch is not None else slice(None)
            optimizer.zero_grad()
            loss_of(net(x[at]), at).backward()
            optimizer.step()
            if step % every == 0 or step == steps or step <= 10:
                log.append({"step": float(step), **probe(net)})
                if s["keep"]:
                    record = log[-1]
                    both = min(record["train"], record["test"])
                    worth = _accuracy(net, *validation) if s["keep"] == "validation" else both
                    if worth > best:
                        best, kept = worth, copy.deepcopy(net.state_dict())
    if kept is not None:
        net.load_state_dict(kept)
    return log


def _squared_error(target: Tensor) -> Callable[[Tensor, Any], Tensor]:
    return lambda logits, at: F.mse_loss(logits, target[at])


def _cross_entropy(labels: Tensor) -> Callable[[Tensor, Any], Tensor]:
    return lambda logits, at: F.cross_entropy(logits, labels[at])  # "loss_type = 'cse'" in the official notebook


def _order(net: nn.Module, probe: MemorizationProbe, how: str, seed: int) -> Tensor:
    """Scores by which neurons go: periodicity, the size of their weights, or chance."""
    periodic = probe.scores(net)
    assert periodic is not None
    assert isinstance(net, QuadraticMLP)
    if how == "norm":
        first, second = net.neuron_maps()
        return first.detach().square().sum(dim=1) * second.detach().square().sum(dim=0)
    return periodic if how == "ipr" else torch.rand(len(periodic), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _accuracy(net: nn.Module, pairs: Tensor, labels: Tensor) -> float:
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    right = net(pairs.to(device)).argmax(dim=1) == labels.to(device)
    net.train(training)
    return float(right.double().mean())


def _final(
    net: nn.Module, task: ModularArithmetic, probe: MemorizationProbe, log: list[dict[str, float]], seed: int
) -> dict[str, float]:
    found, (validation, test) = probe(net), _held_out(task, seed)
    gains = [m.weight.detach() for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    scores = probe.scores(net)
    assert scores is not None
    phases = detect_phases(log, chance=1 / task.p)
    shares = {
        "train_accuracy": found["train"],
        "memorized_accuracy": found["memorized"],
        "restored_accuracy": found["restored"],
        "clean_train_accuracy": found["clean_train"],
        "test_accuracy": _accuracy(net, *test),
        "validation_accuracy": _accuracy(net, *validation),
    }
    metrics = {name: 100.0 * share for name, share in shares.items()}
    metrics["joint_accuracy"] = min(metrics["memorized_accuracy"], metrics["test_accuracy"])
    metrics["rule_over_noise"] = metrics["test_accuracy"] - metrics["memorized_accuracy"]
    metrics["mean_ipr"] = found["ipr"]
    # A network without normalisation has gains of 1, which correlate with nothing.
    metrics["gain_ipr_correlation"] = float(score_correlation(scores, gains[0])) if gains else 0.0
    metrics["at_coexistence"] = float(any(phase is Phase.COEXISTENCE for phase, _ in phases.phases))
    if phases.delay is not None:
        metrics["grokking_delay"] = phases.delay
    return metrics


def _diagrams(s: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """Shares of the phases in the diagrams that belong to an arm; none below paper scale."""
    shares: dict[str, float] = {}
    for settings in s["diagrams"]:
        diagram = phase_diagram(
            97, fracs=s["cells"], noises=s["cells"], width=500, steps=2000, device=device, **settings
        )
        name = "_".join(f"{key}_{value}" for key, value in settings.items())
        shares |= {f"{name}_share_of_{phase.name.lower()}": diagram.share(phase) for phase in Phase}
    return shares
