"""Members in one step are what they would be alone."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.language_models import small_lm
from regularized.overfitting.infinite_compute.optimizer import decay_groups, warmup_then_cosine
from regularized.overfitting.infinite_compute.procedure import EnsembleTraining
from regularized.overfitting.infinite_compute.stacked import StackedModels, clip_members_
from regularized.training.data import TensorData
from regularized.training.progress import Progress

ADAMW = partial(torch.optim.AdamW, lr=0.02, betas=(0.9, 0.95))


def language_models(count=3):
    return [small_lm(seed, 12, width=8, layers=1, heads=2).double() for seed in range(count)]


def text():
    tokens = torch.randint(12, (10, 7), generator=torch.Generator().manual_seed(0))
    return TensorData(tokens[:, :-1], tokens[:, 1:], batch_size=4)


def alone(model, data, *, seed, epochs, decay, clip):
    """The recipe written down as a plain loop over one model."""
    model = copy.deepcopy(model)
    optimizer = ADAMW(decay_groups(model, decay))
    schedule, steps = warmup_then_cosine(), len(data) * epochs
    own = TensorData(data.inputs, data.targets, batch_size=data.batch_size, seed=seed)
    step = 0
    for epoch in range(epochs):
        for batch in own.batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * schedule(Progress(step, steps))
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            step += 1
    return model


def test_together_is_alone():
    """Fails when members share a gradient norm or an order, when the loss is a mean over members, or decay a group."""
    models, data = language_models(), text()
    training = EnsembleTraining(models, optimizer=ADAMW, weight_decay=1.6, seeds=[5, 6, 9], clip=0.5)
    training.fit(data, epochs=4)
    for number, (model, seed) in enumerate(zip(models, (5, 6, 9), strict=True)):
        wanted = alone(model, data, seed=seed, epochs=4, decay=1.6, clip=0.5)
        for name, p in training.models.member(number).named_parameters():
            assert torch.allclose(p, wanted.get_parameter(name), atol=1e-9), name


def test_the_given_models_stay():
    """Fails when training moves what was handed in."""
    models = language_models()
    before = copy.deepcopy(models[0].state_dict())
    EnsembleTraining(models, optimizer=ADAMW, weight_decay=0.1).fit(text(), epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in models[0].state_dict().items())


def test_clipping():
    """Fails when the norm is over members together, or of a single tensor."""
    models = language_models()
    stacked = StackedModels(models)
    x = torch.randint(12, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    (stacked(x).square().sum() * 10).backward()
    norms = clip_members_(stacked.parameters(), 0.3)
    for number, model in enumerate(models):
        (model(x[number]).square().sum() * 10).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        assert norms[number].item() == pytest.approx(norm.item())
        for name, p in model.named_parameters():
            assert torch.allclose(stacked.stacked.get_parameter(name).grad[number], p.grad, atol=1e-12)


def test_buffers_are_each_members():
    """Fails when batch statistics are shared, or an update within the stacked pass is lost."""
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    stacked, x = StackedModels(models), torch.randn(2, 6, 3)
    stacked(x)
    for number, model in enumerate(models):
        model(x[number])
        assert torch.allclose(stacked.member(number)[1].running_mean, model[1].running_mean, atol=1e-6)
        assert int(stacked.member(number)[1].num_batches_tracked) == 1


def test_dropout_differs_and_obeys_the_mode():
    """Fails when members drop the same units, or drop in evaluation."""
    models = [nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)) for _ in range(2)]
    stacked, x = StackedModels(models), torch.ones(4, 3)
    dropped = stacked.shared(x) == 0
    assert not torch.equal(dropped[0], dropped[1])
    stacked.eval()
    assert torch.allclose(stacked.shared(x)[0], models[0].eval()(x), atol=1e-6)


def test_tied_weights_stay_tied():
    """Fails when a weight of two modules is stacked twice, and then drifts apart."""
    models = [small_lm(seed, 12, width=8, layers=1, heads=2, tied=True) for seed in range(2)]
    stacked = StackedModels(models)
    assert stacked.stacked.head.weight is stacked.stacked.embedding.weight
    x = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.allclose(stacked.shared(x)[1], models[1](x), atol=1e-5)
    assert torch.allclose(stacked.member(1)(x), models[1](x), atol=1e-6)


def test_frozen_parameters_stay():
    """Fails when stacking makes a frozen parameter trainable."""
    models = language_models(2)
    for model in models:
        model.embedding.requires_grad_(False)
    stacked = StackedModels(models)
    assert not stacked.stacked.embedding.weight.requires_grad
    assert stacked.stacked.head.weight.requires_grad


def test_resume_within_an_epoch():
    """Fails when order, moments or the schedule's position are not in the state."""
    whole = EnsembleTraining(language_models(), optimizer=ADAMW, weight_decay=0.8)
    states = []

    def keep(training):
        if training.optimizers.steps == [4]:
            states.append(copy.deepcopy(training.state_dict()))

    whole.fit(text(), epochs=3, after_step=keep)
    again = EnsembleTraining(language_models(), optimizer=ADAMW, weight_decay=0.8)
    again.load_state_dict(states[0])
    again.fit(text(), epochs=3)
    for name, value in whole.models.state_dict().items():
        assert torch.equal(value, again.models.state_dict()[name]), name
