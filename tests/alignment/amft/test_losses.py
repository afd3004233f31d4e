"""The two losses, against a second derivation of each; GAE; and which tokens count."""

import pytest
import torch
from torch.nn import functional as F

from regularized.alignment.amft import (
    drift,
    generalised_advantages,
    imitation_loss,
    normalised,
    policy_loss,
    token_entropy,
    until_end,
    value_loss,
)
from regularized.alignment.amft.loss import log_probs_and_entropy


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (4, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    return logits, tokens, mask


def test_imitation(given):
    """Fails when padding counts, or a mean of sequences' means stands for the mean over tokens."""
    logits, tokens, mask = given
    wanted = F.cross_entropy(logits.flatten(0, 1), torch.where(mask == 1, tokens, -100).flatten())
    torch.testing.assert_close(imitation_loss(logits, tokens, mask), wanted, rtol=1e-12, atol=0)


def test_entropy_and_log_probs(given):
    """Fails for the entropy in bits, the wrong axis, NaN where a token is ruled out, or half precision."""
    logits, tokens, _ = given
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(token_entropy(logits), distribution.entropy())
    torch.testing.assert_close(log_probs_and_entropy(logits, tokens)[0], distribution.log_prob(tokens))
    ruled_out = logits.clone()
    ruled_out[..., 0] = -torch.inf
    ruled_out.requires_grad_()
    entropy = token_entropy(ruled_out)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits[..., 1:]).entropy())
    entropy.sum().backward()
    assert ruled_out.grad.isfinite().all()
    assert token_entropy(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.0, 1.0, 1.0), (1.3, 1.0, 0.0), (0.7, 1.0, 0.7), (1.3, -1.0, -1.3), (0.7, -1.0, 0.0)],
)
def test_clipping(ratio, advantage, slope):
    """Fails for max in place of min, a clip of one side, or a sign: which ratios still have a gradient."""
    log_probs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    loss = policy_loss(log_probs, torch.zeros_like(log_probs), torch.full_like(log_probs, advantage))
    loss.backward()
    assert log_probs.grad.item() == pytest.approx(-slope, abs=1e-12)


def test_policy_loss_ignores_padding(given):
    """Fails when a token behind the end counts, in the loss or in the number that it is divided by."""
    logits, tokens, mask = given
    log_probs = log_probs_and_entropy(logits, tokens)[0]
    old, advantages = log_probs - 0.3, torch.randn_like(log_probs)
    wanted = torch.stack(
        [
            policy_loss(log_probs[i : i + 1, j : j + 1], old[i : i + 1, j : j + 1], advantages[i : i + 1, j : j + 1])
            for i, j in mask.nonzero().tolist()
        ]
    ).mean()
    torch.testing.assert_close(policy_loss(log_probs, old, advantages, mask), wanted)
    assert drift(log_probs, old, mask).clipped.item() == 1.0


def test_normalised(given):
    """Fails when what does not count moves mean or deviation, or the deviation is the biased one."""
    _, _, mask = given
    values = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counted = values[mask == 1]
    got = normalised(values, mask)[mask == 1]
    torch.testing.assert_close(got, (counted - counted.mean()) / (counted.std() + 1e-8))
    assert torch.equal(normalised(torch.full((2, 2), 3.0)), torch.zeros(2, 2))


def loop(rewards, values, mask, gamma, lam):
    """GAE as a recursion from the end."""
    out = torch.zeros_like(values)
    for row in range(len(values)):
        length, ahead = int(mask[row].sum()), 0.0
        for t in reversed(range(length)):
            after = values[row, t + 1] if t + 1 < length else 0.0
            ahead = rewards[row, t] + gamma * after - values[row, t] + gamma * lam * ahead
            out[row, t] = ahead
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.9, 1.0), (0.5, 0.5)])
def test_generalised_advantages(given, gamma, lam):
    """Fails when values behind the end count, a sum runs the wrong way, or one of the factors is missing."""
    _, _, mask = given
    generator = torch.Generator().manual_seed(2)
    rewards, values = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    got = generalised_advantages(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    torch.testing.assert_close(got, loop(rewards, values, mask, gamma, lam))


def test_value_loss_takes_the_larger():
    """Fails for the smaller of both errors, or without the half: a value that moved towards its return too fast."""
    far, old, returns = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0])
    assert value_loss(far, old, returns).item() == pytest.approx(0.5 * 0.8**2)
    assert value_loss(torch.tensor([0.1]), old, returns).item() == pytest.approx(0.5 * 0.9**2)


def test_until_end():
    """Fails when the end itself does not count, or tokens between two ends do."""
    tokens = torch.tensor([[9, 1, 9], [1, 9, 2], [1, 2, 3]])
    assert until_end(tokens, 9).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
