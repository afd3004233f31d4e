"""What experiments on small images share: loop, quality of predictions, baselines, refusals."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence import requirements
from regularized.evidence.baselines import generalized_cross_entropy, mixup_loss
from regularized.evidence.classification import (
    Augmented,
    Trace,
    about_images,
    checkpoints,
    crop_and_flip,
    fit,
    outputs,
    quality,
)
from regularized.evidence.datasets import draw, with_wrong_labels
from regularized.evidence.experiment import Unavailable
from regularized.evidence.models import seeded, small_convnet
from regularized.evidence.requirements import need_files, need_gpu, need_package
from regularized.training.data import TensorData
from regularized.training.progress import piecewise


def plain(net, batch):
    return F.cross_entropy(net(batch.inputs), batch.targets)


def random_data(count=20, size=5, **kwargs):
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 3, generator=draws), torch.randint(2, (count,), generator=draws)
    return TensorData(x, y, batch_size=size, **kwargs)


def test_fit_is_the_plain_loop():
    """Fails when a step is left out, gradients pile up, rates are multiplied twice, or epochs repeat one order."""
    net = seeded(0, nn.Linear, 3, 2)
    twin, data = copy.deepcopy(net), random_data()
    optimizer = torch.optim.SGD([{"params": net.weight, "lr": 0.3}, {"params": net.bias}], lr=0.1, momentum=0.9)
    calls = []
    fit(
        net,
        data,
        plain,
        optimizer=optimizer,
        epochs=3,
        schedule=piecewise({0.5: 0.1}),
        first_epoch=7,
        before_epoch=lambda epoch: calls.append((epoch, net.training)),
        after_epoch=lambda epoch: calls.append(epoch) or net.eval(),
    )
    other = torch.optim.SGD([{"params": twin.weight, "lr": 0.3}, {"params": twin.bias}], lr=0.1, momentum=0.9)
    step = 0
    for epoch in (7, 8, 9):
        for batch in data.batches(epoch):
            factor = 1.0 if step < 6 else 0.1
            other.param_groups[0]["lr"], other.param_groups[1]["lr"] = 0.3 * factor, 0.1 * factor
            other.zero_grad()
            plain(twin, batch).backward()
            other.step()
            step += 1
    assert torch.equal(net.weight, twin.weight)
    assert torch.equal(net.bias, twin.bias)
    assert calls == [(0, True), 1, (1, True), 2, (2, True), 3]


def test_outputs_are_those_of_evaluation_mode():
    """Fails when dropout stays on, the mean over networks is lost, or pieces come out of order."""
    nets = [nn.Sequential(nn.Dropout(0.9), seeded(k, nn.Linear, 1, 2)) for k in (0, 1)]
    x = torch.arange(4001.0)[:, None]
    got = outputs(nets, x)
    torch.testing.assert_close(got, (nets[0][1](x) + nets[1][1](x)).detach() / 2)
    torch.testing.assert_close(outputs(nets[0], x), nets[0][1](x).detach())


def test_quality_of_confident_errors():
    """Fails when the likelihood is taken of the predicted class, or the calibration error is a share."""
    logits = torch.tensor([[math.log(9.0), 0.0]] * 10)
    found = quality(logits, torch.tensor([0] * 5 + [1] * 5))
    assert found["accuracy"] == 50.0
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1)) / 2)
    assert found["ece"] == pytest.approx(40.0)


def test_early_stopping_takes_the_first_of_equals_and_all_of_its_metrics():
    """Fails when the metrics of different epochs are mixed, or a later epoch is chosen for its test accuracy."""
    trace = Trace()
    for epoch, validation, test in ((2, 50.0, 70.0), (4, 60.0, 80.0), (6, 60.0, 90.0), (8, 10.0, 99.0)):
        trace.add(epoch, {"validation": validation, "test": test})
    assert trace.best("validation", "higher") == {"validation": 60.0, "test": 80.0, "stopped_at": 4.0}
    assert trace.best("validation", "lower")["stopped_at"] == 8.0
    assert trace.last == {"validation": 10.0, "test": 99.0}


@pytest.mark.parametrize("epochs", [1, 2, 9, 10, 25, 150])
def test_the_last_epoch_is_measured(epochs):
    """Fails when a run ends without being measured, or is measured before it begins."""
    found = checkpoints(epochs)
    assert max(found) == epochs
    assert min(found) >= 1
    assert len(found) == min(epochs, 10)


def test_generalized_cross_entropy_between_its_limits():
    """Fails when the power is of the loss instead of the probability, or a limit is off."""
    logits = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 4
    p = logits.softmax(1)[torch.arange(8), labels]
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, 0.7), ((1 - p**0.7) / 0.7).mean())
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, 1e-9), F.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match=r"\(0, 1\], got 0"):
        generalized_cross_entropy(logits, labels, 0.0)


def test_mixup_mixes_labels_as_it_mixes_inputs():
    """Fails when the share of the labels is another one than that of the inputs, or pairs differ."""
    x, y = torch.eye(6), torch.arange(6)
    seen = []

    def net(mixed):
        seen.append(mixed)
        return 10 * mixed

    loss = mixup_loss(net, x, y, 2.0, torch.Generator().manual_seed(3))
    (mixed,) = seen  # row i holds the shares of its two images, which are their labels
    assert ((mixed > 0).sum(dim=1) > 1).any()
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(loss, -(mixed * (10 * mixed).log_softmax(1)).sum(1).mean())
    again = mixup_loss(net, x, y, 2.0, torch.Generator().manual_seed(3))
    assert torch.equal(loss, again)
    with pytest.raises(ValueError, match="positive"):
        mixup_loss(net, x, y, 0.0, torch.Generator())


def test_crops_move_and_flip_each_image_by_itself():
    """Fails when channels are torn apart, all images move alike, or pixels come from other images."""
    ramp = torch.arange(1.0, 1 + 16 * 16).reshape(16, 16)
    images = torch.stack([torch.stack([ramp, 1000 + ramp]) + 10_000 * n for n in range(40)])
    out = crop_and_flip(images, torch.Generator().manual_seed(0))
    inside = (out > 0).all(dim=1)
    assert torch.equal((out[:, 1] - out[:, 0])[inside], torch.full((int(inside.sum()),), 1000.0))
    assert torch.equal(out[:, 0][inside] // 10_000, torch.arange(40.0)[:, None, None].expand(40, 16, 16)[inside])
    middle = out[:, 0, 8, 8] % 10_000
    assert len(set(middle.tolist())) > 20
    steps = out[:, 0, 8, 9] - out[:, 0, 8, 8]
    assert set(steps.tolist()) == {1.0, -1.0}


def test_augmented_batches_keep_labels_and_indices():
    """Fails when the change is applied to the stored images, or the index is lost."""
    data = random_data()
    for one, other in zip(data.batches(3), Augmented(data, lambda x: x + 1).batches(3)):
        assert torch.equal(one.inputs + 1, other.inputs)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.index, other.index)


def test_wrong_labels_leave_the_test_alone():
    """Fails when the test is judged by wrong labels, validation is cleaner than training, or shares are off."""
    sample = draw("digits", 0, train=1000, validation=200, test=500)
    noisy, true = with_wrong_labels(sample, 0.4, seed=0)
    assert int((noisy.train_y != true).sum()) == 400
    assert int((noisy.validation_y != sample.validation_y).sum()) == 80
    assert noisy.test_y is sample.test_y
    assert noisy.train_x is sample.train_x
    assert torch.equal(true, sample.train_y)


def test_about_counts_without_making_the_network():
    """Fails when weights are miscounted, or a set that is split again calls itself fresh."""
    about = about_images("fashion_mnist", train=2000, test=2000, model="small convnet", build=small_convnet)
    assert about.weights == sum(p.numel() for p in small_convnet().parameters()) == 106_170
    assert (about.data, about.model) == ("2,000 Fashion-MNIST images", "small convnet, 106k weights")
    assert about.sampling == "fresh"
    assert about_images("digits", train=1000, test=500, model="", build=small_convnet).resplit == 0.5


def test_small_convnet_fits_its_images():
    """Fails when another size of image does not fit, or a size that cannot fit gets a late error."""
    assert small_convnet(3, size=8, bias=False)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        small_convnet(size=30)


def test_refusals_name_what_is_missing(tmp_path, monkeypatch):
    """Fails when a refusal does not say what is missing, for what, or how to get it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="trains a week and needs a CUDA GPU of 60 GB; none"):
        need_gpu("it trains a week", gigabytes=60)
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="peft is not installed: pip install peft"):
        need_package("peft", "pip install peft")
    (tmp_path / "here").touch()
    with pytest.raises(Unavailable) as error:
        need_files({"here": "the first", "glue/CoLA": "tables of GLUE"}, folder=tmp_path)
    assert f"{tmp_path}/glue/CoLA: tables of GLUE" in str(error.value)
    assert "REGULARIZED_DATA" in str(error.value)
    assert "the first" not in str(error.value)
    (tmp_path / "glue/CoLA").mkdir(parents=True)
    assert need_files({"here": "", "glue/CoLA": ""}, folder=tmp_path) == tmp_path
