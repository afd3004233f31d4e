"""The second phase, and both phases in a sequence of tasks."""

import copy
from functools import partial

import pytest
import torch
from tests.continual.ovor.vit import Vit
from torch import nn
from torch.nn import functional as F

from regularized.continual.ovor import (
    EnergyQuantile,
    HeadPhase,
    OnePrompt,
    OutlierSampler,
    TaskCrossEntropy,
    VirtualOutlierRegularizer,
    energy,
    energy_gap,
    epoch_cosine,
    extract_features,
)
from regularized.continual.sequence import TaskSequence
from regularized.continual.tasks import Task, class_groups, class_incremental
from regularized.training.data import TensorData, as_source, epoch_order
from regularized.training.progress import Progress
from regularized.training.randomness import mix
from regularized.training.step import Batch, Step

SAMPLER = OutlierSampler(k=5, select=8, noises=20, per_class=10, sigma=0.5)
CLASSES = (4, 1)


def features(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(CLASSES).repeat(count // 2)
    return torch.randn(count, 6, generator=generator) + 2.0 * torch.eye(6)[labels], labels


def head():
    torch.manual_seed(0)
    return nn.Linear(6, 6)


def regularizer(**options):
    return VirtualOutlierRegularizer(**{"sampler": SAMPLER, **options})


def test_without_weight_it_is_plain_training_of_the_head():
    """Bit for bit. Fails when outliers are drawn or passed through, or order, rates or columns are others."""
    x, y = features()
    ours, plain = head(), head()
    schedule = epoch_cosine(20, start=16)
    regularizer(weight=0.0).fit_head(ours, x, y, classes=CLASSES, epochs=4, batch_size=16, seed=3, schedule=schedule)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for epoch in range(4):
        adam.param_groups[0]["lr"] = 1e-3 * schedule(Progress(0, 1, epoch, 4))
        for rows in epoch_order(60, seed=3, epoch=epoch).split(16):
            adam.zero_grad()
            F.cross_entropy(plain(x[rows])[:, [4, 1]], (y[rows] == 1).long()).backward()
            adam.step()
    assert torch.equal(ours.weight, plain.weight)


def test_one_step_by_hand():
    """Fails when the regulariser is not weighted, runs over other classes, or meets other outliers than were drawn."""
    x, y = features()
    ours, other = head(), head()
    vor = regularizer(weight=0.7, thresholds=(-4.0, 1.0))
    losses = vor.fit_head(
        ours, x, y, classes=CLASSES, epochs=1, batch_size=60, optimizer=partial(torch.optim.SGD, lr=0.5)
    )
    generator = torch.Generator().manual_seed(mix(0, 0))
    outliers = SAMPLER.draw(x, num_classes=2, generator=generator)
    real, drawn = (other(part)[:, [4, 1]] for part in (x, outliers))
    cross_entropy = F.cross_entropy(real, (y == 1).long())
    too_high = F.huber_loss((energy(real) + 4.0).relu(), torch.zeros(60))
    too_low = F.huber_loss((1.0 - energy(drawn)).relu(), torch.zeros(20))
    penalty = 0.7 * (too_high + too_low)
    (cross_entropy + penalty).backward()
    with torch.no_grad():
        other.weight -= 0.5 * other.weight.grad
    torch.testing.assert_close(ours.weight, other.weight)
    torch.testing.assert_close(losses, torch.stack([cross_entropy, penalty]).detach()[None])
    assert min(too_high.item(), too_low.item()) > 0.1


def test_rows_of_other_classes_stay():
    """Fails when the energy runs over all columns."""
    x, y = features()
    ours, before = head(), head()
    regularizer().fit_head(ours, x, y, classes=CLASSES, epochs=3)
    others = [0, 2, 3, 5]
    assert torch.equal(ours.weight[others], before.weight[others])
    assert torch.equal(ours.bias[others], before.bias[others])
    assert not torch.equal(ours.weight[[4, 1]], before.weight[[4, 1]])


def test_the_energy_gap_grows():
    """Beside fresh outliers. Fails when the two hinges pull the same way, or the outliers are not used."""
    x, y = features()

    def gap(weight):
        ours = head()
        vor = regularizer(weight=weight, thresholds=EnergyQuantile(margin=6.0))
        adam = partial(torch.optim.Adam, lr=0.05)
        vor.fit_head(ours, x, y, classes=CLASSES, epochs=30, optimizer=adam)
        fresh = SAMPLER.draw(x, num_classes=2, generator=torch.Generator().manual_seed(99))
        with torch.no_grad():
            return energy_gap(ours(x)[:, CLASSES], ours(fresh)[:, CLASSES]).item()

    assert gap(1.0) > gap(0.0) + 0.5


def test_thresholds_come_from_the_first_task_and_are_saved():
    """Fails when each task moves them, when they are not in the state, or are taken after the phase."""
    x, y = features()
    ours = head()
    expected = energy(ours(x)[:, [4, 1]]).quantile(0.25).item()
    vor = regularizer(thresholds=EnergyQuantile(margin=3.0))
    vor.fit_head(ours, x, y, classes=CLASSES, epochs=2)
    assert vor.thresholds == pytest.approx((expected, expected + 3.0))
    first = vor.thresholds
    vor.fit_head(ours, x + 5.0, y, classes=CLASSES, epochs=1)
    assert vor.thresholds == first
    loaded = regularizer(thresholds=EnergyQuantile(margin=3.0))
    loaded.load_state_dict(vor.state_dict())
    assert loaded.thresholds == first
    anew = regularizer(thresholds=EnergyQuantile(each_task=True))
    anew.load_state_dict(vor.state_dict())
    anew.fit_head(ours, x, y, classes=CLASSES, epochs=1)
    assert anew.thresholds != first


def test_outliers_are_new_each_epoch_and_features_where_they_are_refreshed():
    """Fails when an epoch repeats the outliers of the last, or augmented features are those of the first epoch."""
    x, y = features()
    drawn, asked = [], []

    class Spy(VirtualOutlierRegularizer):
        def _outliers(self, *args):
            drawn.append(torch.cat(list(super()._outliers(*args))))
            return drawn[-1].split(20)

    def refresh(epoch):
        asked.append(epoch)
        return x + epoch, y

    Spy(sampler=SAMPLER).fit_head(head(), x, y, classes=CLASSES, epochs=3, refresh=refresh)
    assert asked == [0, 1, 2]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 3
    assert (drawn[2].mean() - drawn[0].mean()).item() > 1.0


def test_features_are_those_in_front_of_the_head():
    """In evaluation mode, and without a trace. Fails when dropout is on, or the mode of a part is lost."""
    torch.manual_seed(0)
    model = Vit()
    model.train()
    model.blocks[0].eval()
    data = TensorData(torch.randn(10, 4, 3), torch.arange(10), batch_size=4)
    found, labels = extract_features(model, as_source(data, seed=0).batches(0))
    assert [model.training, model.blocks[0].training] == [True, False]
    assert not model.head._forward_pre_hooks
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(data.inputs[labels]), pre_logits=True)
    torch.testing.assert_close(found, expected)


def test_first_phase_moves_no_row_of_another_task():
    """Fails when old or coming classes take part in the loss, or the order of a task's classes is lost."""
    loss = TaskCrossEntropy(5)
    tasks = Task(0, (4, 1), None), Task(1, (0, 3), None)
    loss.task_start(tasks[0])
    loss.task_end(tasks[0])
    loss.task_start(tasks[1])
    z = torch.randn(8, 5, requires_grad=True)
    y = torch.tensor([0, 3] * 4)
    value = loss(Step(nn.Identity(), Batch(z, y), Progress(0, 1)))
    expected = F.cross_entropy(z[:, [0, 3]], (y == 3).long(), reduction="sum")
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, z)
    assert torch.equal(gradient[:, [1, 2, 4]], torch.zeros(8, 3))


