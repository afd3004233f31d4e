import copy
import json
import logging
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from regularized.training import (
    Checkpoints,
    Compute,
    CrossEntropy,
    EarlyStopping,
    Evaluation,
    Logging,
    Loss,
    NonFiniteLoss,
    Progress,
    Step,
    TensorData,
    Term,
    Trainer,
    cosine,
    linear,
    piecewise,
)
from regularized.training.checkpoint import latest, load
from regularized.training.data import epoch_order
from regularized.training.finite import FiniteCheck

SGD = partial(torch.optim.SGD, lr=0.1)
N = 22
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 4, generator=GENERATOR), torch.randint(0, 3, (N,), generator=GENERATOR)
Y_IGNORED = Y.clone()
Y_IGNORED[[0, 3, 4, 5, 11]] = -100


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def fit(terms=None, *, epochs=2, batch_size=8, data=None, model=None, targets=Y, **options):
    model = model or mlp()
    trainer = Trainer(model, terms=terms or {"task": CrossEntropy()}, **{"optimizer": SGD, **options})
    trainer.fit(TensorData(X, targets, batch_size=batch_size) if data is None else data, epochs=epochs)
    return trainer


def weights(trainer_or_model):
    model = getattr(trainer_or_model, "model", trainer_or_model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Penalty(Term):
    per_step = True

    def forward(self, step):
        return 0.05 * sum(p.square().sum() for p in step.model.parameters())


class Watch(Term):
    """Writes down what is called when."""

    contributes = False
    moments = (
        "attach transform before_step after_step epoch_start task_start task_end merge".split()  # noqa: SIM905
    )

    def __init__(self, seen, name="watch"):
        super().__init__()
        for moment in self.moments:
            setattr(self, moment, partial(self._write, seen, name, moment))

    @staticmethod
    def _write(seen, name, moment, argument):
        step = argument.progress.step if isinstance(argument, Step) else getattr(argument, "step", None)
        seen.append((name, moment, step))
        return argument


# -- the step -------------------------------------------------------------------------------------


def test_is_the_loop_one_would_write():
    """Fails if anything stands between the user and plain torch: order, loss, schedule, clipping."""
    trainer = fit(epochs=3, schedule=cosine(), clip_norm=0.7, optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    step, norms = 0, []
    for epoch in range(3):
        for rows in epoch_order(N, seed=0, epoch=epoch).split(8):
            optimizer.param_groups[0]["lr"] = 0.3 * cosine()(Progress(step, 9))
            optimizer.zero_grad()
            F.nll_loss(F.log_softmax(model(X[rows]), -1), Y[rows]).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.7))
            optimizer.step()
            step += 1
    assert max(norms) > 0.7  # clipping did something
    torch.testing.assert_close(weights(trainer), weights(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", [Y, Y_IGNORED], ids=["all labels", "some ignored"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_changes_nothing(batch_size, accumulate, targets):
    """Fails if micro-batches are averaged, ignored labels counted, a penalty added in each, or the last step of
    an epoch (6 samples here, in parts of unequal number) scaled as if it were full."""
    terms = lambda: {"task": CrossEntropy(), "penalty": Penalty()}  # noqa: E731
    options = {"targets": targets, "optimizer": partial(torch.optim.SGD, lr=0.2, momentum=0.9), "clip_norm": 0.5}
    whole = fit(terms(), batch_size=8, **options)
    parts = fit(terms(), batch_size=batch_size, accumulate=accumulate, **options)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=2e-6)
    assert (weights(whole) - weights(mlp())).abs().max() > 0.01


def test_a_penalty_is_not_lost():
    """Fails if a per_step term does not reach the gradient at all."""
    plain, ours = fit(), fit({"task": CrossEntropy(), "penalty": Penalty()})
    assert (weights(plain) - weights(ours)).abs().max() > 1e-3


def test_schedule_at_zero_is_plain_training_until_it_rises():
    """Fails if a coefficient of 0 changes the weights in one bit."""

    class Pull(Term):
        def forward(self, step):
            return step.logits.square().sum()

    late = lambda: {"pull": Pull(weight=piecewise({0.5: 1.0}, initial=0.0)), "task": CrossEntropy()}  # noqa: E731
    states = {}
    for name, terms in {"plain": {"task": CrossEntropy()}, "late": late()}.items():
        trainer = Trainer(mlp(), terms=terms, optimizer=SGD)
        for stop in (3, 4):
            trainer = Trainer(mlp(), terms=terms, optimizer=SGD)
            trainer.fit(TensorData(X, Y, batch_size=8), epochs=2, max_steps=stop)
            states[name, stop] = weights(trainer)
    assert torch.equal(states["plain", 3], states["late", 3])
    assert not torch.equal(states["plain", 4], states["late", 4])


def test_learning_rates_of_groups_are_scaled_not_replaced():
    """Fails if a schedule sets one rate for all groups, or compounds from step to step."""

    class Slow(Term):
        contributes = False

        def param_groups(self, model):
            return [{"params": model[0].bias, "lr": 0.01, "weight_decay": 0.0}]

    trainer = Trainer(mlp(), terms={"task": CrossEntropy(), "slow": Slow()}, optimizer=SGD, schedule=linear(1.0, 0.0))
    for _ in range(2):  # a second run starts from the base rates again
        trainer.fit(TensorData(X, Y, batch_size=8), epochs=1, max_steps=2)
        rest, slow = trainer.optimizer.param_groups
        assert (rest["lr"], slow["lr"]) == pytest.approx((0.1 * 2 / 3, 0.01 * 2 / 3))
    assert len(rest["params"]) == 3
    assert slow["params"][0] is trainer.model[0].bias


def test_learning_rate_held_in_a_tensor():
    """Fails if the base rate is the tensor that is overwritten, so that the schedule compounds."""
    trainer = fit(optimizer=partial(torch.optim.Adam, lr=torch.tensor(0.1)), schedule=0.5, epochs=2)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_parameters_of_terms_are_trained_and_frozen_ones_are_not():
    """Fails if a term's head stays at its initial values, or a frozen parameter moves."""

    class Head(Term):
        taps = ("1",)

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)
            self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, step):
            return F.cross_entropy(self.head(step.hidden("1")), step.targets, reduction="sum")

    term, model = Head(), mlp()
    model[2].requires_grad_(False)
    before = copy.deepcopy((term.state_dict(), model[2].state_dict()))
    fit({"task": CrossEntropy(), "head": term}, model=model)
    assert not torch.equal(term.head.weight, before[0]["head.weight"])
    assert torch.equal(term.frozen, before[0]["frozen"])
    assert torch.equal(model[2].weight, before[1]["weight"])
    assert not model[1]._forward_hooks  # the taps are off again


