"""The question of binding alone: one attention from pictures to voices, and which voice each picture finds.

Two picture tokens, whose content says nothing, ask; the tokens of two voices answer; the answer wanted is the voice of
the same person, of six. Nothing but positions tells which that is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.models import seeded
from regularized.generation.dreamid_omni.layer import SelfAttention, attend
from regularized.generation.dreamid_omni.positions import Layout, Placing, SynRoPE, rotate

FRAMES, STEPS, VOICES = 4, 8, 6


class Asked(NamedTuple):
    """A batch: contents of pictures (B, 2, d) and voice tokens (B, R_1 + R_2, d), the voices (B, 2), and the layout."""

    pictures: Tensor
    tokens: Tensor
    voice: Tensor
    at: Layout


class BindingProbe(nn.Module):
    """One attention across, queries and keys normalised and rotated as in the transformer, and a linear classifier."""

    def __init__(self, dim: int, heads: int, rope: SynRoPE) -> None:
        super().__init__()
        self.attention: SelfAttention = SelfAttention(dim, heads, 1e-6)
        self.classifier: nn.Linear = nn.Linear(dim, VOICES)
        self.rope = rope

    def forward(self, asked: Asked) -> Tensor:
        """Logits (B, 2, 6) of the voice that each picture finds."""
        a = self.attention
        head = asked.pictures.shape[2] // a.heads
        video, audio = self.rope.tables(asked.at, head, device=asked.tokens.device, dtype=asked.tokens.dtype)
        q = rotate(a.split(a.norm_q(a.q(asked.pictures))), video[FRAMES:])
        k = rotate(a.split(a.norm_k(a.k(asked.tokens))), audio[STEPS:])
        logits: Tensor = self.classifier(a.o(attend(q, k, a.split(a.v(asked.tokens)))))
        return logits


def draw(s: Mapping[str, Any], count: int, embedding: Tensor, generator: torch.Generator) -> Asked:
    """A batch of one layout: the lengths of both voices are drawn for it."""
    low, high = s["lengths"]
    lengths = torch.randint(low, high + 1, (2,), generator=generator).tolist()
    voice = torch.rand(count, VOICES, generator=generator).topk(2).indices
    tokens = torch.cat([embedding[voice[:, k, None]].expand(-1, r, -1) for k, r in enumerate(lengths)], dim=1)
    tokens = tokens + s["noise"] * torch.randn(tokens.shape, generator=generator)
    first = 3 if s["apart"] else 1  # persons 3 and 4: slots of their own, as far from the pictures' for both
    at = Layout(FRAMES, (1, 1), STEPS, (1, 2), ((first, lengths[0]), (first + 1, lengths[1])))
    return Asked(torch.randn(count, 2, s["dim"], generator=generator), tokens, voice, at)


def probe(s: Mapping[str, Any], seed: int) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Train the probe and ask it about fresh voices of many layouts.

    Args:
        s: settings of the experiment.
        seed: of data and weights.

    Returns:
        ``binding_accuracy``, percent of the pictures that find their own voice; ``foreign_voice``, percent that find
        the other's; ``validation_accuracy``, the first on draws of its own. And the loss over steps.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(VOICES, s["dim"], generator=generator)
    placing: Placing = s["placing"]
    model = seeded(seed, BindingProbe, s["dim"], s["heads"], SynRoPE(margin=s["margin"], placing=placing))
    optimizer = torch.optim.Adam(model.parameters(), lr=s["probe_lr"])
    curve = []
    for step in range(s["probe_steps"]):
        asked = draw(s, s["probe_batch"], embedding, generator)
        loss = F.cross_entropy(model(asked).flatten(0, 1), asked.voice.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            curve.append((float(step), loss.item()))
    found = {}
    for name, own in (("validation_accuracy", 1), ("binding_accuracy", 2)):
        answers = torch.Generator().manual_seed(1_000_003 * own + seed)
        hits, foreign = [], []
        with torch.no_grad():
            for _ in range(s["probe_layouts"]):
                asked = draw(s, 64, embedding, answers)
                said = model(asked).argmax(dim=2)
                hits.append((said == asked.voice).float().mean())
                foreign.append((said == asked.voice.flip(1)).float().mean())
        found[name] = 100 * float(torch.stack(hits).mean())
        found["foreign_voice"] = 100 * float(torch.stack(foreign).mean())
    return found, curve
