"""Log-probabilities of responses, and how responses are drawn and packed."""

import pytest
import torch
from torch import nn

from regularized.alignment.sampling import Responses, pack_responses, sample_responses
from regularized.alignment.sequence_log_probs import sequence_log_probs, token_log_probs
from regularized.evidence.language_models import small_lm

VOCABULARY = 11


def batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(VOCABULARY, (3, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    return logits, tokens, mask


def test_against_a_loop_over_tokens():
    """Fails when the shift by one is missing, the prompt or padding is counted, or the mean is over all positions."""
    logits, tokens, mask = batch()
    for row in range(3):
        values = [
            torch.log_softmax(logits[row, t - 1], dim=0)[tokens[row, t]].item() for t in range(1, 6) if mask[row, t]
        ]
        assert sequence_log_probs(logits, tokens, mask)[row].item() == pytest.approx(sum(values), abs=1e-12)
        mean = sequence_log_probs(logits, tokens, mask, reduction="mean")[row].item()
        assert mean == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_kept_logits_are_those_of_the_last_positions():
    """Fails when logits of the last positions are taken for those of the first."""
    logits, tokens, mask = batch()
    rows = slice(2, 3)  # its response begins at token 4
    kept = token_log_probs(logits[rows, -3:], tokens[rows], mask[rows])
    assert torch.equal(kept, token_log_probs(logits[rows], tokens[rows], mask[rows])[:, -2:])


def test_what_is_masked_matters_neither_forwards_nor_backwards():
    """Fails when a padding id is special, or a masked token gets a gradient."""
    logits, tokens, mask = batch()
    logits.requires_grad_()
    before = sequence_log_probs(logits, tokens, mask)
    assert torch.equal(before, sequence_log_probs(logits, tokens.masked_fill(~mask, 3), mask))
    (gradient,) = torch.autograd.grad(before.sum(), logits)
    assert not gradient[:, :-1][~mask[:, 1:]].any()
    assert gradient[:, :-1][mask[:, 1:]].any(dim=1).all()
    assert not gradient[:, -1].any()


def test_half_precision_is_summed_in_float32():
    """Fails when the log-softmax of bfloat16 logits stays in bfloat16."""
    logits, tokens, mask = batch(dtype=torch.bfloat16)
    found = sequence_log_probs(logits, tokens, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sequence_log_probs(logits.float(), tokens, mask))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lo, t, m: sequence_log_probs(lo, t, m[:, 1:]), "logits must be"),
        (lambda lo, t, m: sequence_log_probs(lo[:2], t, m), "logits must be"),
        (lambda lo, t, m: sequence_log_probs(lo, t, torch.ones_like(m)), "no prediction"),
        (lambda lo, t, m: sequence_log_probs(lo[:, -3:], t, m), "no prediction"),
        (lambda lo, t, m: sequence_log_probs(lo, t, m, reduction="max"), "'sum' or 'mean'"),
        (lambda lo, t, m: sequence_log_probs(lo, t, torch.zeros_like(m), reduction="mean"), "leave it out"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call(*batch())


# -- responses ----------------------------------------------------------------------------------


def test_packed_responses_are_masked_by_place_and_not_by_id():
    """Fails when a response that holds the padding id is cut there, or the prompt is scored."""
    packed = pack_responses([torch.tensor([1, 0]), torch.tensor([2])], [[torch.tensor([0, 5])], [torch.tensor([0])]])
    assert packed.texts() == [[[0, 5]], [[0]]]
    assert packed.tokens[0, 0].tolist() == [1, 0, 0, 5]
    assert packed.lengths.tolist() == [[2], [1]]


def test_identical_responses_are_found_by_their_tokens():
    """Fails when prompts or padding take part in the comparison, or a prefix counts as the same."""
    prompts = [torch.tensor([9]), torch.tensor([8, 8])]
    a, b = torch.tensor([1, 2]), torch.tensor([1])
    packed = pack_responses(prompts, [[a, b, a, b], [b, a, a, torch.tensor([1, 0])]])
    assert packed.first_identical().tolist() == [[0, 1, 0, 1], [0, 1, 1, 3]]


def test_sampled_tokens_have_the_model_s_distribution():
    """Fails when logits of the wrong position are drawn from, the temperature multiplies, or top-p is left out."""
    model = small_lm(0, 6, width=16, layers=1, heads=2)
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    torch.manual_seed(0)
    drawn = sample_responses(model, prompts, count=4000, max_new_tokens=1, temperature=0.5, top_p=0.9)
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            p = (model(prompt[None])[0, -1] / 0.5).softmax(dim=0)
        order = p.argsort(descending=True)
        last = int((p[order].cumsum(0) < 0.9).sum())
        kept = torch.zeros_like(p).index_copy(0, order[: last + 1], p[order[: last + 1]])
        found = torch.bincount(drawn.tokens[number][drawn.mask[number]], minlength=6) / 4000
        torch.testing.assert_close(found, kept / kept.sum(), atol=0.04, rtol=0)


def test_a_response_ends_with_its_end():
    """Fails when tokens are drawn behind the end, the end does not count, or rows that ended hold back the others."""
    follow = torch.full((4, 4), -50.0)
    follow[1, 2] = follow[2, 3] = follow[3, 3] = 50.0  # 1 -> 2 -> 3, the end
    model = nn.Embedding.from_pretrained(follow)
    drawn = sample_responses(model, [torch.tensor([1]), torch.tensor([0, 2])], count=2, max_new_tokens=5, end=3)
    assert drawn.texts() == [[[2, 3]] * 2, [[3]] * 2]
    assert drawn.tokens.shape[2] == 3


def test_sampling_leaves_the_mode_and_takes_no_gradient():
    """Fails when dropout is on while sampling, or the model comes back in evaluation mode."""
    model = nn.Sequential(nn.Embedding(4, 64), nn.Dropout(0.9), nn.Linear(64, 4)).train()
    greedy = [
        sample_responses(model, [torch.tensor([1])], count=1, max_new_tokens=6, temperature=0.0).texts()
        for _ in range(5)
    ]
    assert model.training
    assert all(one == greedy[0] for one in greedy)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample_responses(nn.Embedding(2, 2), [], max_new_tokens=1), "at least one prompt"),
        (lambda: sample_responses(nn.Embedding(2, 2), [torch.tensor([])], max_new_tokens=1), "one token in each"),
        (lambda: sample_responses(nn.Embedding(2, 2), [torch.tensor([1])], max_new_tokens=0), "max_new_tokens"),
        (lambda: pack_responses([torch.tensor([1])], [[]]), "equally many"),
        (lambda: pack_responses([torch.tensor([1])], [[torch.tensor([])]]), "has no token"),
        (lambda: Responses(torch.zeros(1, 2, 3), torch.zeros(1, 2)), "must both be"),
    ],
)
def test_refuses_no_responses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
