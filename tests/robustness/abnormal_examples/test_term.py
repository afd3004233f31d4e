"""AAER and one-step training in the loop."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.models import mlp, seeded, small_convnet
from regularized.robustness.abnormal_examples import (
    AbnormalExamples,
    AbnormalExamplesLoss,
    AbnormalShare,
    OneStepTraining,
)
from regularized.robustness.attacks import Attacked, OneStep, Threat
from regularized.training import CrossEntropy, TensorData, Trainer
from regularized.training.objective import Objective
from regularized.training.options import Compute, Logging
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

THREAT = Threat(1.0, -9.0, 9.0)


def data(size=24, features=6, classes=4):
    draws = torch.Generator().manual_seed(0)
    return torch.randn(size, features, generator=draws), torch.randint(classes, (size,), generator=draws)


def terms(attack=None, **settings):
    return {
        "attack": OneStepTraining(attack or OneStep.fgsm(THREAT), keep_graph=settings.get("loss_gradient", False)),
        "task": CrossEntropy(),
        "abnormal": AbnormalExamples(**settings),
    }


def attached(model, **settings):
    objective = Objective(terms(**settings))
    for attach in objective.moments("attach"):
        attach(model)
    return objective


def loss_of(objective, model, x, y):
    batch = Batch(x, y)
    for transform in objective.moments("transform"):
        batch = transform(batch)
    return objective.loss(Step(model, batch, Progress(0, 1)), objective.counts([batch]))


def test_terms_and_loss_agree():
    """Fails when the terms sum to anything but the loss of a loop of one's own."""
    model, (x, y) = seeded(0, mlp, [6, 32, 32, 4]), data()
    attack = OneStep.fgsm(THREAT)
    ours = loss_of(attached(model, weight=0.8, loss_weight=0.5, output_weight=3.0), model, x, y)
    criterion = AbnormalExamplesLoss(weight=0.8, loss_weight=0.5, output_weight=3.0)
    found = attack(model, x, y)
    expected = criterion(found.logits, found.losses, model(found.inputs), y)
    assert 0 < float(criterion.seen.number) < len(y)
    torch.testing.assert_close(ours, expected)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_the_batch_keeps_what_the_attack_found():
    """Fails when terms get other outputs than those before the attack, or the batch loses what it had."""
    model, (x, y) = seeded(0, mlp, [6, 32, 32, 4]), data()
    term = OneStepTraining(OneStep.fgsm(THREAT))
    term.attach(model)
    batch = term.transform(Batch(x, y, torch.arange(24), {"weights": y}))
    expected = OneStep.fgsm(THREAT)(model, x, y)
    for ours, theirs in zip(batch.extras["attacked"], expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(batch.inputs, expected.inputs)
    assert batch.extras["weights"] is y
    assert batch.index is not None


def test_the_open_hinge_is_that_of_the_loss():
    """Fails when the term divides or weighs the penalty otherwise than the loss does."""
    for seed in range(100):
        draws = torch.Generator().manual_seed(seed)
        before, after = (torch.randn(12, 4, generator=draws) for _ in range(2))
        labels, criterion = torch.randint(4, (12,), generator=draws), AbnormalExamplesLoss(weight=0.6)
        losses = F.cross_entropy(before, labels, reduction="none")
        expected = criterion(before, losses, after, labels)
        if criterion.seen.mixed and criterion.seen.abnormal_change > criterion.seen.normal_change:
            break
    found = Attacked(after, before, losses, after)
    step = Step(nn.Identity(), Batch(after, labels, extras={"attacked": found}), Progress(0, 1))
    penalty = 0.6 * AbnormalExamples(weight=0.6)(step) / 12
    torch.testing.assert_close(F.cross_entropy(after, labels) + penalty, expected)
    assert expected > F.cross_entropy(after, labels) + 0.1


def test_the_loss_gradient_reaches_the_weights_through_both_passes():
    """Fails when the graph of the attack's forward pass is lost between the terms."""
    model, (x, y) = seeded(0, mlp, [6, 32, 32, 4]), data()
    ours = loss_of(attached(model, loss_weight=2.0, output_weight=0.0, loss_gradient=True), model, x, y)
    without = loss_of(attached(model, loss_weight=2.0, output_weight=0.0), model, x, y)
    torch.testing.assert_close(ours, without)
    by_text, by_code = (torch.autograd.grad(loss, model[0].weight)[0] for loss in (ours, without))
    assert (by_text - by_code).abs().max() > 1e-4


def test_both_passes_are_counted_by_batch_normalisation():
    """Fails when the attack runs in evaluation mode: the authors' code has both passes in training mode."""
    model = small_convnet(10, size=8)
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    objective = Objective({"attack": OneStepTraining(OneStep.fgsm(Threat(0.1))), "task": CrossEntropy()})
    for attach in objective.moments("attach"):
        attach(model)
    loss_of(objective, model, x, y)
    assert int(model.features[1].num_batches_tracked) == 2


def test_evaluation_is_on_inputs_as_they_are():
    """Fails when terms in eval mode attack, or refuse a batch that nobody attacked."""
    model, (x, y) = seeded(0, mlp, [6, 16, 4]), data()
    objective = attached(model).eval()
    torch.testing.assert_close(loss_of(objective, model, x, y), F.cross_entropy(model(x), y))


def test_the_share_is_logged_and_changes_nothing():
    """Fails when the early warning enters the loss, or counts other examples than the regulariser."""
    model, (x, y) = seeded(0, mlp, [6, 32, 32, 4]), data()
    with_share = Objective({**terms(), "share": AbnormalShare()})
    for attach in with_share.moments("attach"):
        attach(model)
    torch.testing.assert_close(loss_of(with_share, model, x, y), loss_of(attached(model), model, x, y))
    found = OneStep.fgsm(THREAT)(model, x, y)
    expected = (found.losses > F.cross_entropy(model(found.inputs), y, reduction="none")).float().mean()
    torch.testing.assert_close(dict(with_share.values())["share"], expected)
    assert 0.0 < float(expected) < 1.0


def test_a_trainer_seeds_the_random_starts():
    """Fails when the starting noise comes from elsewhere than the generator that a trainer seeds and restores."""
    x, y = data()
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(100 + len(ends))
        trainer = Trainer(
            seeded(0, mlp, [6, 16, 4]),
            terms=terms(OneStep.rs_fgsm(THREAT)),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            seed=seed,
            logging=Logging(every=0, progress_bar=False),
            compute=Compute(device="cpu"),
        )
        trainer.fit(TensorData(x, y, batch_size=24), epochs=2)
        ends.append(trainer.model[0].weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_model_is_no_part_of_the_terms():
    """Fails when the attack's model is a submodule: its weights would be saved and optimised twice."""
    model = seeded(0, mlp, [6, 16, 4])
    objective = attached(model)
    assert not list(objective.parameters())
    assert not objective.state_dict()
    assert copy.deepcopy(objective) is not objective


def test_images_and_other_inputs_are_attacked_alike():
    """Fails when channels are looked for in inputs of two dimensions."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    for shape in ((5, 12), (5, 3, 2, 2), (5, 3, 4)):
        objective = attached(model)
        assert torch.isfinite(loss_of(objective, model, torch.rand(shape), torch.arange(5) % 4))


@pytest.mark.parametrize("weight", [0.0, lambda progress: 0.0])
def test_weight_zero_is_the_host(weight):
    """Fails when a coefficient of 0 leaves anything behind."""
    model, (x, y) = seeded(0, mlp, [6, 32, 32, 4]), data()
    ours = loss_of(attached(model, weight=weight), model, x, y)
    host = Objective({"attack": OneStepTraining(OneStep.fgsm(THREAT)), "task": CrossEntropy()})
    for attach in host.moments("attach"):
        attach(model)
    assert torch.equal(ours, loss_of(host, model, x, y))
