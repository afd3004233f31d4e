"""The world of the experiment: its answers, who says what is right, and the loop on a real language model."""

import pytest
import torch

from regularized.alignment.sampling import Responses, pack_responses
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.papers.cream import experiment
from regularized.papers.cream.experiment import answered, answers, asked, correct, judge


def digits(count=600, length=4, seed=0):
    return torch.randint(10, (count, length), generator=torch.Generator().manual_seed(seed))


def test_a_share_of_the_answers_is_right_and_the_others_are_the_three_wrong_ways():
    """Fails when wrong answers are mostly right by accident, or one way is missing."""
    rows = digits()
    found = answers(rows, 0.25, torch.Generator().manual_seed(0))
    good = rows.sort(dim=1).values
    right = (found == good).all(dim=1)
    assert 0.2 < float(right.double().mean()) < 0.35
    assert 0.2 < float((found == rows).all(dim=1).double().mean()) < 0.32
    assert 0.2 < float((found == good.flip(1)).all(dim=1).double().mean()) < 0.32
    assert bool((found.sort(dim=1).values == good).all())
    assert bool((answers(rows, 1.0, torch.Generator()) == good).all())


def test_correct_is_the_whole_answer_and_nothing_else():
    """Fails when a prefix, a longer answer, or another digit counts; digits may be the padding id."""
    prompt = torch.tensor([3, 0, 1])
    right, end = [0, 1, 3, 11], 11
    rows = [right, [0, 1, 3, 3], [0, 1, end], [1, 0, 3, end], [0, 1, 3, end, end]]
    packed = pack_responses(asked(prompt[None]), [[torch.tensor(row) for row in rows[:4]]])
    assert correct(packed, 3).tolist() == [[True, False, False, False]]
    whole = answered(digits(), digits().sort(dim=1).values)[:, None]
    mask = torch.arange(whole.shape[2]).expand_as(whole) > 4
    assert bool(correct(Responses(whole, mask), 4).all())


def test_the_judge_knows_what_is_right_and_likes_a_beginning():
    """Fails when bias and quality are exchanged, or the wrong place is looked at."""
    packed = pack_responses(
        asked(torch.tensor([[3, 0, 1]])), [[torch.tensor(r) for r in ([0, 1, 3, 11], [3, 1, 0, 11])]]
    )
    own = resolve(experiment, "self_rewarding", "smoke")
    assert judge(own) is None
    settings = {**own, "judge": "synthetic", "bias": 2.0, "digits": 3}
    assert judge(settings)(torch.nn.Identity(), packed, round=1).tolist() == [[1.0, 2.0]]


def test_arms_of_a_seed_share_their_models_and_prompts():
    """Fails when an arm trains the model that another one begins with."""
    first = run_arm(experiment, "equal_cream_mean", 0, "smoke", rounds=0)
    run_arm(experiment, "equal_self_rewarding", 0, "smoke", lr=0.01)
    again = run_arm(experiment, "equal_cream_mean", 0, "smoke", rounds=0)
    assert first == again


@pytest.mark.slow
def test_the_loop_runs_on_a_real_language_model():
    """Fails when prompts of a chat template, its end token, or frozen blocks do not fit the loop."""
    try:
        found = run_arm(
            experiment,
            "cream_mean",
            0,
            "smollm2",
            **{"rounds": 1, "responses": 3, "sft": 2, "prompts": 2, "validation": 2, "test": 2, "new_tokens": 3},
        )
    except Unavailable as absent:
        pytest.skip(str(absent))  # not in CI, where conftest.py makes this a failure
    assert 0.0 <= found.metrics["ranking_consistency"] <= 1.0
    assert len(found.curves["accuracy"]) == 2