def test_moments_are_called_in_order_and_once_a_step():
    """Fails if a moment is missed, doubled by accumulation, or called in another order than the terms'."""
    seen = []
    terms = {"a": Watch(seen, "a"), "task": CrossEntropy(), "b": Watch(seen, "b")}
    trainer = Trainer(mlp(), terms=terms, optimizer=SGD, accumulate=2)
    trainer.fit(TensorData(X, Y, batch_size=8), epochs=2, task="first")
    trainer.merge()

    def both(moment, step=None):
        return [("a", moment, step), ("b", moment, step)]

    def one(step, micro):
        transforms = [("a", "transform", None)] * micro + [("b", "transform", None)] * micro
        return transforms + both("before_step", step) + both("after_step", step)

    assert seen == [
        *both("attach"),
        *both("task_start"),
        *both("epoch_start", 0),
        *one(0, 2),
        *one(1, 1),
        *both("epoch_start", 2),
        *one(2, 2),
        *one(3, 1),
        *both("task_end"),
        *both("merge"),
    ]


def test_gradients_in_before_step_are_clipped_and_whole():
    """Fails if the moment comes before clipping or in the middle of accumulation, or cannot change the gradient."""
    norms = []

    class Look(Term):
        contributes = False

        def before_step(self, step):
            grads = [p.grad for p in step.model.parameters()]
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
            for g in grads:
                g.zero_()

    trainer = fit({"task": CrossEntropy(), "look": Look()}, clip_norm=1e-2, accumulate=2, batch_size=4)
    assert norms == pytest.approx([1e-2] * 6, rel=1e-3)
    assert torch.equal(weights(trainer), weights(mlp()))  # what the moment does to the gradient counts


