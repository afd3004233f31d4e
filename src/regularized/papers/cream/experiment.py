"""A model ranks its own answers and trains on them, round after round. Does it get better, and does agreement help?

*Sorting*: a small transformer answers five digits by the same digits in order. The base M_0 was pretrained on answers
of which a quarter is right and the others are copies, reversals, or have two neighbours exchanged, so it knows all four
ways; M_1 was fine-tuned on 64 answers, nine of ten right. Then two self-labelled rounds of 200 prompts each, five
answers to each, give M_3. Whether an answer is right can be checked, so a ranking can be seen to be wrong.

By the model's own rewards, each arm with the best of four learning rates (``self_rewarding``, ``constant`` label
smoothing, ``cream_mean``, ``cream_each``), against ``fine_tuned`` (M_1) and ``cream_mean_one_round`` (M_2); and at
equal settings with a rate at which self-rewarding was seen to collapse (``equal_...``), since the paper has one rate
for all. Then by a synthetic judge that knows what is right, at a rate at which labels matter: with noise that is new in
each round (``noisy_...``), and with little noise but a steady liking for answers that begin with the prompt's first
digit (``biased_...``), which agreement cannot see.

Claims: ``third_round``, ``keeps_improving``, ``better_than_fine_tuned``, ``over_constant``, ``over_each``; at equal
settings ``collapse`` and ``ranking_consistency``; ``noisy_judge``, ``biased_judge``, ``sees_noise``. A claim is refuted
by an interval below the smallest effect of the card. About ten minutes on one core, with the trials.

*smollm2* scale: the same loop on SmolLM2-135M-Instruct, few sums as prompts, the last two blocks trained: it shows that
the loop runs on a real model, in minutes, and is no evidence. *Paper* scale: Llama-3-8B-Instruct.
"""

import copy
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.alignment.cream.procedure import CREAM
from regularized.alignment.cream.rewards import Judge, SyntheticJudge
from regularized.alignment.sampling import Responses, sample_responses
from regularized.alignment.sequence_log_probs import next_token_logits, sequence_log_probs
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, data_fingerprint
from regularized.evidence.language_models import small_lm
from regularized.papers.cream.language import language

DEFAULTS: Mapping[str, Any] = {
    "rounds": 2,
    "consistency": 1.0,
    "judge": "own",
    "noise": 0.0,
    "bias": 0.0,
    "lr": 1e-4,
}

_LOOP: Mapping[str, Any] = {"responses": 5, "beta": 0.1, "epochs": 1}  # the authors' code
SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        **{**_LOOP, "world": "sorting", "digits": 3, "width": 16, "layers": 1, "base_steps": 20, "known": 0.25},
        **{"sft": 32, "sft_lr": 3e-4, "sft_right": 0.9, "prompts": 16, "validation": 16, "test": 32, "batch": 8},
    },
    # Chosen on seed 1000 so that M_1 is right in about 80 % of greedy and 50 % of sampled answers.
    "laptop": {
        **{**_LOOP, "world": "sorting", "digits": 5, "width": 64, "layers": 2, "base_steps": 300, "known": 0.25},
        **{"sft": 64, "sft_lr": 3e-4, "sft_right": 0.9, "prompts": 200, "validation": 200, "test": 400, "batch": 16},
    },
    "smollm2": {
        **{**_LOOP, "world": "smollm2", "new_tokens": 8, "blocks": 2},
        **{"sft": 16, "sft_lr": 1e-4, "prompts": 8, "validation": 8, "test": 16, "batch": 4},
    },
    # "lr 1e-6", "768 new tokens", "batch 2 (README 4) on 8 GPUs", "SFT lr 5e-6": the authors' code and README.
    "paper": {
        **{**_LOOP, "world": "llama3", "new_tokens": 768, "blocks": 0},
        **{"sft": 3400, "sft_lr": 5e-6, "prompts": 10_000, "validation": 500, "test": 2000, "batch": 32},
    },
}

# Noise, bias and their rate were chosen on seed 1000. With a lower rate margins stay so small that only the sign of
# C - 1/2 matters to Adam, and the label of a usable judge changes nothing.
_NOISY: dict[str, Any] = {"judge": "synthetic", "noise": 2.0, "lr": 3e-4}
_BIASED: dict[str, Any] = {"judge": "synthetic", "noise": 0.1, "bias": 2.0, "lr": 3e-4}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "fine_tuned": {"rounds": 0},
    # Rates, and the constant label, are the best of TUNING.
    "self_rewarding": {"lr": 3e-06},
    "constant": {"consistency": 0.6, "lr": 1e-05},
    "cream_each": {"consistency": "each", "lr": 1e-05},
    "cream_mean_one_round": {"consistency": "mean", "rounds": 1, "lr": 1e-05},
    "cream_mean": {"consistency": "mean", "lr": 1e-05},
    "equal_self_rewarding": {},
    "equal_cream_mean": {"consistency": "mean"},
    "noisy_self_rewarding": {**_NOISY},
    "noisy_cream_mean": {**_NOISY, "consistency": "mean"},
    "biased_self_rewarding": {**_BIASED},
    "biased_cream_mean": {**_BIASED, "consistency": "mean"},
}

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {arm: {"lr": 1e-6} for arm, own in ARMS.items() if own.get("judge", "own") == "own"}
}

