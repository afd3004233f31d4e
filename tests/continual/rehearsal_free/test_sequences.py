"""Tasks, what is forgotten, and a sequence that is interrupted."""

from functools import partial

import pytest
import torch
from torch import nn

from regularized.continual.forgetting import Forgetting, global_forgetting, local_forgetting
from regularized.continual.rehearsal_free import ContinualLoss, WeightAnchor
from regularized.continual.sequence import TaskSequence
from regularized.continual.tasks import class_groups, class_incremental, domain_incremental
from regularized.evidence.models import mlp
from regularized.training import CrossEntropy
from regularized.training.options import Compute


def test_groups_hold_each_class_once():
    """Fails on a class that is lost, and on an order that does not follow the seed."""
    groups = class_groups(10, [3, 3, 4], seed=1)
    assert sorted(c for group in groups for c in group) == list(range(10))
    assert [len(group) for group in groups] == [3, 3, 4]
    assert groups == class_groups(10, [3, 3, 4], seed=1) != class_groups(10, [3, 3, 4], seed=2)


def test_forgetting_by_hand():
    """Three tasks of unequal sizes. Fails on unweighted tasks, on the last row alone, and on the reversed sign."""
    r = torch.tensor([[0.9, 0.0, 0.0], [0.5, 0.8, 0.0], [0.3, 0.6, 0.7]], dtype=torch.float64)
    sizes = [2, 3, 5]
    second = 2 / 5 * (0.9 - 0.5)
    third = 2 / 10 * (0.9 - 0.3) + 3 / 10 * (0.8 - 0.6)
    assert abs(global_forgetting(r, sizes).item() - (second + third) / 2) < 1e-12
    assert abs(local_forgetting(r).item() - ((0.9 - 0.3) + (0.8 - 0.6)) / 2) < 1e-12
    with_noise = r + torch.triu(torch.ones(3, 3), diagonal=1)
    assert torch.equal(global_forgetting(r, sizes), global_forgetting(with_noise, sizes))


def test_what_is_measured_with_and_without_the_task():
    """A model that always prefers class 0. Fails when unseen classes may be answered, or the task is told to both."""
    model = nn.Linear(1, 3, bias=True)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([3.0, 2.0, 9.0]))
    x, y = torch.zeros(3, 1), torch.tensor([0, 1, 2])
    tasks = class_incremental((x, y), [(0,), (1,), (2,)], test=(x, y))
    record = Forgetting(tasks)
    for after in range(3):
        record.measure(model, after=after)
    assert record.whole[0, 0] == record.whole[1, 0] == record.whole[2, 2] == 1.0
    assert record.whole[1, 1] == record.whole[2, 0] == record.whole[2, 1] == 0.0
    assert bool((record.given_task.tril() == torch.ones(3, 3).tril()).masked_select(torch.ones(3, 3).tril() > 0).all())
    assert abs(record.final_accuracy - 1 / 3) < 1e-12


def sequence(importance="fisher", **options):
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    data = (x, x.argmax(dim=1))
    return TaskSequence(
        mlp([4, 8, 4]),
        class_incremental(data, class_groups(4, 2, seed=0), test=data, batch_size=8),
        terms={"task": ContinualLoss(4), "anchor": WeightAnchor(weight=1.0, importance=importance)},
        optimizer=partial(torch.optim.Adam, lr=0.01),
        epochs=2,
        **options,
    )


def test_whole_weights_alone(in_shards):
    """Fails when a second task would shard what the first one has left in shards."""
    with pytest.raises(ValueError, match=r'whole weights.*give sharding="no"'):
        sequence(compute=Compute(device="cpu", sharding="fsdp2"))
    whole = sequence()
    with pytest.raises(ValueError, match="weights of the model are in shards"):
        TaskSequence(
            in_shards(whole.model), whole.tasks, terms={"task": ContinualLoss(4)}, optimizer=torch.optim.SGD, epochs=1
        )


@pytest.mark.parametrize("importance", ["none", "fisher", "path"])
def test_a_sequence_goes_on_exactly(importance):
    """Fails when teacher, anchors, importances, order or record are not in the state."""
    whole, first, second = (sequence(importance) for _ in range(3))
    whole.fit()
    first.fit(until=1)
    second.load_state_dict(first.state_dict())
    record = second.fit()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters()))
    assert torch.equal(whole.record.whole.nan_to_num(-1), record.whole.nan_to_num(-1))


def test_other_domains_with_the_same_classes():
    """An anchor holds what the first domain needs. Fails when domains are refused as classes that come twice."""

    def forgotten(weight):
        torch.manual_seed(0)
        x = torch.randn(200, 6)
        first, second = (x[:100], (x[:100, 0] > 0).long()), (x[100:], (x[100:, 1] > 0).long())
        domains = domain_incremental([first, second], test=[first, second])
        run = TaskSequence(
            mlp([6, 16, 2]),
            domains,
            terms={"task": CrossEntropy(), "anchor": WeightAnchor(weight=weight, with_head=True)},
            optimizer=partial(torch.optim.SGD, lr=0.3),
            epochs=30,
        )
        record = run.fit()
        return float(record.whole[0, 0] - record.whole[1, 0])

    assert forgotten(0.3) < forgotten(0.0) - 0.02
