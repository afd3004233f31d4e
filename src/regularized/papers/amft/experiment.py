"""Demonstrations are partly wrong, rewards are rare: does a learned weight between them beat what can be had without?

A transformer of two layers that knows the notation, and nothing more, is fine-tuned on answers of which 40 % are wrong,
and on a reward of 1 for a right answer. *sums*: three digits are added. *points*: three cards make 24, in any order of
the cards. All arms start from the same network and make the same number of steps, on the same demonstrations; the
weight alone differs. ``test_accuracy`` is that of greedy answers to prompts that were never seen (points: other orders
of the same hands), ``shifted_accuracy`` that for sums with a digit twice, of which there was none in training.

Claims: ``over_sft``, ``over_rl``, ``over_two_stages``, ``adaptive_against_fixed``, ``over_scheduled``, ``shifted``,
``sooner`` (mean accuracy over the training), ``points_over_two_stages``, ``points_over_fixed`` (the paper's
comparisons); ``meta_helps``, ``entropy_helps``, ``warmup_helps`` (its ablations); ``direction``, ``meta_pull``,
``published_rates`` (what moves the weight). A claim is refuted by an interval below the smallest effect of the card.

Tuned arms have four trials each, over what is theirs: rate, weight, schedule, switch, or the controller's two rates.
Ablations keep the settings of the method. The meta-gradient looks at 64 right answers that nobody else sees, but which
are also what all settings are chosen on. About twenty minutes on a free core, with the trials. *Paper* scale: what the
authors trained, for which no code exists that runs.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regularized.alignment.amft.controller import MetaWeightController
from regularized.alignment.amft.mixing import Mixer
from regularized.alignment.amft.points import PointsGame
from regularized.alignment.amft.procedure import AMFT
from regularized.alignment.amft.puzzles import ALPHABET, END, Demonstrations, Sums
from regularized.alignment.amft.schedule import ScheduledWeight
from regularized.evidence.experiment import About, Measurements, Tuning, Unavailable, data_fingerprint
from regularized.evidence.language_models import small_lm
from regularized.training.data import TensorData
from regularized.training.progress import linear, piecewise

DEFAULTS: Mapping[str, Any] = {
    "task": "sums",
    "wrong": 0.4,  # share of the demonstrations
    "reward": "checked",  # or "random"
    "weight": "fixed",  # "fixed" and "linear" (mu to mu_end), "stages" (1, then 0), "learned"
    "mu": 0.5,
    "mu_end": 0.0,
    "switch": 0.5,  # share of the steps behind which imitation ends
    "warmup": 32,
    "meta_lr": 0.0,
    "entropy_lr": 0.0,
    "normalize": "cosine",
    "every": 4,  # ours: the paper's 20 would look eight times
    "lr": 3e-3,
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "train": 64,
        "held_out": 16,
        "test": 32,
        "base_epochs": 1,
        "epochs": 2,
        "batch": 16,
        "width": 16,
        "answers": 2,
        "layers": 1,
        "warmup": 2,
    },
    "laptop": {
        "train": 1024,
        "held_out": 64,
        "test": 176,
        "base_epochs": 9,
        "epochs": 6,
        "batch": 32,
        "width": 48,
        "answers": 4,
        "layers": 2,
    },
    # "46k problems", "8 answers", "500 steps", "warm-up 50": paper and configuration.
    "paper": {
        "train": 46_000,
        "held_out": 0,
        "test": 0,
        "base_epochs": 0,
        "epochs": 1,
        "batch": 8,
        "width": 3584,
        "answers": 8,
        "layers": 28,
        "warmup": 50,
    },
}

_LEARNED: dict[str, Any] = {"weight": "learned", "meta_lr": 0.05, "entropy_lr": 5e-4}
_STAGES: dict[str, Any] = {"weight": "stages", "switch": 0.9}
_FIXED: dict[str, Any] = {"mu": 0.5}
_POINTS: dict[str, Any] = {"task": "points"}
ARMS: Mapping[str, Mapping[str, Any]] = {
    # The best of TUNING.
    "sft": {"mu": 1.0, "lr": 1e-3},
    "rl": {"mu": 0.0, "warmup": 0, "lr": 1e-4},
    "sft_then_rl": {**_STAGES},
    "fixed_weight": {**_FIXED},
    "scheduled_weight": {"weight": "linear", "mu": 1.0, "mu_end": 0.5},
    "adaptive_weight": {**_LEARNED},
    "entropy_rule": {**_LEARNED, "meta_lr": 0.0},
    "meta_only": {**_LEARNED, "entropy_lr": 0.0},
    "no_warmup": {**_LEARNED, "warmup": 0},
    "random_rewards": {**_LEARNED, "entropy_lr": 0.0, "wrong": 0.0, "reward": "random"},
    # "0.8", "1e-4", "5e-4", "20": the authors' configuration.
    "published": {
        "weight": "learned",
        "mu": 0.8,
        "meta_lr": 1e-4,
        "entropy_lr": 5e-4,
        "normalize": "none",
        "every": 20,
    },
    "points_sft_then_rl": {**_POINTS, **_STAGES},
    "points_fixed_weight": {**_POINTS, **_FIXED},
    "points_adaptive_weight": {**_POINTS, **_LEARNED},
}

TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={
        # Moved down once: the lowest rates of (1e-3 ... 1e-2) and (3e-4 ... 5e-3) had been the best. RL
        # alone improves at none: its rewards are too rare.
        "sft": [{"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 5e-3)],
        "rl": [{"lr": lr} for lr in (1e-4, 3e-4, 1e-3, 3e-3)],
        "sft_then_rl": [{"switch": switch} for switch in (0.3, 0.5, 0.7, 0.9)],
        "fixed_weight": [{"mu": mu} for mu in (0.05, 0.2, 0.5, 0.8)],
        "scheduled_weight": [
            {"mu": mu, "mu_end": end} for mu, end in ((1.0, 0.0), (1.0, 0.5), (0.5, 0.05), (0.2, 0.8))
        ],
        "adaptive_weight": [{"meta_lr": m, "entropy_lr": h} for m in (0.05, 0.2) for h in (5e-4, 5e-3)],
    },
)


class Data(NamedTuple):
    """Demonstrations of each part, and prompts to be judged by."""

    notation: Demonstrations  # expressions and numbers that are hardly ever right
    train: Demonstrations
    held_out: Demonstrations  # right ones
    test: Tensor
    shifted: Tensor


def about(s: Mapping[str, Any]) -> About:
    """Strings of a few tokens through a small transformer, or 46,000 problems through Qwen."""
    if s["held_out"] == 0:
        return About("46,000 problems of OpenR1-Math", s["train"], "Qwen2.5-Math-7B", 7_600_000_000)
    weights = sum(p.numel() for p in network(s, 0).parameters())
    size = f"{s['layers']}-layer transformer, {weights // 1000}k weights"
    if s["task"] == "points":
        return About("160 deals of 47 hands that make 24", 160, size, weights, 64 / 160)
    return About(
        f"{s['train']:,} sums of three digits", s["train"], size, weights, s["test"] / (720 - s["held_out"] - s["test"])
    )


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Teach the notation, then fine-tune by one arm, and judge greedy answers.

    Raises:
        Unavailable: at paper scale.
    """
    if s["held_out"] == 0:
        raise Unavailable(
            "the paper's scale needs Qwen2.5-Math-7B, OpenR1-Math-46k-8192, a grader of its answers and four A100 for "
            "a day; the authors' code draws no answers and cannot run it. AMFT takes your model, data and reward"
        )
    task: Sums | PointsGame = _points() if s["task"] == "points" else Sums(3, digits=1)
    data = load(s["task"], seed, s["train"], s["held_out"], s["test"], s["wrong"])
    model = network(s, seed)
    _teach_notation(model, data.notation, s, seed)
    training = AMFT(
        model,
        reward=task.reward if s["reward"] == "checked" else _noise,
        optimizer=partial(torch.optim.AdamW, lr=s["lr"]),
        end=END,
        length=task.answer_length,
        controller=mixer(s),
        warmup=s["warmup"],
        rollouts=s["answers"],
        seed=seed,
    )
    judge = partial(_accuracy, training, task)
    curve = [(0.0, judge(data.held_out.prompts))]
    path: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(training: AMFT) -> None:
        if training.last is not None:
            path.append((training.last.mu, training.last.meta, training.last.entropy))

    def after_epoch(training: AMFT) -> None:
        curve.append((float(training.epoch), judge(data.held_out.prompts)))

    batches = TensorData(*data.train, batch_size=s["batch"], seed=seed)
    training.fit(batches, validation=data.held_out, epochs=s["epochs"], after_step=note, after_epoch=after_epoch)
    mu, meta, entropy = torch.tensor([[float(x) for x in step] for step in path], dtype=torch.float64).unbind(1)
    pushes = meta.abs().sum() + entropy.abs().sum()
    return Measurements(
        metrics={
            "test_accuracy": judge(data.test),
            "shifted_accuracy": judge(data.shifted),
            "validation_accuracy": curve[-1][1],
            "mean_accuracy": sum(value for _, value in curve[1:]) / s["epochs"],
            "imitation_weight": float(mu[-1]),
            "mean_weight": float(mu.mean()),
            "meta_share": float(meta.abs().sum() / pushes) if pushes else 0.0,
        },
        curves={
            "held_out_accuracy": curve,
            "imitation_weight": [
                (i / len(mu) * s["epochs"], float(mu[i])) for i in range(0, len(mu), max(1, len(mu) // 20))
            ],
        },
        data=data_fingerprint(*(tensor.numpy() for tensor in (*data.train, data.test))),
    )


def mixer(s: Mapping[str, Any]) -> Mixer:
    """What decides on the weight."""
    if s["weight"] == "learned":
        return MetaWeightController(
            s["mu"], meta_lr=s["meta_lr"], entropy_lr=s["entropy_lr"], every=s["every"], normalize=s["normalize"]
        )
    if s["weight"] == "linear":
        return ScheduledWeight(linear(s["mu"], s["mu_end"]))
    return ScheduledWeight(piecewise({0.0: 1.0, s["switch"]: 0.0}) if s["weight"] == "stages" else s["mu"])


@lru_cache(maxsize=1)
def _points() -> PointsGame:
    return PointsGame(cards=3)


@lru_cache(maxsize=2)
def load(task: str, seed: int, train: int, held_out: int, test: int, wrong: float) -> Data:
    """A seed's prompts and answers: disjoint prompts in each part; those of training are seen several times."""
    draw = torch.Generator().manual_seed(seed)
    if task == "points":
        game: PointsGame | Sums = _points()
        deals = torch.cat([_points().prompts(_points().hands, draw) for _ in range(60)]).unique(dim=0)
        parts = deals[torch.randperm(len(deals), generator=draw)]
        seen, held, asked = parts[:160], parts[160 : 160 + min(held_out, 32)], parts[160 + min(held_out, 32) :]
        shifted = asked
    else:
        game = Sums(3, digits=1)
        every = torch.cartesian_prod(*[torch.arange(10)] * 3)
        every = every[torch.randperm(len(every), generator=draw)]
        prompts = _written(every)
        twice = (every.sort(dim=1).values.diff(dim=1) == 0).any(dim=1)
        inside, shifted = prompts[~twice], prompts[twice]  # 720 and 280
        held, asked, seen = inside.split([held_out, test, len(inside) - held_out - test])
    rows = torch.randint(len(seen), (2, train), generator=draw)
    return Data(
        game.demonstrate(seen[rows[0]], draw, wrong=1.0),
        game.demonstrate(seen[rows[1]], draw, wrong=wrong),
        game.demonstrate(held, draw),
        asked,
        shifted,
    )


def _written(digits: Tensor) -> Tensor:
    """(N, 6) prompts of (N, 3) digits, such as ``3+5+8=``."""
    plus, equals = (torch.full((len(digits),), ALPHABET.index(sign)) for sign in "+=")
    first, second, third = digits.unbind(1)
    return torch.stack([first, plus, second, plus, third, equals], dim=1)


def network(s: Mapping[str, Any], seed: int) -> nn.Module:
    """The transformer, before it has learnt anything."""
    return small_lm(seed, len(ALPHABET), width=s["width"], layers=s["layers"], heads=2)


def _teach_notation(model: nn.Module, notation: Demonstrations, s: Mapping[str, Any], seed: int) -> None:
    """What stands for pretraining: the form of an answer, with contents that are hardly ever right."""
    teaching = AMFT(
        model,
        reward=_noise,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        end=END,
        length=1,
        controller=ScheduledWeight(1.0),
        seed=seed,
    )
    teaching.fit(TensorData(*notation, batch_size=2 * s["batch"], seed=seed), epochs=s["base_epochs"])


def _noise(prompts: Tensor, answers: Tensor) -> Tensor:
    """Rewards that have nothing to do with the answers."""
    return torch.randint(2, (len(answers),)).float()


def _accuracy(training: AMFT, task: Sums | PointsGame, prompts: Tensor) -> float:
    drawn = training.answers(prompts)
    return 100.0 * float(task.reward(prompts, drawn).double().mean())
