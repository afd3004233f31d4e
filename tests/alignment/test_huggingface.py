"""Responses of models of transformers."""

import pytest
import torch

from regularized.alignment.huggingface import generate_responses
from regularized.alignment.sampling import sample_responses
from regularized.alignment.sequence_log_probs import next_token_logits, sequence_log_probs
from regularized.evidence.pretrained import byte_tokens, tiny_llama

pytest.importorskip("transformers", reason='needs the extra: pip install "regularized[huggingface]"')

PROMPTS = [byte_tokens("a long prompt: "), byte_tokens("x")]


def test_writes_what_our_own_sampler_writes():
    """Fails when prompts are padded where the model reads the padding, or responses are cut or shifted."""
    model = tiny_llama(3)
    ours, theirs = (
        write(model, PROMPTS, count=1, max_new_tokens=6, temperature=0.0)
        for write in (sample_responses, generate_responses)
    )
    assert ours.texts() == theirs.texts()
    assert torch.equal(ours.tokens * ours.mask, theirs.tokens * theirs.mask)


def test_ends_where_the_end_is_and_padding_may_be_the_end():
    """Fails when the end is cut off, what follows it counts, or every padding id counts as an end."""
    model = tiny_llama(3)
    (first, *_), _ = (
        row[0] for row in generate_responses(model, PROMPTS, count=1, max_new_tokens=3, temperature=0.0).texts()
    )
    drawn = generate_responses(model, PROMPTS[:1], count=1, max_new_tokens=5, temperature=0.0, end=first, pad=first)
    assert drawn.texts() == [[[first]]]


def test_scores_are_those_of_each_sequence_alone():
    """Fails when padding on the right reaches the scores: a mask would be missing."""
    model = tiny_llama(3).eval()
    torch.manual_seed(0)
    drawn = generate_responses(model, PROMPTS, count=2, max_new_tokens=4)
    tokens, mask = drawn.tokens.flatten(0, 1), drawn.mask.flatten(0, 1)
    with torch.no_grad():
        scores = sequence_log_probs(next_token_logits(model, tokens), tokens, mask)
        for row in range(4):
            length = int(mask[row].nonzero()[-1]) + 1
            one = slice(row, row + 1), slice(0, length)
            alone = sequence_log_probs(next_token_logits(model, tokens[one]), tokens[one], mask[one])
            torch.testing.assert_close(scores[row], alone[0], atol=1e-4, rtol=1e-5)


def test_refuses_no_prompt():
    with pytest.raises(ValueError, match="at least one prompt"):
        generate_responses(tiny_llama(0), [], max_new_tokens=1)
