"""The experiment's short cut, and the pool that one prompt is compared with."""

import copy
from functools import partial

import pytest
import torch

from regularized.continual.ovor import (
    HeadPhase,
    OutlierSampler,
    VirtualOutlierRegularizer,
    epoch_cosine,
)
from regularized.continual.sequence import TaskSequence
from regularized.continual.tasks import class_groups, class_incremental
from regularized.evidence.experiment import resolve, run_arm
from regularized.papers.ovor import experiment
from regularized.papers.ovor.networks import PoolTasks, PromptPool, SmallViT

OPTIONS = {"lr": 0.02, "weight": 1.0, "sigma": 1.0, "margin": 4.0}


@pytest.mark.parametrize("arm", ["outliers", "pool_outliers"])
def test_shared_first_phases_change_nothing(arm):
    """The sequence with its second phases in their place. Fails when a second phase moves what a first one reads, or
    when heads, seeds, rates or features of the short cut are those of another time."""
    s = resolve(experiment, arm, "smoke", OPTIONS)
    images = experiment.seed_images(s, 0)
    network = tuple((name, s[name]) for name in experiment._NETWORK)
    tasks = class_incremental(images.train, class_groups(20, 4, seed=0), test=images.test, batch_size=40)
    model, terms = experiment.prompted(copy.deepcopy(experiment.transformer(network)), s, s["prompts"], 5, 0)
    sampler = OutlierSampler(sigma=1.0, k=5, select=10, noises=20, per_class=10)
    vor = VirtualOutlierRegularizer(weight=1.0, thresholds=experiment.EnergyQuantile(margin=4.0), sampler=sampler)
    adam = partial(torch.optim.Adam, lr=0.02)
    phase = HeadPhase(vor, epochs=1, optimizer=adam, schedule=epoch_cosine(5, start=4), batch_size=8)
    sequence = TaskSequence(
        model, tasks, terms={**terms, "outliers": phase}, optimizer=adam, epochs=4, schedule=epoch_cosine(5)
    )
    record = sequence.fit()
    found = run_arm(experiment, arm, 0, "smoke", **OPTIONS).metrics
    assert found["final_accuracy"] == pytest.approx(100 * record.final_accuracy, abs=1e-9)
    assert found["forgetting"] == pytest.approx(100 * record.global_forgetting, abs=1e-9)
    assert found["accuracy_given_task"] > 100 / 4


def test_the_pool_asks_first_and_takes_the_nearest():
    """Fails when the query sees a prompt, a task trains another's prompts, or a key without images can be chosen."""
    torch.manual_seed(0)
    vit = SmallViT(size=8, patch=4, channels=1, dim=16, depth=2, heads=2, num_classes=5)
    pool = PromptPool(vit, 4, tasks=3, layers={0: 2, 1: 4}, shared=(0,))
    images = torch.randn(2, 10, 1, 8, 8) + torch.tensor([4.0, -4.0]).view(2, 1, 1, 1, 1)
    term = PoolTasks(pool)
    for number in range(2):
        term.task_start(type("Task", (), {"number": number})())
        pool(images[number]).sum().backward()
        own = pool._pooled[0].prompt.grad.abs().sum(dim=(1, 2)) > 0
        assert own.tolist() == [True, number == 1, False]
    pool.eval()
    both = pool.features(images.flatten(0, 1))
    for number in range(2):
        pool.counts.zero_()
        pool.counts[number] = 1.0
        torch.testing.assert_close(both[10 * number : 10 * number + 10], pool.features(images[number]))
