"""Commands longer than any in training: does a term on the states of word pairs lower the homomorphism error, and help?

A small causal transformer reads commands of two words with nine noise words (the level at which the published table
shows its gain) and is tested on commands of 5 to 12 words without noise. Claims: ``modifier_error`` and
``sequence_error``, measured with fresh probes; ``relative_error``, the same divided by the variance of the states,
which merely smaller states do not lower; ``ood_accuracy``; ``in_batch``: pairs of the task's own batch do as well as
the official second batch; and ``pairs_matter``, against a control that has operators, pool and weight, but pairs of
arbitrary neighbours.

The learning rate of each arm, and the weight of the term, have as many trials on held-out commands of training's kind.
A claim is refuted by an interval below the smallest effect of the card. Five minutes for five seeds on two cores.
*Paper*
scale: d 128, 4 layers, 2,000 commands, 50 epochs, learning rate 1e-4; over an hour on two cores.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.experiment import About, Measurements, Tuning, data_fingerprint
from regularized.evidence.models import seeded
from regularized.understanding.homomorphism_error.command_language import MODIFIERS, VOCABULARY, WORDS, commands, encode
from regularized.understanding.homomorphism_error.penalty import CompositionOperators, composition_loss, find_pairs
from regularized.understanding.homomorphism_error.pool import PairPool
from regularized.understanding.homomorphism_error.probes import homomorphism_error, modifier_triples, segment_triples

_WORDS = [VOCABULARY.index(word) for word in WORDS]
_MODIFIERS = [VOCABULARY.index(word) for word in MODIFIERS]
_NOISE_PAIRS = [number for number, word in enumerate(VOCABULARY) if word in ("foo", "bar", "baz")]

DEFAULTS: Mapping[str, Any] = {"lr": 0.0005, "term": "", "weight": 0.0}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"width": 16, "layers": 2, "commands": 60, "epochs": 1, "pool": 8, "test": 10, "probe_epochs": 2},
    # Ours: half the width and depth, a fifth of the epochs, a rate ten times as high.
    "laptop": {"width": 64, "layers": 2, "commands": 800, "epochs": 12, "pool": 64, "test": 60, "probe_epochs": 20},
    # "d=128, L=4, heads 4, d_ff 256, dropout 0.1"; "up to 2000 training pairs", "50 epochs", pool draws of 256.
    "paper": {"width": 128, "layers": 4, "commands": 2000, "epochs": 50, "pool": 256, "test": 200, "probe_epochs": 50},
}

NOISE, BATCH, LONGEST = 9, 64, 50  # "Batch 64"; "max_len 50"

ARMS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"lr": 0.00025},
    "any_neighbours": {"lr": 0.0005, "term": "any", "weight": 0.2},
    "homomorphism": {"lr": 0.0005, "term": "pool", "weight": 1.0},
    "in_batch": {"lr": 0.001, "term": "batch", "weight": 0.2},
}

_WITH_WEIGHT = [{"lr": lr, "weight": weight} for lr in (5e-4, 1e-3) for weight in (0.2, 1.0)]
TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    grids={
        "plain": [{"lr": lr} for lr in (2.5e-4, 5e-4, 1e-3, 2e-3)],
        "any_neighbours": _WITH_WEIGHT,
        "homomorphism": _WITH_WEIGHT,
        "in_batch": _WITH_WEIGHT,
    },
    seeds=(1000, 1001),
)


class Transformer(nn.Module):
    """Causal, post-norm, sinusoidal positions; the states are the outputs of ``blocks.i``."""

    positions: Tensor

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), width)
        place = torch.arange(LONGEST)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.stack([place.sin(), place.cos()], dim=-1).flatten(1))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, activation="gelu", batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to logits (B, T, V)."""
        length = tokens.shape[1]
        x = self.embedding(tokens) + self.positions[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


def task_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Position t of the output against token t of the meaning, as far as both go: no shift (official)."""
    length = min(logits.shape[1], y.shape[1])
    return F.cross_entropy(logits[:, :length].flatten(0, 1), y[:, :length].flatten(), ignore_index=0)


def about(s: Mapping[str, Any]) -> About:
    """Commands of a small language, drawn anew for each seed; the test is the same for all."""
    weights = 8 * s["layers"] * s["width"] ** 2
    model = f"{s['layers']}-layer transformer, {weights // 1000}k weights"
    return About(f"{s['commands']:,} commands of two words", s["commands"], model, weights)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train one arm with one seed; token accuracies in per cent."""
    pairs = commands(2, noise=NOISE, largest=2 * s["commands"], seed=seed)
    cut = len(pairs) // 2
    x, y = encode([command for command, _ in pairs]), encode([meaning for _, meaning in pairs])
    train, held = (x[:cut], y[:cut]), (x[cut:], y[cut:])
    net = seeded(seed, Transformer, s["width"], s["layers"])
    layers = [f"blocks.{k}" for k in sorted({(s["layers"] - 1) // 2, s["layers"] - 1})]  # "layers {2,4}" of four
    curve = _train(net, train, layers, s, seed)
    net.eval()
    states: list[Tensor] = []
    handle = net.get_submodule(layers[-1]).register_forward_hook(lambda _m, _i, out: states.append(out))
    with torch.no_grad():
        net(train[0])
    handle.remove()
    modifier = homomorphism_error(
        modifier_triples(train[0], states[0], _WORDS, _MODIFIERS), epochs=s["probe_epochs"], seed=seed
    )
    segments = homomorphism_error(segment_triples(train[0], states[0], _WORDS), epochs=s["probe_epochs"], seed=seed)
    return Measurements(
        metrics={
            "ood_token_accuracy": sum(_on_longer(net, words, s["test"]) for words in range(5, 13)) / 8,
            "validation_accuracy": _accuracy(net, *held),
            "train_accuracy": _accuracy(net, *train),
            "modifier_error": modifier.mean,
            "relative_modifier_error": modifier.relative,
            "sequence_error": segments.mean,
            "state_variance": modifier.variance,
        },
        curves={"task_loss": curve},
        data=data_fingerprint(x.numpy(), y.numpy()),
    )


def _train(
    net: nn.Module, data: tuple[Tensor, Tensor], layers: list[str], s: Mapping[str, Any], seed: int
) -> list[tuple[float, float]]:
    """Adam over model and operators together; the mean task loss of each epoch."""
    x, y = data
    # Streams of their own: the order of the data and the dropout are the same in all arms.
    order, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(12345)
    operators = seeded(seed + 1, CompositionOperators, s["width"], _MODIFIERS, hidden=2 * s["width"])
    pool = PairPool.mine(x, _WORDS, _MODIFIERS)
    if s["term"] == "any":
        # The control: as many pairs, of noise words and whatever follows them, dealt to the operators at random.
        first = (torch.isin(x[:, :-1], torch.tensor(_NOISE_PAIRS)) & (x[:, 1:] != 0)).nonzero()[: len(pool.first)]
        pool = PairPool(x[first[:, 0]], first[:, 1], torch.randint(2, (len(first),), generator=draws))
    optimizer = torch.optim.Adam([*net.parameters(), *operators.parameters()], lr=s["lr"], betas=(0.9, 0.98))
    curve = []
    torch.manual_seed(seed)
    for epoch in range(s["epochs"]):
        net.train()
        total = torch.zeros(())
        for rows in torch.randperm(len(x), generator=order).split(BATCH):
            with _Recorded(net, layers if s["term"] == "batch" else []) as states:
                loss = task_loss(net(x[rows]), y[rows])
                total += loss.detach() * len(rows)
                state = torch.get_rng_state()
                if s["term"] == "batch":
                    loss = loss + s["weight"] * _of_batch(x[rows], states, operators)
            if s["term"] in ("pool", "any"):
                loss = loss + s["weight"] * pool.sample(s["pool"], draws).loss(net, layers, operators)  # type: ignore[arg-type]
            torch.set_rng_state(state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append((float(epoch + 1), float(total) / len(x)))
    return curve


class _Recorded:
    """Outputs of named submodules, while it lasts."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        self.states: list[Tensor] = []
        self.handles = [
            net.get_submodule(name).register_forward_hook(lambda _m, _i, out: self.states.append(out)) for name in names
        ]

    def __enter__(self) -> list[Tensor]:
        return self.states

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _of_batch(tokens: Tensor, states: list[Tensor], operators: nn.Module) -> Tensor:
    """The same loss on the pairs of the task's own batch."""
    assert isinstance(operators, CompositionOperators)
    found, which = find_pairs(tokens, _WORDS, _MODIFIERS)
    rows, first = found.nonzero(as_tuple=True)
    if not len(rows):
        return states[0].new_zeros(())
    return composition_loss(states, (rows, first, first + 1), which[rows, first], operators)


@torch.no_grad()
def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of tokens of the meaning that are right, as far as the input's length goes."""
    net.eval()
    logits = net(x)
    length = min(x.shape[1], y.shape[1])
    wanted = y[:, :length]
    right = (logits[:, :length].argmax(dim=-1) == wanted) & (wanted != 0)
    return 100.0 * float(right.sum()) / float((wanted != 0).sum())


def _on_longer(net: nn.Module, words: int, number: int) -> float:
    pairs = commands(words, largest=number, seed=123)  # "noise 0, seed 123"
    return _accuracy(net, encode([command for command, _ in pairs]), encode([meaning for _, meaning in pairs]))