def sequence(weight=0.5, *, cache=True, sizes=(3, 2, 1)):
    """Three tasks of unequal sizes."""
    torch.manual_seed(0)
    y = torch.arange(6).repeat(20)
    x = torch.randn(120, 4, 3, generator=torch.Generator().manual_seed(0)) + torch.randn(6, 4, 3)[y]
    vor = VirtualOutlierRegularizer(weight=weight, sampler=SAMPLER)
    return TaskSequence(
        OnePrompt(Vit(), 6, layers={0: 2, 1: 4}),
        class_incremental((x, y), class_groups(6, sizes, seed=1), test=(x, y), batch_size=16),
        terms={"task": TaskCrossEntropy(6), "outliers": HeadPhase(vor, epochs=2, batch_size=16, cache=cache)},
        optimizer=partial(torch.optim.Adam, lr=0.01),
        epochs=3,
        schedule=epoch_cosine(5),
    )


def test_a_sequence_goes_on_exactly():
    """Fails when thresholds, classes, prompts or the seed of a task's phase are not in the state."""
    whole, first, second = (sequence() for _ in range(3))
    whole.fit()
    first.fit(until=1)
    second.load_state_dict(first.state_dict())
    record = second.fit()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert torch.equal(whole.record.whole.nan_to_num(-1), record.whole.nan_to_num(-1))


def test_the_second_phase_moves_the_head_alone():
    """Fails when prompts learn in it, or an earlier task's rows do."""
    with_phase, without = sequence(), sequence()
    without.terms["outliers"].epochs = 0
    with_phase.fit(until=1)
    without.fit(until=1)
    a, b = with_phase.model, without.model
    assert all(torch.equal(p, b.prompts[name]) for name, p in a.prompts.items())
    assert not torch.equal(a.head.weight, b.head.weight)
    old = list(with_phase.tasks[0].classes)
    rows = a.head.weight[old].detach().clone()
    with_phase.fit()
    assert torch.equal(a.head.weight[old], rows)
    assert with_phase.record.final_accuracy > 1 / 6


def test_without_augmentation_refreshed_features_are_cached_ones():
    """The same set in another order. Fails when features and labels come from different passes."""
    kept, anew = sequence(), sequence(cache=False)
    for one in (kept, anew):
        one.fit(until=1)
    # Orders differ, so weights do; what is learnt is the same.
    torch.testing.assert_close(kept.model.head.weight, anew.model.head.weight, rtol=0, atol=0.02)
    assert kept.terms["outliers"].losses.shape == anew.terms["outliers"].losses.shape == (2, 2)


def test_a_copy_of_the_phase_is_free():
    """Fails when a copied term trains the head of the model that the first one belongs to."""
    model, phase = OnePrompt(Vit(), 6, layers={0: 2}), HeadPhase(regularizer(), epochs=1)
    phase.attach(model)
    with pytest.raises(RuntimeError, match="attach"):
        copy.deepcopy(phase).task_end(Task(0, (0,), None))
