"""Probes of frozen features."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from regularized.mechanisms.probes import embed, knn_probe, linear_probe, logistic_probe


def blobs(n=90, features=6, classes=3, spread=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.eye(classes, features) * 4
    return centres[y] + spread * torch.randn(n, features, generator=generator), y


PROBES = {
    "linear": lambda encoder, train, test: linear_probe(encoder, train, test, epochs=100, lr=0.05),
    "logistic": logistic_probe,
    "knn": lambda encoder, train, test: knn_probe(encoder, train, test, k=5),
}


@pytest.mark.parametrize("name", PROBES)
def test_separable_features_give_everything_and_the_encoder_is_left_alone(name):
    """Fails when the encoder is trained, runs in training mode, or does not get its mode back."""
    encoder = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.9).eval())
    nn.init.eye_(encoder[0].weight)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    modes = [part.training for part in encoder.modules()]
    assert PROBES[name](encoder, blobs(), blobs(seed=1)) == 1.0
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert [part.training for part in encoder.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", PROBES)
def test_random_labels_give_chance(name):
    """Fails when the probe is judged on the set it was trained on."""
    generator = torch.Generator().manual_seed(0)
    train, test = ((torch.randn(80, 60, generator=generator), torch.arange(80) % 4) for _ in range(2))
    assert PROBES[name](None, train, test) < 0.45 < PROBES[name](None, train, train)


def test_logistic_regression_is_scikit_learns():
    """An independent solver; fails with a penalty on the bias, or another scale of it."""
    from sklearn.linear_model import LogisticRegression

    (x, y), (test_x, test_y) = blobs(spread=3.0), blobs(n=300, spread=3.0, seed=1)
    mean, deviation = x.mean(0), x.std(0)
    model = LogisticRegression(C=1 / (0.05 * len(x)), max_iter=1000, tol=1e-8)
    model.fit(((x - mean) / deviation).numpy(), y.numpy())
    expected = model.score(((test_x - mean) / deviation).numpy(), test_y.numpy())
    assert logistic_probe(None, (x, y), (test_x, test_y), penalty=0.05) == pytest.approx(expected, abs=0.004)
    assert 0.5 < expected < 0.98


def test_neighbours_are_scikit_learns():
    """Fails when the farthest are taken, or the vote is weighted."""
    from sklearn.neighbors import KNeighborsClassifier

    train, test = blobs(spread=3.0), blobs(n=300, spread=3.0, seed=1)
    model = KNeighborsClassifier(7, algorithm="brute").fit(train[0].numpy(), train[1].numpy())
    expected = model.score(test[0].numpy(), test[1].numpy())
    ours = knn_probe(None, train, test, k=7, standardise=False, chunk=64)
    assert ours == pytest.approx(expected, abs=0.01)


def test_standardising_uses_the_training_set_alone_and_leaves_constants():
    """Fails when a constant feature divides by 0, or the test set is scaled by itself."""
    x, y = blobs()
    constant = torch.cat([x, torch.full((len(x), 1), 5.0)], dim=1)
    assert logistic_probe(None, (constant, y), (constant, y)) == 1.0
    shifted = torch.cat([x + 100.0, torch.full((len(x), 1), 5.0)], dim=1)
    assert logistic_probe(None, (constant, y), (shifted, y)) < 0.9
    # A feature a thousand times larger does not drown the others.
    scaled = x.clone()
    scaled[:, 5] = 1000 * torch.randn(len(x), generator=torch.Generator().manual_seed(3))
    assert (
        knn_probe(None, (scaled, y), (scaled, y), k=3)
        > 0.95
        > knn_probe(None, (scaled, y), (scaled, y), k=15, standardise=False)
    )


def test_linear_probe_is_seeded():
    """Fails when the global generator is used: a probe would change the training that it looks at."""
    train, test = blobs(spread=3.0), blobs(seed=1, spread=3.0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = linear_probe(None, train, test, epochs=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert linear_probe(None, train, test, epochs=3) == first
    others = {linear_probe(None, train, test, epochs=1, generator=torch.Generator().manual_seed(s)) for s in range(5)}
    assert len(others) > 1


def test_all_forms_of_data_embed_to_the_same():
    """Fails when a data set or a loader is read in another order, or images are not flattened."""
    x, y = torch.randn(10, 1, 2, 3), torch.arange(10)
    expected = x.flatten(1)
    dataset = TensorDataset(x, y)
    for data in ((x, y), dataset, DataLoader(dataset, batch_size=4), [(x[:3], y[:3]), (x[3:], y[3:])]):
        features, labels = embed(None, data, batch_size=4)
        assert torch.equal(features, expected)
        assert torch.equal(labels, y)
    with pytest.raises(ValueError, match="no sample"):
        embed(None, iter([]))


def test_features_in_half_precision_are_probed_in_float32():
    """Fails when distances or logits are taken in bfloat16."""
    x, y = blobs()
    assert logistic_probe(None, (x.bfloat16(), y), (x.bfloat16(), y)) == 1.0
    assert knn_probe(lambda z: z.bfloat16(), (x, y), (x, y), k=3) == 1.0