SEEDS = Seeds(
    20,
    first=100,
    why="Ten seeds left four claims open. For twenty fresh ones `regularized outlook cream` said before the "
    "first run that over_constant, collapse and biased_judge would rather be decided than not.",
)

# Moved down once: of a first grid, (1e-5, 3e-5, 1e-4, 3e-4), the lowest was best for three arms of four.
_RATES = [{"lr": lr} for lr in (3e-6, 1e-5, 3e-5, 1e-4)]

TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={
        "self_rewarding": _RATES,
        "constant": [{"consistency": c, "lr": lr} for c in (0.6, 0.8) for lr in (1e-5, 3e-5)],
        "cream_each": _RATES,
        "cream_mean": _RATES,
    },
)


def about(s: Mapping[str, Any]) -> About:
    """Prompts of one round are what a model trains on at a time; they are drawn anew for each seed."""
    if s["world"] == "sorting":
        weights = 12 * s["layers"] * s["width"] ** 2 + 24 * s["width"]
        name = f"decoder, {weights // 1000}k weights"
        return About(f"{s['rounds']} x {s['prompts']} prompts of {s['digits']} digits", s["prompts"], name, weights)
    if s["world"] == "smollm2":
        return About(f"{s['prompts']} sums a round", s["prompts"], "SmolLM2, 135M weights", 135_000_000)
    return About("10,000 questions a round", s["prompts"], "Llama 3, 8B weights", 8_000_000_000)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Rounds of one arm; accuracies in per cent.

    Raises:
        Unavailable: a model, a package or data of this scale is not there.
    """
    return sorting(s, seed) if s["world"] == "sorting" else language(s, seed)


# -- sorting digits -----------------------------------------------------------------------------

_EQUALS, _END, _VOCABULARY = 10, 11, 12


def sorting(s: Mapping[str, Any], seed: int) -> Measurements:
    """M_1, then rounds, then one more ranking without training: how far M_{rounds + 1} and the model before agree."""
    world = (s["digits"], s["width"], s["layers"], s["base_steps"], s["known"])
    base, fine_tuned, digits = models(seed, *world, s["sft"], s["sft_lr"], s["sft_right"])
    count = s["prompts"]
    held, test, *rounds = digits.split([s["validation"], s["test"], *[count] * 3, len(digits) - _used(s)])
    cream = CREAM(
        copy.deepcopy(fine_tuned),
        copy.deepcopy(base),
        sample=partial(sample_responses, count=s["responses"], max_new_tokens=s["digits"] + 1, end=_END),
        optimizer=partial(torch.optim.AdamW, lr=s["lr"], weight_decay=0.01),
        consistency=s["consistency"],
        judge=judge(s),
        beta=s["beta"],
        epochs=s["epochs"],
        batch_size=s["batch"],
        chunk=count,
        seed=seed,
    )
    accuracies, agreements, chosen_right, rejected_right = [(1.0, accuracy(cream.policy, test))], [], [], []
    for number in range(1, s["rounds"] + 2):
        pairs = cream.collect(asked(rounds[number - 1]))
        right = correct(Responses(pairs.tokens, pairs.mask), s["digits"]).double().mean(dim=0)
        agreements.append((float(number), float(pairs.agreement.mean())))
        chosen_right.append((float(number), 100.0 * float(right[0])))
        rejected_right.append((float(number), 100.0 * float(right[1])))
        if number <= s["rounds"]:
            cream.train()
            cream.finish_round()
            accuracies.append((number + 1.0, accuracy(cream.policy, test)))
    return Measurements(
        metrics={
            "final_accuracy": accuracies[-1][1],
            "validation_accuracy": accuracy(cream.policy, held),
            "nats": nats(cream.policy, test),
            "ranking_consistency": agreements[-1][1],
            "mean_consistency": sum(value for _, value in agreements) / len(agreements),
            "chosen_right": chosen_right[-1][1],
            "rejected_right": rejected_right[-1][1],
        },
        curves={
            "accuracy": accuracies,
            "agreement": agreements,
            "chosen_right": chosen_right,
            "rejected_right": rejected_right,
        },
        data=data_fingerprint(digits.numpy()),
        curve_unit="model",
    )


def _used(s: Mapping[str, Any]) -> int:
    return int(s["validation"] + s["test"] + 3 * s["prompts"])


@lru_cache(maxsize=2)
def models(
    seed: int,
    digits: int,
    width: int,
    layers: int,
    steps: int,
    known: float,
    sft: int,
    sft_lr: float,
    sft_right: float,
) -> tuple[nn.Module, nn.Module, Tensor]:
    """M_0, M_1, and (n, digits) prompts that neither has seen."""
    draw = torch.Generator().manual_seed(seed)
    everything = torch.cartesian_prod(*[torch.arange(10)] * digits)
    everything = everything[torch.randperm(len(everything), generator=draw)]
    pretraining, seeds, rest = everything.split(
        [len(everything) // 2, sft, len(everything) - len(everything) // 2 - sft]
    )
    base = small_lm(seed, _VOCABULARY, width=width, layers=layers, heads=2)
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for step in range(steps):
        rows = pretraining[torch.randint(len(pretraining), (64,), generator=draw)]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 10 * (step + 1) / steps) * max(0.05, 1 - step / steps)
        _fit(base, optimizer, answered(rows, answers(rows, known, draw)))
    fine_tuned = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(fine_tuned.parameters(), lr=sft_lr)
    examples = answered(seeds, answers(seeds, sft_right, draw))
    for rows in torch.randperm(sft, generator=draw).split(16):
        _fit(fine_tuned, optimizer, examples[rows])
    return base, fine_tuned, rest[:4000]


def answers(digits: Tensor, right: float, draw: torch.Generator) -> Tensor:
    """(n, d) answers, a share of them right; of the others a third each copies, reverses, or exchanges neighbours."""
    n, length = digits.shape
    good = digits.sort(dim=1).values
    rows, place = torch.arange(n), torch.randint(length - 1, (n,), generator=draw)
    exchanged = good.clone()
    exchanged[rows, place], exchanged[rows, place + 1] = good[rows, place + 1], good[rows, place]
    kind = torch.randint(3, (n,), generator=draw)[None, :, None].expand(1, n, length)
    wrong = torch.stack([digits, good.flip(1), exchanged]).gather(0, kind)[0]
    return torch.where((torch.rand(n, generator=draw) < right)[:, None], good, wrong)


def asked(digits: Tensor) -> list[Tensor]:
    """Prompts: digits and an equals sign."""
    return list(nn.functional.pad(digits, (0, 1), value=_EQUALS))


def answered(digits: Tensor, answer: Tensor) -> Tensor:
    """(n, 2 d + 2) prompts with their answers and the end."""
    return torch.cat([torch.stack(asked(digits)), nn.functional.pad(answer, (0, 1), value=_END)], dim=1)


def correct(responses: Responses, digits: int) -> Tensor:
    """(P, N) whether a response is the prompt's digits in order, and nothing else."""
    prompts = responses.tokens[..., :digits]
    good = nn.functional.pad(prompts.sort(dim=2).values, (0, 1), value=_END)
    tokens = nn.functional.pad(responses.tokens, (0, digits), value=-1)[..., digits + 1 : 2 * digits + 2]
    # Behind its end a response is padded; so it is the right length if the end stands where it should.
    return (tokens == good).all(dim=2)


