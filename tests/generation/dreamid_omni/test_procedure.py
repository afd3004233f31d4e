"""Stages, tasks and the training that follows them."""

from collections import Counter
from functools import partial

import pytest
import torch

from regularized.generation.dreamid_omni import (
    OmniTraining,
    ProgressivePlan,
    Stage,
    SymmetricConditionalDiT,
    SynRoPE,
    TalkingGlyphs,
)

WORLD = TalkingGlyphs()
PLAN = ProgressivePlan([Stage("in_pair", 2, {"r2av": 1}), Stage("cross_pair", 5, {"r2av": 2, "rv2av": 1, "ra2v": 1})])


def training(plan=PLAN, margin=150.0, **settings):
    torch.manual_seed(0)
    model = SymmetricConditionalDiT(WORLD.config(), syn_rope=SynRoPE(margin=margin))
    adam = partial(torch.optim.AdamW, lr=1e-3)
    return OmniTraining(model, WORLD, plan, optimizer=adam, **{"batch_size": 3, **settings})


def test_the_papers_plan():
    """Fails when a stage begins a step late, or the tasks are not 4 : 3 : 3."""
    plan = ProgressivePlan.published()
    assert len(plan) == 50_000
    assert [plan.at(step)[0].pairing for step in (0, 9_999, 10_000, 49_999)] == ["in_pair"] * 2 + ["cross_pair"] * 2
    assert [len(plan.at(step)[0].tasks) for step in (29_999, 30_000)] == [1, 3]
    tasks = [plan.at(step)[1] for step in range(30_000, 30_100)]
    assert Counter(tasks) == {"r2av": 40, "rv2av": 30, "ra2v": 30}
    assert Counter(tasks[:10]) == {"r2av": 4, "rv2av": 3, "ra2v": 3}
    assert tasks[:10] != tasks[10:20], "each round has an order of its own"
    other = ProgressivePlan.published(seed=1)
    assert [other.at(step)[1] for step in range(30_000, 30_100)] != tasks


def test_iteration_agrees_with_asking():
    """Fails when going through a plan gives other tasks than asking for a step, as after a resume."""
    assert list(PLAN) == [(step, PLAN.at(step)) for step in range(7)]
    with pytest.raises(IndexError, match="0 to 6, got 7"):
        PLAN.at(7)


def test_resume_in_the_middle_of_a_stage():
    """Bit for bit. Fails when draws depend on how often the training was started, or average or position are lost."""
    whole, halted = training(), training()
    losses = whole.fit()
    before = halted.fit(until=4)
    state = halted.state_dict()
    resumed = training()
    torch.nn.init.normal_(resumed.model.video_model.head.head.weight)
    resumed.load_state_dict(state)
    torch.manual_seed(99)
    assert torch.equal(torch.cat([before, resumed.fit()]), losses)
    for a, b in ((whole.model, resumed.model), (whole.average, resumed.average)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert resumed.done == 7


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"plan": ProgressivePlan.published()}, "plan is"),
        ({"margin": 100.0}, "positions is"),
        ({"seed": 1}, "seed is 0 in the state and 1 here"),
        ({"ema": None}, "average"),
    ],
)
def test_a_state_of_another_training_is_refused(other, says):
    """Fails when a state goes on under another plan, other slots or other draws."""
    state = training().state_dict()
    with pytest.raises(ValueError, match=says):
        training(**other).load_state_dict(state)


def test_stages_reach_the_data():
    """Fails when a stage's pairing or task does not reach the batch: masks belong to pairs of one clip alone."""
    seen = []

    class Spy(TalkingGlyphs):
        def sample(self, count, task, pairing, generator):
            batch = super().sample(count, task, pairing, generator)
            seen.append((task, pairing, batch.mask_video is not None))
            return batch

    torch.manual_seed(0)
    model = SymmetricConditionalDiT(WORLD.config())
    OmniTraining(model, Spy(), PLAN, optimizer=partial(torch.optim.SGD, lr=0.1), batch_size=2, ema=None).fit()
    assert [(task, stage.pairing, stage.pairing == "in_pair") for _, (stage, task) in PLAN] == seen


def test_it_learns():
    """One batch of eight with fixed draws: the loss falls by nine tenths. Fails when gradients miss a stream."""
    torch.manual_seed(0)
    model = SymmetricConditionalDiT(WORLD.config())
    batch = WORLD.sample(8, "r2av", "cross_pair", torch.Generator().manual_seed(0))

    class One(TalkingGlyphs):
        def sample(self, count, task, pairing, generator):
            generator.manual_seed(0)
            return batch

    plan = ProgressivePlan([Stage("cross_pair", 120, {"r2av": 1})])
    adam = partial(torch.optim.AdamW, lr=4e-3)
    losses = OmniTraining(model, One(), plan, optimizer=adam, batch_size=8, ema=None, dropout=0.0).fit()
    assert (losses[-1] < 0.1 * losses[0]).all(), losses[[0, -1]]
