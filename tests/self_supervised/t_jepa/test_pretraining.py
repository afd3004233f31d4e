"""A step, the average, the schedules, and what the procedure learns."""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch

from regularized.evidence.conformance import conform
from regularized.papers.t_jepa import conformance
from regularized.papers.t_jepa.contract import a_training, rows, train
from regularized.self_supervised.t_jepa import (
    TJEPA,
    CollapseWarning,
    MaskSizes,
    TabularTransformer,
    TargetPredictor,
    TJEPATraining,
    collapse_report,
    warmup_cosine,
)
from regularized.training.data import TensorData


def a_jepa(columns=6, *, reg_tokens=1, total_steps=10, predictor=None, **settings):
    torch.manual_seed(0)
    encoder = TabularTransformer(range(columns), dim=8, depth=1, heads=2, feedforward=16, reg_tokens=reg_tokens)
    small = TargetPredictor(
        reg_tokens + columns, 8, **{"dim": 4, "depth": 1, "heads": 2, "feedforward": 8, **(predictor or {})}
    )
    return TJEPA(encoder, small, total_steps=total_steps, **settings).double()


def table(count=12, columns=6, seed=0):
    return torch.rand(count, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(jepa, x, lr=0.1):
    optimizer = torch.optim.SGD(jepa.param_groups(), lr=lr)
    jepa(x).backward()
    jepa.before_step()
    optimizer.step()
    optimizer.zero_grad()
    jepa.after_step()


def test_official_vectors_of_a_table_with_categories():
    """Fails when tables of categories, their order or their gradients are not those of the official code.

    Made like the package's golden vectors: 7 columns, two of them categorical, two layers, float64.
    """
    found = conform("here", conformance, Path(__file__).with_name("categories.npz"))
    assert len(found) > 8
    assert all(row.ok for row in found), [row for row in found if not row.ok]


@pytest.mark.parametrize("share_context", [False, True])
def test_nothing_leaks_from_targets_into_predictions(share_context):
    """Fails when the predictor, or the encoder, sees a column that it is asked for."""
    jepa = a_jepa(predictor={"share_context": share_context})
    x, (context, targets) = table(), jepa.draw(12)
    before = jepa.predictor(jepa.encoder(x, context), context, targets)
    hidden = torch.ones(12, 7, dtype=torch.bool).scatter_(1, context, False)[:, 1:]
    changed = torch.where(hidden, x + 1.0, x)
    assert torch.equal(jepa.predictor(jepa.encoder(changed, context), context, targets), before)
    # What is wanted does change, also through columns that are neither seen nor asked for: the average sees the row.
    wanted, other = jepa.wanted(x, targets), jepa.wanted(changed, targets)
    assert ((wanted - other).abs().amax(dim=(0, 2, 3)) > 1e-6).all()


def test_what_belongs_to_no_column_is_always_seen_and_never_asked_for():
    """Fails when indices are not shifted by these tokens, which is what the official code does."""
    jepa = a_jepa(reg_tokens=2)
    for _ in range(20):
        context, targets = jepa.draw(50)
        assert torch.equal(context[:, :2], torch.tensor([[0, 1]]).expand(50, 2))
        assert int(context[:, 2:].min()) >= 2
        assert int(targets.min()) >= 2
        assert max(int(context.max()), int(targets.max())) == 7
    official = a_jepa(reg_tokens=2, reg_mode="official")
    drawn = [official.draw(50) for _ in range(20)]
    assert min(int(context.min()) for context, _ in drawn) == 0
    assert max(int(targets.max()) for _, targets in drawn) == 5  # the last two columns never occur


def test_the_average_gets_no_gradient_and_moves_as_it_should():
    """Fails when gradients reach the average, or its momentum is off by a step."""
    jepa = a_jepa(total_steps=4, momentum=(0.5, 1.0))
    x = table()
    for number in range(4):
        before = copy.deepcopy(jepa.target.module.state_dict())
        step(jepa, x)
        assert all(p.grad is None for p in jepa.target.parameters())
        momentum = 0.5 + 0.5 * number / 4
        for name, weight in jepa.encoder.named_parameters():
            expected = momentum * before[name] + (1 - momentum) * weight.detach()
            torch.testing.assert_close(dict(jepa.target.module.named_parameters())[name].detach(), expected)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_of_the_momentum(momentum):
    """Fails when 1 moves the average, or 0 leaves anything of it."""
    jepa = a_jepa(momentum=(momentum, momentum))
    start = copy.deepcopy(jepa.target.module.state_dict())
    for _ in range(3):
        step(jepa, table())
        expected = start if momentum else jepa.encoder.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in jepa.target.module.state_dict().items())


def test_a_predictor_that_returns_the_targets_has_no_loss():
    """Fails when predictions are compared with representations of other rows, targets or tokens."""
    jepa = a_jepa()
    x, (context, targets) = table(), jepa.draw(12)
    full = jepa.target(x)
    jepa.predictor.forward = lambda seen, context, targets: torch.stack(
        [torch.stack([full[row][asked] for row, asked in enumerate(one)]) for one in targets]
    )
    assert jepa.loss(x, context, targets).item() == 0.0


def test_gradients_of_the_encoder_are_clamped_and_those_of_the_predictor_are_free():
    """Fails when clipping is by norm, of everything, or not at all."""
    jepa = a_jepa(clip=1e-3)
    (1e4 * jepa(table())).backward()
    free = [p.grad.clone() for p in jepa.predictor.parameters()]
    signs = [p.grad.sign() for p in jepa.encoder.parameters()]
    jepa.before_step()
    largest = max(p.grad.abs().max().item() for p in jepa.encoder.parameters())
    assert math.isclose(largest, 1e-3)
    assert all(torch.equal(p.grad.sign(), sign) for p, sign in zip(jepa.encoder.parameters(), signs))
    assert all(torch.equal(p.grad, before) for p, before in zip(jepa.predictor.parameters(), free))