def test_transform_changes_what_everyone_sees_and_counts():
    """Fails if counts or the model are fed with the batch before the transform."""

    class Half(Term):
        contributes = False

        def transform(self, batch):
            return batch.map(lambda t: t[: len(t) // 2])

    trainer = fit({"first": Half(), "task": CrossEntropy()}, epochs=1)
    model = mlp()
    for rows in epoch_order(N, seed=0, epoch=0).split(8):
        rows = rows[: len(rows) // 2]
        loss = F.cross_entropy(model(X[rows]), Y[rows])
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            p.data -= 0.1 * g
    torch.testing.assert_close(weights(trainer), weights(model), rtol=0, atol=1e-6)


def test_bf16_forward_in_low_precision_terms_in_float32():
    """Fails if bf16 does nothing, or terms are computed in it; also that the process can use both precisions."""
    types = []

    class Look(Term):
        taps = ("0",)

        def forward(self, step):
            further = step.forward(step.inputs + 1, model=other)
            types.extend([step.hidden("0").dtype, step.logits.dtype, further.dtype, (X @ X.T).dtype])
            self.rounded = not torch.equal(further, other(step.inputs + 1))
            return step.logits.sum() * 0.0

    other, look = mlp(), Look()
    exact = fit()
    trainer = fit({"task": CrossEntropy(), "look": look}, compute=Compute(precision="bf16"))
    assert set(types[0::4]) == {torch.bfloat16}
    assert {*types[1::4], *types[2::4], *types[3::4]} == {torch.float32}
    assert look.rounded
    assert trainer.model[0].weight.dtype == torch.float32
    assert 0 < (weights(exact) - weights(trainer)).abs().max() < 0.02
    assert "forward" not in vars(trainer.model)  # the user's model is not patched


# -- data -----------------------------------------------------------------------------------------


def test_every_form_of_data_trains_the_same():
    """Fails if a DataLoader, a list of batches or a mapping goes another way than tensors in memory."""
    expected = weights(fit())
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    assert torch.equal(expected, weights(fit(data=loader)))
    dictionary = DataLoader([{"inputs": x, "labels": y} for x, y in zip(X, Y)], batch_size=8, shuffle=True)
    assert torch.equal(expected, weights(fit(data=dictionary)))
    orders = [epoch_order(N, seed=0, epoch=e).split(8) for e in range(2)]
    batches = [[(X[rows], Y[rows]) for rows in order] for order in orders]

    class Epochs:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(batches[self.epoch])

        def __len__(self):
            return 3

    assert torch.equal(expected, weights(fit(data=Epochs())))


def test_batches_per_epoch_cuts_and_gives_length():
    """Fails if an endless stream cannot be trained on, or an epoch is not cut short."""

    def stream():
        while True:
            yield X[:8], Y[:8]

    steps = []

    class Count(Term):
        contributes = False

        def after_step(self, step):
            steps.append(step.progress)

    terms = {"task": CrossEntropy(), "count": Count()}
    Trainer(mlp(), terms=terms, optimizer=SGD).fit(stream(), epochs=2, batches_per_epoch=2)
    assert [(p.step, p.epoch, p.total_steps) for p in steps] == [(0, 0, 4), (1, 0, 4), (2, 1, 4), (3, 1, 4)]
    steps.clear()
    Trainer(mlp(), terms=terms, optimizer=SGD).fit(TensorData(X, Y, batch_size=8), epochs=2, batches_per_epoch=1)
    assert len(steps) == 2


def test_data_that_ends_early_is_an_error():
    """Fails if an epoch that is shorter than announced silently shifts the schedule."""
    with pytest.raises(ValueError, match="ended after 1 of 5"):
        Trainer(mlp(), terms={"task": CrossEntropy()}, optimizer=SGD).fit([(X, Y)], epochs=1, batches_per_epoch=5)


# -- around the loop ------------------------------------------------------------------------------


def test_history_and_evaluation_leave_no_trace():
    """Fails if evaluating draws from the training's generators, leaves the model in eval mode or another number than
    asked for; frozen parts keep their mode."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    start = copy.deepcopy(model)

    def evaluate(model):
        assert not model[2].training
        assert not torch.is_grad_enabled()
        torch.rand(7)
        return {"mean": model(X).mean()}

    with_model, without_model = copy.deepcopy(start), copy.deepcopy(start)
    with_model[1].eval()
    without_model[1].eval()
    trainer = fit(model=with_model, evaluate=Evaluation(evaluate, every=2), epochs=5)
    plain = fit(model=without_model, epochs=5)
    assert torch.equal(weights(trainer), weights(plain))
    assert [(row["epoch"], row["step"]) for row in trainer.history] == [(2, 6), (4, 12), (5, 15)]
    assert isinstance(trainer.history[0]["mean"], float)
    assert trainer.model[2].training
    assert not trainer.model[1].training


def test_early_stopping_restores_the_best():
    """Fails if it stops too late, or leaves the last weights."""
    numbers = iter([0.5, 0.9, 0.7, 0.8, 0.95])
    kept = []

    def evaluate(model):
        kept.append(weights(model))
        return {"accuracy": next(numbers)}

    trainer = fit(
        evaluate=Evaluation(evaluate, early_stopping=EarlyStopping("accuracy", "higher", patience=2)), epochs=10
    )
    assert len(trainer.history) == 4
    assert torch.equal(weights(trainer), kept[1])
    assert not torch.equal(kept[1], kept[3])


def test_global_generators_are_seeded_at_fit():
    """Fails if dropout depends on what was drawn before, or the seed has no effect."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    results = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(noise)
        data = TensorData(X, Y, batch_size=8)
        results.append(weights(fit(model=copy.deepcopy(model), data=data, seed=seed)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_second_fit_goes_on_from_the_weights():
    """Fails if a second run starts from progress or weights of another."""
    trainer = fit(epochs=1)
    once = weights(trainer)
    trainer.fit(TensorData(X, Y, batch_size=8), epochs=1)
    assert not torch.equal(once, weights(trainer))
    assert torch.equal(weights(trainer), _two_plain_runs())


def _two_plain_runs():
    model = mlp()
    optimizer = SGD(model.parameters())
    for _ in range(2):
        for rows in epoch_order(N, seed=0, epoch=0).split(8):
            batch_loss = F.nll_loss(F.log_softmax(model(X[rows]), -1), Y[rows], reduction="sum") / len(rows)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
    return weights(model)


# -- what goes wrong ------------------------------------------------------------------------------


class Explodes(Term):
    def __init__(self, at, value=torch.nan, **options):
        super().__init__(**options)
        self.at, self.value = at, value

    def forward(self, step):
        return step.logits.sum() * (self.value if step.progress.step == self.at else 0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_term_that_is_not_finite_is_named_before_it_reaches_the_weights(value, accumulate):
    """Fails if training goes on, the wrong term is named, or the weights are already spoilt."""
    model = mlp()
    with pytest.raises(NonFiniteLoss, match=r"step 3: term 'bad'.*clip_norm") as caught:
        fit(
            {"task": CrossEntropy(), "bad": Explodes(3, value)},
            model=model,
            batch_size=8 // accumulate,
            accumulate=accumulate,
        )
    assert isinstance(caught.value, FloatingPointError)
    assert weights(model).isfinite().all()


class Root(Term):
    """Finite in every step, but its gradient is NaN from the step ``at`` on: the root of 0."""

    def __init__(self, at=0, *, per_step=False):
        super().__init__()
        self.at, self.per_step = at, per_step

    def forward(self, step):
        if step.progress.step < self.at:
            return step.logits.sum() * 0.0
        x = step.model[0].weight if self.per_step else step.logits
        return (x * 0).square().sum().sqrt()


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize(("at", "accumulate"), [(0, 1), (2, 2), (5, 1)])  # 5 is the last step
def test_gradient_that_is_not_finite_is_seen_before_it_reaches_the_weights(at, accumulate, per_step, clip_norm):
    """Fails if a finite loss with a NaN gradient is let through, seen a step late or, in the last step, not at all; or
    if another term is named."""
    model = mlp()
    terms = {"task": CrossEntropy(), "root": Root(at, per_step=per_step), "penalty": Penalty()}
    with pytest.raises(NonFiniteLoss, match=f"step {at}: the gradient of term 'root'"):
        fit(terms, model=model, clip_norm=clip_norm, batch_size=8 // accumulate, accumulate=accumulate)
    assert weights(model).isfinite().all()


def test_gradient_that_before_step_spoils_is_seen():
    """Fails if the gradient is looked at before the moments that may change it."""

    class Spoil(Watch):
        def before_step(self, step):
            step.model[0].bias.grad[0] = torch.nan

    spoil = Spoil([])
    del spoil.__dict__["before_step"]
    model = mlp()
    with pytest.raises(NonFiniteLoss, match=r"step 0: the gradient of parameter '0.bias'.*\['spoil'\]"):
        fit({"task": CrossEntropy(), "spoil": spoil}, model=model, clip_norm=1.0)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"schedule": lambda progress: torch.nan if progress.step == 2 else 1.0},
            "step 2: the learning rate, 0.1 times",
        ),
        ({"schedule": lambda progress: torch.inf}, "step 0: the learning rate"),
        (
            {"terms": {"task": CrossEntropy(), "wild": CrossEntropy(weight=lambda progress: torch.nan)}},
            "step 0: term 'wild' has the weight nan",
        ),
    ],
)
def test_schedule_that_gives_no_number_is_named(options, says):
    """Fails if a schedule that returns NaN or infinity reaches the weights."""
    model = mlp()
    with pytest.raises(NonFiniteLoss, match=says):
        fit(model=model, **options)
    assert weights(model).isfinite().all()


def test_weights_that_overflow_in_the_optimizer_are_not_written(tmp_path):
    """Fails if the last step returns normally with spoilt weights, or they push the good checkpoint out."""
    huge = lambda progress: 3e38 if progress.step == 4 else 0.1  # noqa: E731
    trainer = Trainer(
        mlp(), terms={"task": Loss(lambda z, y: z.square().sum(-1) * 1e3)}, optimizer=partial(torch.optim.SGD, lr=1.0),
        schedule=huge, checkpoints=Checkpoints(tmp_path, every=1, keep=1),
    )  # fmt: skip
    with pytest.raises(NonFiniteLoss, match=r"after 5 optimizer steps: parameter '2.*no checkpoint"):
        trainer.fit(TensorData(X, Y, batch_size=8), epochs=2, max_steps=5)
    path = latest(tmp_path)
    assert path.name == "step-00000004"
    assert all(tensor.isfinite().all() for tensor in load(path, "model").values())


def test_trackers_are_closed_and_taps_off_after_an_error(tmp_path):
    """Fails if a failed run leaves files open or hooks on the model."""

    class Bad(Explodes):
        taps = ("1",)

    trainer = Trainer(mlp(), terms={"bad": Bad(1)}, optimizer=SGD, logging=Logging(trackers=["jsonl"], folder=tmp_path))
    with pytest.raises(NonFiniteLoss):
        trainer.fit(TensorData(X, Y, batch_size=8), epochs=1)
    assert trainer.accelerator.trackers == []
    assert not trainer.model[1]._forward_hooks


def test_no_checkpoint_of_spoilt_weights_where_the_flag_comes_late(tmp_path):
    """Fails if, on a device where the flag is read one step later, a checkpoint is written before it was read."""
    terms = {"task": CrossEntropy(), "bad": Explodes(3)}
    trainer = Trainer(mlp(), terms=terms, optimizer=SGD, checkpoints=Checkpoints(tmp_path, every=1))
    trainer._finite = FiniteCheck(trainer.objective, trainer.model, deferred=True)
    with pytest.raises(NonFiniteLoss, match="step 3: term 'bad'"):
        trainer.fit(TensorData(X, Y, batch_size=8), epochs=2)
    assert latest(tmp_path).name == "step-00000003"  # three steps done, before the one that is not finite
    assert not weights(trainer).isfinite().all()


def test_hidden_state_of_an_earlier_step_is_not_served_again():
    """Fails if a submodule that this forward pass left out gives the state of the last one that reached it."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.side, self.calls = nn.Linear(4, 3), nn.Linear(3, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.side(self.body(x)) if self.calls == 1 else self.body(x)

    class Read(Term):
        taps = ("side",)

        def forward(self, step):
            return step.hidden("side").sum() * 0.0

    model = Sometimes()
    with pytest.raises(KeyError, match="'side' was not reached"):
        fit({"task": CrossEntropy(), "read": Read()}, model=model)
    assert model.calls == 2


class Surgery(Term):
    contributes = False

    def attach(self, model):
        if isinstance(model[0], nn.Linear):
            model[0] = nn.Sequential(nn.Linear(4, 5))


def test_optimizer_built_before_surgery_is_refused():
    """Fails if the new parameters would silently not be trained."""
    model = mlp()
    stale = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold 2 .*factory"):
        Trainer(model, terms={"task": CrossEntropy(), "surgery": Surgery()}, optimizer=stale)
    model = mlp()
    Surgery().attach(model)
    current = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, terms={"task": CrossEntropy(), "surgery": Surgery()}, optimizer=current)
    assert trainer.optimizer is current
    built = fit({"task": CrossEntropy(), "surgery": Surgery()})
    assert sum(len(g["params"]) for g in built.optimizer.param_groups) == 4


def test_a_model_in_shards_is_refused(in_shards):
    """Fails when what somebody else sharded would be trained as if one process had the whole."""
    with pytest.raises(ValueError, match="weights of the model are in shards"):
        Trainer(in_shards(mlp()), terms={"task": CrossEntropy()}, optimizer=torch.optim.SGD)


def test_optimizer_without_a_terms_parameters_is_refused():
    """Fails if a term's head would silently not be trained."""
    model = mlp()
    term = Loss(lambda z, y: F.cross_entropy(z, y, reduction="none"))
    term.head = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="head"):
        Trainer(model, terms={"task": term}, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"accumulate": 0}, "accumulate"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"logging": Logging(trackers=["jsonl"])}, "folder"),
        ({"logging": Logging(trackers=["tensorbord"], folder="x")}, "unknown tracker"),
        ({"terms": {}}, "at least one term"),
    ],
)
def test_bad_arguments(options, says):
    """Fails if a wrong argument is taken silently."""
    with pytest.raises(ValueError, match=says):
        Trainer(mlp(), **{"terms": {"task": CrossEntropy()}, "optimizer": SGD, **options})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Compute(precision="fp8"), "precision"),
        (lambda: Compute(device="tpu"), "device"),
        (lambda: Compute(timeout=0), "timeout"),
        (lambda: Evaluation(len, every=0), "Evaluation.every"),
        (lambda: Checkpoints("x", every=0), "Checkpoints.every"),
        (lambda: Checkpoints("x", keep=0), "Checkpoints.keep"),
        (lambda: Logging(every=-1), "Logging.every"),
    ],
)
def test_bad_options(make, says):
    """Fails if a wrong option is taken silently."""
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("options", [{"checkpoints": "runs/a"}, {"logging": 50}, {"compute": "cpu"}])
def test_options_of_another_kind_are_refused_by_name(options):
    """Fails if a bare path or number ends in an AttributeError somewhere below."""
    (name,) = options
    with pytest.raises(TypeError, match=rf"{name} must be {name.capitalize()}\(...\)"):
        fit(**options)


