"""Agreement of rankings, and the pairs that come with it."""

import pytest
import torch
from scipy import stats

from regularized.alignment.cream import SyntheticJudge, build_preference_pairs, rank_consistency
from regularized.alignment.sampling import pack_responses


def rewards(seed=0, prompts=50, count=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(prompts, count, generator=generator, dtype=torch.float64) for _ in range(2)]


def answers(count=5, prompts=50):
    """Responses that are all different, of several lengths."""
    rows = [torch.tensor([k] * (1 + k % 3)) for k in range(count)]
    return pack_responses([torch.tensor([9])] * prompts, [rows] * prompts)


@pytest.mark.parametrize("method", ["kendall", "spearman"])
def test_agrees_with_scipy(method):
    """Fails when pairs are counted twice, the scale is left out, or rewards stand for their ranks."""
    now, before = rewards()
    coefficient = {"kendall": stats.kendalltau, "spearman": stats.spearmanr}[method]
    expected = [(coefficient(a, b).statistic + 1) / 2 for a, b in zip(now.numpy(), before.numpy(), strict=True)]
    found = rank_consistency(now, before, method=method)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_one_exchange_of_neighbours_in_five_is_a_tenth():
    """Fails when the scale is that of N instead of N (N - 1) / 2."""
    before = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert rank_consistency(before, before).item() == 1.0
    assert rank_consistency(-before, before).item() == 0.0
    assert rank_consistency(before[:, [0, 2, 1, 3, 4]], before).item() == pytest.approx(0.9)


@pytest.mark.parametrize("method", ["kendall", "spearman", "top_order"])
def test_only_the_order_counts(method):
    """Fails when values enter: monotone maps of either, and the order in which the responses are given."""
    now, before = rewards()
    plain = rank_consistency(now, before, method=method)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rank_consistency(now.exp(), before.pow(3), method=method), plain)
    torch.testing.assert_close(rank_consistency(now[:, order], before[:, order], method=method), plain)


def test_ties_agree_with_neither_order_or_with_the_place():
    """Fails when a tie counts as an agreement by default, or ``"ordinal"`` does not order by place as the code does."""
    now, before = torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    assert rank_consistency(now, before).item() == pytest.approx((2 / 3 + 1) / 2)
    assert rank_consistency(now, before, ties="ordinal").item() == 1.0
    assert rank_consistency(now, torch.tensor([[2.0, 1.0, 3.0]]), ties="ordinal").item() == pytest.approx(2 / 3)
    tied = torch.tensor([[3.0, 1.0, 3.0, 2.0, 1.0]])
    other = torch.tensor([[1.0, 1.0, 4.0, 4.0, 2.0]])
    for method, coefficient in (("kendall", stats.kendalltau), ("spearman", stats.spearmanr)):
        ranks = [stats.rankdata(row.numpy()[0], method="ordinal") for row in (tied, other)]
        found = rank_consistency(tied, other, method=method, ties="ordinal").item()
        assert found == pytest.approx((coefficient(*ranks).statistic + 1) / 2)


def test_top_order_looks_at_the_best_and_worst_responses():
    """Fails when ranks of the first and last response are compared, as in the authors' code."""
    now = torch.tensor([[2.0, 5.0, 1.0, 3.0, 4.0]])
    middle = torch.tensor([[4.0, 5.0, 1.0, 2.0, 3.0]])  # the first and last response have moved
    worst = torch.tensor([[2.0, 5.0, 3.0, 1.0, 4.0]])  # they have not, the worst one has
    assert rank_consistency(now, middle, method="top_order").item() == 1.0
    assert rank_consistency(now, worst, method="top_order").item() == 0.0


# -- pairs --------------------------------------------------------------------------------------


def test_pairs_are_best_and_worst_by_the_present_rewards():
    """Fails when the earlier rewards choose, or best and worst are exchanged."""
    now, before = rewards()
    responses = answers()
    pairs = build_preference_pairs(responses, now, before)
    assert torch.equal(pairs.place, torch.stack([now.argmax(1), now.argmin(1)], dim=1))
    assert torch.equal(pairs.of(now), torch.stack([now.amax(1), now.amin(1)], dim=1))
    assert torch.equal(pairs.tokens, responses.tokens[torch.arange(50)[:, None], pairs.place])
    assert torch.equal(pairs.mask, responses.mask[torch.arange(50)[:, None], pairs.place])


def test_every_agreement_stays_with_its_prompt():
    """Fails when agreements move on by one at a prompt that is left out, as in the authors' code."""
    now, before = rewards(prompts=4)
    now[1] = 0.0  # no best and no worst
    same = [torch.tensor([1])] * 5
    different = [torch.tensor([k]) for k in range(5)]
    responses = pack_responses([torch.tensor([9])] * 4, [different, different, same, different])
    pairs = build_preference_pairs(responses, now, before, consistency="each")
    assert pairs.prompt.tolist() == [0, 3]
    assert pairs.dropped == 2
    assert torch.equal(pairs.consistency, rank_consistency(now, before)[[0, 3]])


def test_the_mean_is_over_the_pairs_that_are_left():
    """Fails when prompts without a pair count, or the mean is not the same for all."""
    now, before = rewards(prompts=6)
    now[0] = 0.0
    each, mean = (build_preference_pairs(answers(prompts=6), now, before, consistency=c) for c in ("each", "mean"))
    assert len(mean) == 5
    torch.testing.assert_close(mean.consistency, each.consistency.mean().expand(5))
    assert torch.equal(mean.agreement, each.agreement)


def test_mean_is_each_where_all_agree_alike():
    """Fails when the two labels are made of different agreements."""
    before = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]).expand(3, 5)
    now = before[:, [1, 0, 2, 3, 4]]
    labels = [
        build_preference_pairs(answers(prompts=3), now, before, consistency=c).consistency for c in ("each", "mean")
    ]
    torch.testing.assert_close(*labels)


def test_a_constant_label_still_measures_agreement():
    """Fails when a number overwrites what is reported."""
    now, before = rewards()
    pairs = build_preference_pairs(answers(), now, before, consistency=0.8)
    assert pairs.consistency.unique().tolist() == [0.8]
    assert torch.equal(pairs.agreement, rank_consistency(now, before))


def test_agreement_sees_a_judge_s_noise_and_not_its_bias():
    """Fails when bias or noise of the synthetic judge is drawn in the wrong place."""
    responses = answers(prompts=400)
    means = {}
    for name, bias, noise in (("bias", 5.0, 0.01), ("noise", 0.0, 5.0)):
        judge = SyntheticJudge(
            lambda r: r.tokens[..., 1].double(), feature=lambda r: r.lengths.double(), bias=bias, noise=noise
        )
        torch.manual_seed(0)
        now, before = (judge(torch.nn.Identity(), responses, round=t) for t in (1, 0))
        pairs = build_preference_pairs(responses, now, before)
        means[name] = pairs.agreement.mean().item(), (pairs.place[:, 0] == 4).double().mean().item()
    assert means["bias"] == (pytest.approx(1.0, abs=1e-9), 0.0)  # the best is never chosen, by both judges alike
    assert means["noise"][0] == pytest.approx(0.55, abs=0.06)
