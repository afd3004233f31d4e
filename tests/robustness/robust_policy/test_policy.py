"""Policies around a reference: limits, the value's identity, and mirror steps against their definition."""

import math

import pytest
import torch

from regularized.robustness.robust_policy import Greedy, Softmax, kl_regularized_policy, regularized_value


def drawn(states=6, actions=5):
    generator = torch.Generator().manual_seed(0)
    q = 3.0 * torch.rand(states, actions, generator=generator, dtype=torch.float64)
    return q, torch.rand(states, actions, generator=generator, dtype=torch.float64).softmax(dim=1)


@pytest.mark.parametrize("eta", [0.01, 0.3, 5.0])
def test_value_is_expectation_less_divergence(eta):
    """Fails when the value is not that of the policy: a sign, a missing reference, a soft maximum without eta."""
    q, reference = drawn()
    policy, value = kl_regularized_policy(q, reference, eta)
    divergence = (policy * (policy / reference).log().nan_to_num(0.0)).sum(dim=1)
    torch.testing.assert_close(value, (policy * q).sum(dim=1) - eta * divergence, rtol=0, atol=1e-12)
    torch.testing.assert_close(regularized_value(policy, q, reference, eta), value, rtol=0, atol=1e-12)


def test_no_other_policy_is_better():
    """Fails when the closed form is not the maximiser."""
    q, reference = drawn()
    _, best = kl_regularized_policy(q, reference, 0.4)
    others = torch.randn(50, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    assert bool((regularized_value(others, q, reference, 0.4) <= best).all())


def test_limits():
    """Fails when a dear divergence does not end at the reference, or a cheap one at the best action."""
    q, reference = drawn()
    policy, value = kl_regularized_policy(q, reference, 1e6)
    torch.testing.assert_close(policy, reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(value, (reference * q).sum(dim=1), rtol=0, atol=1e-5)
    policy, value = kl_regularized_policy(q, reference, 1e-4)
    assert policy.argmax(dim=1).equal(q.argmax(dim=1))
    torch.testing.assert_close(value, q.amax(dim=1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("step", [Softmax(0.5), Softmax(0.5, step_size=2.0), Greedy()], ids=repr)
def test_what_the_reference_never_does_is_never_done(step):
    """Fails when a probability of 0 becomes NaN, or positive."""
    q, reference = drawn()
    reference[:, 2] = 0.0
    reference /= reference.sum(dim=1, keepdim=True)
    q[:, 2] = 10.0
    policy = step.policy(q, reference)
    assert bool((policy[:, 2] == 0).all())
    torch.testing.assert_close(policy.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert bool((step.value(q, q, reference) < 4.0).all())


def test_mirror_steps_are_their_definition():
    """Fails when a share of the last policy or of the reference is wrong: three steps, each from the last policy."""
    _, reference = drawn()
    step = Softmax(0.5, step_size=3.0)
    last, total = reference, torch.zeros_like(reference)
    for seed in range(3):
        q = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        # The maximiser of <pi, q> - eta KL(pi || ref) - KL(pi || last) / t, from its stationarity.
        logits = (step.eta * reference.log() + last.log() / step.step_size + q) / (step.eta + 1 / step.step_size)
        last = logits.softmax(dim=1)
        total = step.keep * total + q
        torch.testing.assert_close(step.policy(total, reference), last, rtol=1e-12, atol=1e-12)


def test_an_infinite_mirror_step_is_the_closed_form():
    """Fails when the two updates are two objectives: with growing steps one must become the other."""
    q, reference = drawn()
    closed = Softmax(0.3)
    assert closed.keep == 0.0
    near = Softmax(0.3, step_size=1e9)
    torch.testing.assert_close(near.policy(q, reference), closed.policy(q, reference), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(near.value(q, q, reference), closed.value(q, q, reference), rtol=1e-6, atol=1e-9)
    # A fixed point: with the same action values for ever, any steps end at the closed form.
    small = Softmax(0.3, step_size=1.0)
    total = torch.zeros_like(q)
    for _ in range(200):
        total = small.keep * total + q
    torch.testing.assert_close(small.policy(total, reference), closed.policy(q, reference), rtol=1e-8, atol=1e-12)


def test_greedy_takes_the_best_action():
    """Fails when it takes another."""
    q, reference = drawn()
    policy = Greedy().policy(q, reference)
    assert policy.argmax(dim=1).equal(q.argmax(dim=1))
    assert bool(((policy == 0) | (policy == 1)).all())
    assert math.isclose(float(policy.sum()), 6.0)
