"""Environments: draws follow the model, the tree of prices is its simulation, gymnasium accepts them."""

import warnings

import gymnasium
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from regularized.robustness.robust_policy import AmericanPut, as_gymnasium, simulated_linear_mdp, tabular_features
from regularized.robustness.robust_policy.environments import LinearMDPEnvironment


def test_dynamics_are_the_published_ones():
    """Fails when a factor leads elsewhere: chances of the sibling's code, written out for the best and worst action."""
    nominal, shifted = simulated_linear_mdp(), simulated_linear_mdp(shift=0.4)
    for action, chance in ((0, 0.1), (15, 0.5)):
        start = nominal.features[0, action]
        expected = [0.0, (1 - chance) * 0.999, 0.0, (1 - chance) * 0.001, chance]
        assert (start @ nominal.factors[0]).tolist() == pytest.approx(expected)
        expected = [0.0, 1 - chance, 0.0, 0.4 * chance, 0.6 * chance]
        assert (start @ shifted.factors[0]).tolist() == pytest.approx(expected)
        second = nominal.features[1, action]
        expected = [0.0, 0.0, (1 - chance) * 0.999, (1 - chance) * 0.001, chance]
        assert (second @ shifted.factors[1]).tolist() == pytest.approx(expected)
    assert (nominal.features[4] @ nominal.theta[1]).tolist() == [1.0] * 16
    assert (nominal.features @ nominal.theta[0]).max() == 0.0


def test_what_is_drawn_is_the_model():
    """Fails when the environment and the exact value are two problems."""
    model = simulated_linear_mdp(shift=0.5)
    env, policy = LinearMDPEnvironment(model), torch.full((3, 5, 16), 1 / 16, dtype=torch.float64)
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    total, episodes = 0.0, 4000
    for _ in range(episodes):
        env.reset()
        ended = False
        while not ended:
            action = int(torch.randint(16, (), generator=generator))
            _, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + reward, terminated or truncated
    # Five standard errors of a return between 0 and 2.
    assert total / episodes == pytest.approx(model.value(policy), abs=5 * 0.8 / episodes**0.5)


def test_best_policy_is_best():
    """Fails when backward induction and evaluation disagree, or another policy beats it."""
    model = simulated_linear_mdp()
    from regularized.robustness.robust_policy import Greedy

    policy, values = model.best(Greedy())
    assert model.value(policy) == pytest.approx(float(values[0, 0]))
    for seed in range(20):
        other = torch.rand(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(dim=2)
        assert model.value(other) <= model.value(policy)


def test_tree_of_prices_is_the_simulation():
    """Fails when a branch has the wrong chance: the exact return of a rule against its mean over episodes."""
    put = AmericanPut(start=101.0, up_probability=0.4)

    def rule(step, prices):
        sells = (prices < 97.0).double()
        return torch.stack([1 - sells, sells], dim=1)

    put.reset(seed=0)
    total, episodes = 0.0, 3000
    for _ in range(episodes):
        price, _ = put.reset()
        ended, step = False, 0
        while not ended:
            action = int(rule(step, torch.tensor([price]))[0].argmax())
            price, reward, terminated, truncated, _ = put.step(action)
            total, step, ended = total + reward, step + 1, terminated or truncated
    assert total / episodes == pytest.approx(put.expected_return(rule), abs=5 * 0.03 / episodes**0.5)


def test_no_rule_beats_the_best_return():
    """Fails when the best return is not optimal stopping."""
    put = AmericanPut()
    best = put.best_return()
    for threshold in (90.0, 95.0, 97.0, 99.0):

        def rule(step, prices, threshold=threshold):
            sells = ((prices < threshold) | torch.tensor(step == 19)).double()
            return torch.stack([1 - sells, sells], dim=1)

        assert 0 < put.expected_return(rule) <= best
    assert put.best_return(up_probability=0.7) < best


def test_features_of_prices():
    """Fails when a price beyond the anchors, or between two, is no point of the simplex."""
    features = AmericanPut().features(30)(torch.tensor([20.0, 60.0, 61.0, 100.5, 160.0, 400.0]))
    torch.testing.assert_close(features.sum(dim=2), torch.ones(6, 2, dtype=torch.float64))
    assert features.min() >= 0
    # Between anchors it is linear: the mean of the anchors' prices is the price.
    anchors = torch.linspace(60, 160, 30, dtype=torch.float64)
    torch.testing.assert_close(features[:5, 0, :30] @ anchors, torch.tensor([60, 60, 61, 100.5, 160]).double())


@pytest.mark.parametrize(
    "env", [AmericanPut(), LinearMDPEnvironment(simulated_linear_mdp())], ids=lambda e: type(e).__name__
)
def test_gymnasium_accepts_them(env):
    """Fails when an observation is outside its space, a seed has no effect, or the interface is another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        check_env(as_gymnasium(env), skip_render_check=True)
    wrapped = gymnasium.wrappers.RecordEpisodeStatistics(as_gymnasium(env))
    wrapped.reset(seed=0)
    ended = False
    while not ended:
        *_, terminated, truncated, info = wrapped.step(0)
        ended = terminated or truncated
    assert info["episode"]["l"] >= 1


def test_tabular_features_tell_pairs_apart():
    """Fails when two pairs share a feature, and so an adversary."""
    features = tabular_features(3, 2)(torch.arange(3))
    assert features.view(6, 6).equal(torch.eye(6, dtype=torch.float64))