def test_the_first_step_takes_the_first_value_of_the_schedules():
    """Fails when the schedules are a step late, as in the official code, whose first update has AdamW's defaults."""
    training = a_training()
    start = copy.deepcopy(dict(training.jepa.encoder.named_parameters()))
    training.training_step(rows(8))
    assert all(torch.equal(p, start[name]) for name, p in training.jepa.encoder.named_parameters())  # the rate is 0
    assert training.optimizers[0].param_groups[0]["weight_decay"] == pytest.approx(1e-5, rel=1e-9)
    training.training_step(rows(8))
    group = training.optimizers[0].param_groups[0]
    assert math.isclose(group["lr"], warmup_cosine(1, warmup=2, total=12, peak=1e-2))
    assert group["weight_decay"] > 2e-5
    assert training.optimizers[0].param_groups[1]["weight_decay"] == 0.0  # of biases
    assert warmup_cosine(2, warmup=2, total=12, peak=1e-2) == 1e-2
    assert warmup_cosine(12, warmup=2, total=12, peak=1e-2, final=1e-6) == pytest.approx(1e-6, abs=1e-18)


def test_vectors_have_no_decay():
    """Fails when biases, norms or the mask token shrink, or a matrix does not."""
    jepa = a_jepa()
    decayed, free = (group["params"] for group in jepa.param_groups(0.1))
    assert all(p.ndim > 1 for p in decayed)
    assert {id(p) for p in (*decayed, *free)} == {id(p) for n, p in jepa.named_parameters() if "target" not in n}


def test_the_average_stays_in_evaluation_mode():
    """Fails when train() reaches it, so that dropout is in the targets, as in the official code."""
    training = a_training()
    training.jepa.train()
    assert training.jepa.encoder.training
    assert not any(module.training for module in training.jepa.target.modules())


def test_pretraining_learns_what_columns_say_of_each_other():
    """Fails when predictions are no better than a constant for each column, as those of a collapsed training."""
    torch.manual_seed(0)
    hidden = torch.rand(512, 2)
    x = torch.stack([hidden[:, i % 2] if i < 4 else (hidden[:, 0] - hidden[:, 1]).abs() for i in range(6)], dim=1)
    torch.manual_seed(0)
    encoder = TabularTransformer(range(6), dim=16, depth=1, heads=2, feedforward=32)
    predictor = TargetPredictor(7, 16, dim=16, depth=1, heads=2, feedforward=32)
    jepa = TJEPA(
        encoder, predictor, total_steps=960, momentum=(0.98, 1.0), sizes=MaskSizes(6, 2, 4, 1, 2), num_targets=1
    )
    TJEPATraining(jepa, lr=3e-3, warmup=96).fit(TensorData(x, batch_size=32), epochs=60)
    jepa.eval()
    with torch.no_grad():
        context, targets = jepa.draw(512)
        full = jepa.target(x)
        constant = (full - full.mean(dim=0)).square().mean(dim=(0, 2))[targets].mean()
        loss = jepa.loss(x, context, targets)
    assert loss < 0.6 * constant, (float(loss), float(constant))
    assert not collapse_report(full).collapsed


def test_goes_on_in_the_middle_of_an_epoch():
    """Fails when masks, order, average or schedules are not part of the state."""
    torch.manual_seed(0)
    whole = a_training()
    train(whole, 2)
    torch.manual_seed(0)
    cut = a_training()
    states = []

    def save(training):
        if training.optimizers.steps[0] == 6:
            states.append(copy.deepcopy(training.state_dict()))

    cut.fit(TensorData(rows(32), batch_size=8, seed=1), epochs=2, after_step=save)
    resumed = a_training()
    resumed.load_state_dict(states[0])
    assert resumed.optimizers.steps == [6]
    resumed.fit(TensorData(rows(32), batch_size=8, seed=1), epochs=2)
    for (name, a), b in zip(whole.jepa.state_dict().items(), resumed.jepa.state_dict().values()):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), name


def test_collapse_is_seen():
    """Fails when constant rows, or rows on a line, pass for a representation."""
    draws = torch.Generator().manual_seed(0)
    spread = torch.randn(300, 3, 4, generator=draws)
    line = torch.randn(300, 1, 1, generator=draws) * torch.randn(3, 4, generator=draws)
    full, flat, none = (collapse_report(x) for x in (spread, line, torch.ones(300, 3, 4)))
    assert 0.9 < full.variance < 1.1
    assert 4.0 < full.distance < 5.5  # sqrt(2 * 12) = 4.9
    assert full.rank > 11
    assert abs(flat.rank - 1) < 1e-3
    assert full.divergence > 0.1
    assert none.collapsed
    assert none.variance == none.distance == 0
    assert abs(none.divergence) < 1e-12


def test_a_look_behind_the_warm_up_warns():
    """Fails when a collapse is silent, or a fresh network is accused."""
    training = a_training(total_steps=40)
    with torch.no_grad():
        for weight in training.jepa.target.module.tokenizer.parameters():
            weight.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert training.report(rows(20)).collapsed
    training.optimizers.steps = [3]
    with pytest.warns(CollapseWarning, match="variance over rows"):
        training.report(rows(20))