def test_bad_calls_of_fit():
    """Fails if a wrong argument of fit is taken silently."""
    trainer = fit()
    data = TensorData(X, Y, batch_size=8)
    for options, says in (
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1, "resume": True}, "checkpoints=Checkpoints"),
        ({"epochs": 1, "max_steps": 0}, "max_steps"),
        ({"epochs": 1, "batches_per_epoch": 0}, "batches_per_epoch"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer.fit(data, **options)


def test_missing_index_and_metric_are_named():
    """Fails if a term that needs the index, or early stopping, gives an unhelpful error."""

    class NeedsIndex(Term):
        def forward(self, step):
            return step.logits[step.index * 0].sum()

    with pytest.raises(ValueError, match="IndexedDataset"):
        fit({"n": NeedsIndex()}, data=[(X, Y)])
    with pytest.raises(KeyError, match=r"'acc'.*'accuracy'"):
        fit(evaluate=Evaluation(lambda m: {"accuracy": 1.0}, early_stopping=EarlyStopping("acc", "higher")))


# -- what a person sees ---------------------------------------------------------------------------


def test_jsonl_records_means_between_log_steps(tmp_path):
    """Fails if records are of the last step only, weighted, or at other steps."""
    values = []

    class Record(Term):
        def forward(self, step):
            values.append(step.logits.detach().sum().item() / step.batch.size)
            return step.logits.sum()

    trainer = fit(
        {"task": CrossEntropy(), "record": Record(weight=0.01)},
        epochs=2,
        logging=Logging(every=2, trackers=["jsonl"], folder=tmp_path),
        schedule=linear(1.0, 0.0),
        evaluate=lambda m: {"accuracy": 0.5, "broken": float("nan")},
    )
    config, *lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert config["config"]["terms"] == "task, record"
    records = [line for line in lines if "task" in line]
    assert [line["step"] for line in records] == [2, 4, 6]
    expected = [sum(values[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [line["record"] for line in records] == pytest.approx(expected, rel=1e-5)
    assert [line["learning_rate"] for line in records] == pytest.approx([0.1 * (1 - s / 6) for s in (1, 3, 5)])
    assert all(line["steps_per_second"] > 0 for line in records)
    assert [line for line in lines if "accuracy" in line] == [
        {"step": s, "accuracy": 0.5, "broken": None} for s in (3, 6)
    ]
    assert trainer.history[0]["accuracy"] == 0.5


def test_logging_and_progress_bar(caplog, capsys):
    """Fails if the records do not reach logging, or the bar does not show the terms; it is off by default here."""
    with caplog.at_level(logging.INFO, logger="regularized"):
        fit(logging=Logging(every=3))
    assert "step 3/6: task" in caplog.text
    assert capsys.readouterr().err == ""
    fit(logging=Logging(every=3, progress_bar=True), evaluate=lambda m: {"accuracy": 0.25})
    shown = capsys.readouterr().err
    assert "after step 6: accuracy 0.25" in shown
    assert "6/6" in shown
    assert "task" in shown


def test_nothing_is_recorded_when_nothing_is_asked_for(tmp_path):
    """Fails if Logging(every=0) still records."""
    fit(logging=Logging(every=0, trackers=["jsonl"], folder=tmp_path))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1  # the configuration


def test_tensorboard(tmp_path):
    """Fails if Accelerate's own trackers are not started, or get no records."""
    pytest.importorskip("tensorboard")
    fit(logging=Logging(every=2, trackers=["tensorboard"], folder=tmp_path))
    assert list(tmp_path.rglob("events.out*"))


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    """Fails if a missing package is ignored, as Accelerate does."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"regularized\[tensorboard\]"):
        fit(logging=Logging(trackers=["tensorboard"], folder=tmp_path))


def test_schedules_and_terms_need_torch_alone():
    """Fails if importing a schedule or a term loads Accelerate, or anything else that a part does not need."""
    code = (
        "import sys; from regularized.training import linear, CrossEntropy, Step, Objective; "
        "bad = {'accelerate', 'rich', 'transformers', 'pytorch_lightning', 'safetensors'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
