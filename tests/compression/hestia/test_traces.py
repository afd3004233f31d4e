"""Hutch++ and Hessian traces of `hestia` against matrices and Hessians that are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.compression.hestia import hessian_traces, hutchpp


def signs(n, columns, seed):
    return torch.randint(0, 2, (n, columns), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def symmetric(n, rank, seed=0):
    factor = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = torch.linspace(-1.0, 3.0, rank, dtype=torch.float64)
    return (factor * weights) @ factor.T


def test_exact_where_the_sketch_spans_the_matrix():
    """Fails when the low part is not the trace in the subspace: with as many columns as the rank nothing is left."""
    matrix = symmetric(30, rank=5)
    estimate = hutchpp(lambda v: matrix @ v, signs(30, 6, 1), signs(30, 3, 2))
    torch.testing.assert_close(estimate.total, matrix.trace())
    assert abs(float(estimate.rest)) < 1e-10
    full = symmetric(6, rank=6)
    torch.testing.assert_close(hutchpp(lambda v: full @ v, signs(6, 6, 5), signs(6, 2, 2)).low, full.trace())


def test_unbiased_otherwise():
    """Fails when the rest is not projected on both sides, or not divided by the number of probes."""
    matrix = symmetric(20, rank=20)
    estimates = [hutchpp(lambda v: matrix @ v, signs(20, 4, s), signs(20, 8, 1000 + s)).total for s in range(300)]
    mean, error = torch.stack(estimates).mean(), torch.stack(estimates).std() / 300**0.5
    assert abs(float(mean - matrix.trace())) < 4 * float(error)
    assert float(error) < 0.1 * abs(float(matrix.trace()))


class Net(nn.Module):
    """Two coupled layers, a smooth nonlinearity, and attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + F.scaled_dot_product_attention(h[None], h[None], h[None])[0]
        return self.second(h)


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def batches(count=2):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 4, generator=g), torch.randint(2, (6,), generator=g)) for _ in range(count)]


def true_traces(model, data):
    """From the whole Hessian of each weight."""
    traces = {}
    for name in ("first", "second"):

        def of_weight(w, name=name):
            changed = {f"{name}.weight": w}
            outputs = [(torch.func.functional_call(model, changed, (x,)), y) for x, y in data]
            return sum(F.cross_entropy(z, y) for z, y in outputs) / len(data)

        weight = model.get_submodule(name).weight.detach()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            hessian = torch.autograd.functional.hessian(of_weight, weight)
        traces[name] = float(hessian.reshape(weight.numel(), -1).trace())
    return traces


@pytest.mark.parametrize("together", [1, 4, 64])
def test_exact_probes_give_the_hessian_of_each_layer(together):
    """Fails when other layers leak in, batches are summed, vectors mixed up, or a fused kernel refuses."""
    model = Net()
    found = hessian_traces(model, loss, batches(), sketch=12, queries=1, probes="exact", together=together)
    expected = true_traces(model, batches())
    assert found == pytest.approx(expected, rel=1e-3)


def test_joint_probes_are_unbiased():
    """Fails without the random sign of each column: other layers' blocks would then shift the low part."""
    model = Net()
    expected = true_traces(model, batches())
    runs = [hessian_traces(model, loss, batches(), sketch=2, queries=4, seed=s, together=4) for s in range(200)]
    for name, trace in expected.items():
        values = torch.tensor([run[name] for run in runs])
        assert abs(float(values.mean()) - trace) < 4 * float(values.std()) / 200**0.5, name
        assert float(values.std()) / 200**0.5 < 0.1 * abs(trace), name


def test_data_are_read_only_as_far_as_needed_and_once():
    """Fails when a generator is exhausted after the first pass over it, or read to its end."""
    left = iter(batches(7))
    model = Net()
    from_generator = hessian_traces(model, loss, left, batches=3, queries=2)
    assert len(list(left)) == 4
    assert from_generator == hessian_traces(model, loss, batches(3), batches=9, queries=2)