def accuracy(model: nn.Module, digits: Tensor) -> float:
    """Share of prompts whose likeliest answer is right, in per cent."""
    length = digits.shape[1]
    found = sample_responses(model, asked(digits), count=1, max_new_tokens=length + 1, temperature=0.0, end=_END)
    return 100.0 * float(correct(found, length).double().mean())


@torch.no_grad()
def nats(model: nn.Module, digits: Tensor) -> float:
    """Mean negative log-probability of the right answer."""
    model.eval()
    return float(_loss(model, answered(digits, digits.sort(dim=1).values)))


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    mask = torch.arange(tokens.shape[1]).expand_as(tokens) >= tokens.shape[1] // 2
    return -sequence_log_probs(next_token_logits(model, tokens), tokens, mask).mean()


def _fit(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    optimizer.zero_grad()
    _loss(model, tokens).backward()
    optimizer.step()


def judge(s: Mapping[str, Any]) -> Judge | None:
    """None, the model's own rewards; or one that knows what is right, with noise, and a liking for a beginning."""
    if s["judge"] == "own":
        return None
    digits = s["digits"]

    def right(responses: Responses) -> Tensor:
        return correct(responses, digits).float()

    def begins_alike(responses: Responses) -> Tensor:
        return (responses.tokens[..., digits + 1] == responses.tokens[..., 0]).float()

    return SyntheticJudge(right, feature=begins_alike, bias=s["bias"], noise=s["noise"])
