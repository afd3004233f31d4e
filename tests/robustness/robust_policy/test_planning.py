"""The backward pass against slow loops and against exact planning, its ranges, and what regression knows."""

import numpy as np
import pytest
import torch

from regularized.robustness.robust_policy import (
    Chi2Penalty,
    Greedy,
    KLBall,
    KLPenalty,
    LinearMDP,
    NoUncertainty,
    Softmax,
    TVBall,
    TVPenalty,
    backward_pass,
    exploration_bonus,
    ridge_regression,
)
from regularized.robustness.robust_policy.log import StepLog

S, A, D, H = 6, 3, 4, 3


def simplex(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).softmax(dim=-1)


def logged(seed=0, transitions=25):
    """Random transitions between states, some into a state that ends the episode."""
    generator = torch.Generator().manual_seed(seed)
    features = simplex(S, A, D, seed=seed)
    theta = torch.rand(H, D, generator=generator, dtype=torch.float64)
    reference = simplex(S, A, seed=seed + 1)
    logs, raw = [], []
    for _ in range(H):
        state, action, after = (torch.randint(high, (transitions,), generator=generator) for high in (S, A, S))
        log = StepLog(num_actions=A, width=D)
        log.append(
            features=features[state, action],
            rewards=(features[state, action] * theta[len(logs)]).sum(dim=1),
            next_features=features[after],
            next_reference=reference[after],
            alive=after != 0,
        )
        logs.append(log)
        raw.append((state.numpy(), action.numpy(), after.numpy()))
    return features, theta, reference, logs, raw


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_without_an_adversary_it_is_soft_value_iteration(beta):
    """Fails when a step uses the wrong data, value or clip: soft LSVI-UCB in loops over transitions gives the same."""
    features, theta, reference, logs, raw = logged()
    eta, ridge = 0.2, 0.5
    ours = backward_pass(
        logs,
        uncertainty=[NoUncertainty()] * H,
        policy_step=Softmax(eta),
        theta=theta,
        ridge=ridge,
        beta=beta,
        bonus="elliptic",
    )
    phi, ref = features.numpy(), reference.numpy()
    v = np.zeros(S)
    for h in reversed(range(H)):
        gram, target = ridge * np.eye(D), np.zeros(D)
        for s, a, after in zip(*raw[h], strict=True):
            gram += np.outer(phi[s, a], phi[s, a])
            target += phi[s, a] * (v[after] if after else 0.0)
        nu = np.clip(np.linalg.solve(gram, target), 0.0, H - 1 - h)
        inverse = np.linalg.inv(gram)
        width = np.sqrt(np.einsum("sai,ij,saj->sa", phi, inverse, phi))
        q = np.clip(phi @ (theta[h].numpy() + nu) + beta * width, 0.0, H - h)
        np.testing.assert_allclose(ours(h, features).numpy(), q, rtol=1e-10)
        v = eta * np.log((ref * np.exp(q / eta)).sum(axis=1))


@pytest.mark.parametrize(
    "uncertainty",
    [NoUncertainty(), TVBall(0.3), KLBall(0.1), TVPenalty(0.5), KLPenalty(0.4), Chi2Penalty(0.6)],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.parametrize("step", [Softmax(0.1), Greedy()], ids=lambda one: type(one).__name__)
def test_with_all_there_is_to_know_it_is_exact_planning(uncertainty, step):
    """Fails when learned and exact worst cases differ: every pair is logged as often as the dynamics take it."""
    counts = torch.randint(1, 5, (H, S * A, S), generator=torch.Generator().manual_seed(3)).double()
    counts *= 60.0 / counts.sum(dim=2, keepdim=True)
    counts = counts.round().clamp(min=1.0)
    features = torch.eye(S * A, dtype=torch.float64).view(S, A, -1)
    theta = torch.rand(H, S * A, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    terminal = torch.arange(S) == 0
    model = LinearMDP(features, counts / counts.sum(dim=2, keepdim=True), theta, terminal)
    logs = []
    for h in range(H):
        pairs, after = counts[h].nonzero().T.repeat_interleave(counts[h].long().flatten(), dim=1)
        log = StepLog(num_actions=A, width=S * A)
        log.append(
            features=features.flatten(0, 1)[pairs],
            rewards=theta[h, pairs],
            next_features=features[after],
            next_reference=torch.full((len(after), A), 1 / A, dtype=torch.float64),
            alive=~terminal[after],
        )
        logs.append(log)
    learned = backward_pass(logs, uncertainty=[uncertainty] * H, policy_step=step, ridge=1e-9)
    policy, value = model.best(step, uncertainty)
    for h in range(H):
        q = learned(h, features)
        found = step.value(q, q, torch.full((1, A), 1 / A, dtype=torch.float64))
        torch.testing.assert_close(found[1:], value[h, 1:], rtol=0, atol=2e-6)
    assert model.value(policy, uncertainty, eta=step.regularization) == pytest.approx(float(value[0, 0]), abs=1e-9)


def test_action_values_stay_in_their_range():
    """Fails when optimism promises more than the steps that are left can earn, or less than nothing."""
    features, theta, _, logs, _ = logged()
    q = backward_pass(logs, uncertainty=[TVBall(0.9)] * H, policy_step=Softmax(0.1), theta=theta, beta=50.0)
    for h in range(H):
        assert q(h, features).min() >= 0
        assert q(h, features).max() == H - h


def test_regression_is_symmetric_and_positive():
    """Fails when Lambda is no matrix of an ellipsoid, or its inverse is another one's."""
    _, _, _, logs, _ = logged()
    found = ridge_regression(logs[0].features, ridge=0.5)
    assert found.gram.equal(found.gram.T)
    assert torch.linalg.eigvalsh(found.gram).min() >= 0.5 - 1e-12
    torch.testing.assert_close(found.gram @ found.inverse, torch.eye(D, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sum_diag", "l2_diag", "elliptic"])
def test_bonus_falls_with_data(kind):
    """Fails when more visits make an action look less certain."""
    features = simplex(40, D, seed=5)
    query = simplex(7, D, seed=6)
    few, many = (exploration_bonus(query, ridge_regression(features[:n]).inverse, kind=kind) for n in (10, 40))
    assert bool((many < few).all())


def test_unknown_rewards_are_estimated():
    """Fails when rewards are not regressed on the features of their own step."""
    _, theta, _, logs, _ = logged(transitions=200)
    known, estimated = (
        backward_pass(logs, uncertainty=[TVBall(0.2)] * H, policy_step=Softmax(0.1), theta=given, ridge=1e-6)
        for given in (theta, None)
    )
    torch.testing.assert_close(estimated.weights, known.weights, rtol=0, atol=1e-4)
