"""The judge of a language model: what a step computes, padding, pairing, modes, state."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from regularized.alignment.self_judge import (
    Answer,
    Judge,
    PrivilegedDistillation,
    Vocabulary,
    expected_score,
    last_logits,
    prompt,
    view_of,
)
from regularized.evidence.pretrained import tiny_llama
from regularized.training.progress import Progress
from regularized.training.step import Batch


def encode(text):
    return list(text.encode())


VOCABULARY = Vocabulary.of(encode, end=2)
SGD = partial(torch.optim.SGD, lr=0.1)


class Reader(nn.Module):
    """Reads from left to right, masked tokens excepted; called by :func:`logits`."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.read, self.say, self.dropout = nn.Embedding(256, 12), nn.Linear(12, 256), nn.Dropout(dropout)

    def forward(self, tokens, mask):
        seen = (self.read(tokens) * mask[..., None]).cumsum(1) / mask.cumsum(1).clamp(min=1).sqrt()[..., None]
        return self.say(self.dropout(seen))


def logits(model, tokens, mask, k):
    return model(tokens, mask)[:, -k:]


def answers(count=8):
    return [Answer(f"q{n}", f"{n} + 1?", "x" * (n % 3) + str(n), f"it is {n + 1}", n % 10) for n in range(count)]


def views(count=8):
    return tuple(view_of(answers(count), encode, with_reference=with_it) for with_it in (True, False))


def judge(dropout=0.0, optimizer=SGD, **options):
    torch.manual_seed(0)
    return Judge(Reader(dropout), VOCABULARY, optimizer=optimizer, logits=logits, **options)


def test_a_step_is_the_loss_of_whole_sequences():
    """Fails when the rows that predict grade and end are not those of the official loss on the full sequences."""
    built, (seen, blind) = judge(), views()
    model = copy.deepcopy(built.model)
    (loss,) = built.fit(seen, blind, epochs=1, batch_size=8)
    z, t = [], []
    for view in (seen, blind):
        tail = torch.stack([torch.tensor([VOCABULARY.grades[g], 2]) for g in view.grades.tolist()])
        tokens = torch.cat([view.tokens, tail], 1)
        mask = torch.cat([view.mask, torch.ones(8, 2, dtype=torch.bool)], 1)
        z.append(model(tokens, mask))
        t.append(tokens.clone())
        t[-1][:, :-2] = -100
    expected = PrivilegedDistillation(eos_id=2)(*z, *t).detach()
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_views_are_paired_by_key():
    """Fails when the student's view is taken in the order in which it comes."""
    seen, blind = views()
    shuffled = view_of(answers()[::-1], encode, with_reference=False)
    one, other = (judge().fit(seen, second, epochs=2, batch_size=4) for second in (blind, shuffled))
    assert one == other


def test_the_views_differ_in_the_reference_alone():
    """Fails when the student sees the reference, or the teacher another question."""
    one = answers()[0]
    seen, blind = (prompt(one, with_reference=with_it) for with_it in (True, False))
    assert seen.replace("[Reference]\nit is 1\n\n", "") == blind
    assert "it is 1" not in blind


def test_score():
    """Fails when padding counts, another position is read, dropout is on, or the model's mode is changed."""
    built, (_, blind) = judge(dropout=0.5), views()
    built.model.train()
    found = built.score(blind, batch_size=3)
    assert built.model.training
    built.model.eval()
    for row in range(8):
        tokens = blind.tokens[row, blind.mask[row]][None]
        z = built.model(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -1]
        torch.testing.assert_close(found[row], expected_score(z, VOCABULARY.grades))


def test_it_learns_what_can_be_learnt():
    """Fails when the gradient has the wrong sign, or the grade's token stands in its own prompt."""
    graded = [Answer(str(n), "?", "good" if n % 2 else "bad", "good", 9 * (n % 2)) for n in range(16)]
    seen, blind = (view_of(graded, encode, with_reference=with_it) for with_it in (True, False))
    built = judge(optimizer=partial(torch.optim.Adam, lr=0.03))
    losses = built.fit(seen, blind, epochs=60, batch_size=8)
    scores = built.score(blind)
    assert losses[-1] < losses[0] / 3
    assert float(scores[1::2].min()) > float(scores[0::2].max()) + 1


def test_divergence_brings_the_views_together():
    """Fails when the divergence is not minimised by the student."""
    apart = []
    seen, blind = views(10)
    for alpha_kd in (0.0, 2.0):
        built = judge(optimizer=partial(torch.optim.Adam, lr=0.02), alpha_kd=alpha_kd)
        built.fit(seen, blind, epochs=25, batch_size=10)
        apart.append(float((built.score(seen) - built.score(blind)).abs().mean()))
    assert apart[1] < apart[0]


def test_resuming_is_exact():
    """Fails when the optimizer, the position or the order of the samples is not in the state."""
    seen, blind = views()
    adam = partial(torch.optim.Adam, lr=0.01)
    whole = judge(dropout=0.2, optimizer=adam)
    whole.fit(seen, blind, epochs=3, batch_size=4)
    first = judge(dropout=0.2, optimizer=adam)
    first.fit(seen, blind, epochs=1, batch_size=4)
    resumed = judge(dropout=0.2, optimizer=adam)
    resumed.load_state_dict(first.state_dict())
    assert len(resumed.fit(seen, blind, epochs=3, batch_size=4)) == 2
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_one_pass_over_both_views():
    """Fails when a step calls the model twice, or asks for logits of the whole prompt."""
    calls = []

    def counted(model, tokens, mask, k):
        calls.append((tuple(tokens.shape), k))
        return logits(model, tokens, mask, k)

    torch.manual_seed(0)
    built = Judge(Reader(), VOCABULARY, optimizer=SGD, logits=counted)
    tokens, mask = torch.ones(4, 2, 5, dtype=torch.long), torch.ones(4, 2, 5, dtype=torch.bool)
    batch = Batch({"tokens": tokens, "mask": mask}, torch.tensor([0, 1, 2, 3]))
    built.training_step(batch, progress=Progress(0, 1))
    assert calls == [((8, 6), 2)]


def test_a_model_of_transformers():
    """Fails when positions count the padding, or the last logits are those of another position."""
    pytest.importorskip("transformers", reason="the adapter is for models of transformers")
    model = tiny_llama(0).eval()
    tokens = torch.randint(3, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        found = last_logits(model, tokens, mask, 2)
        alone = model(input_ids=tokens[:1, 3:]).logits[:, -2:]
        whole = model(input_ids=tokens[1:]).logits[:, -2:]
    torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1:], whole, atol=1e-5, rtol=1e-4)


def test_training_a_model_of_transformers():
    """Fails when frozen weights are trained, or a judge of transformers cannot step."""
    pytest.importorskip("transformers", reason="the adapter is for models of transformers")
    model = tiny_llama(0)
    model.model.embed_tokens.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.clone()
    short = [Answer(str(n), "?", str(n), "4", n) for n in range(4)]
    seen, blind = (view_of(short, encode, with_reference=with_it) for with_it in (True, False))
    built = Judge(model, VOCABULARY, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    losses = built.fit(seen, blind, epochs=3, batch_size=4)
    assert losses[-1] < losses[0]
    assert torch.equal(model.model.embed_tokens.weight, frozen)
    assert built.score(blind).shape == (4,)
