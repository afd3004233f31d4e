"""Many networks at once train as they would alone. Each test names the fault that makes it fail."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    QuadraticMLP,
    modular_optimizer,
    one_hot_mse,
)
from regularized.understanding.grokking.phase_diagram import (
    _Runs,
    _squared_errors,
    _Tables,
    _train_whole,
    phase_diagram,
)
from regularized.understanding.grokking.phases import Phase
from regularized.understanding.grokking.report import MemorizationProbe

CELLS = {"fracs": [0.5, 0.8], "noises": [0.1, 0.4]}


def alone(frac, noise, *, op="add", decay=5.0, steps=40):
    task = ModularArithmetic(7, op, frac=frac, noise=noise)
    torch.manual_seed(1)
    net = QuadraticMLP(7, width=20)
    optimizer = modular_optimizer(net.parameters(), weight_decay=decay)
    x, y = task.train.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        one_hot_mse(net(x), y).backward()
        optimizer.step()
    return task, net


@pytest.mark.parametrize("op", ["add", "divide"])
def test_runs_train_as_they_would_alone(op):
    """Weights of every cell; fails when runs see one another's labels or sizes, or test pairs enter the loss."""
    tasks = [ModularArithmetic(7, op, frac=f, noise=x) for f in CELLS["fracs"] for x in CELLS["noises"]]
    torch.manual_seed(1)
    runs = _Runs(QuadraticMLP(7, width=20), len(tasks), batch_norm=False)
    data = _Tables.of(tasks, "cpu")
    _train_whole(runs, data, tasks, 40, weight_decay=5.0, batch_size=None, seed=1)
    for r, task in enumerate(tasks):
        _, net = alone(task.frac, task.noise, op=op)
        torch.testing.assert_close(runs.first[r].t(), net.fc1.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(runs.second[r].t(), net.fc2.weight, atol=1e-5, rtol=1e-4)


def test_a_small_diagram():
    """Two by two cells, in chunks of any size, against the probe of networks trained alone."""
    diagram = phase_diagram(7, **CELLS, width=20, steps=40, weight_decay=5.0)
    chunks = phase_diagram(7, **CELLS, width=20, steps=40, weight_decay=5.0, runs_at_once=3)
    for name, values in diagram.accuracies.items():
        torch.testing.assert_close(values, chunks[name])
    for a, frac in enumerate(diagram.fracs):
        for x, noise in enumerate(diagram.noises):
            task, net = alone(frac, noise)
            for name, value in MemorizationProbe(task)(net).items():
                if name != "clean_train":
                    assert float(diagram[name][a, x]) == pytest.approx(value, abs=1e-4), name


def test_gathered_batches_and_their_normalisation():
    """Logits, gradients and running statistics of each run against torch's own layer; fails for a shared batch."""
    torch.manual_seed(0)
    net = QuadraticMLP(7, width=12, norm="batch").double()
    nn.init.normal_(net.norm1.weight)
    nn.init.normal_(net.norm1.bias)
    runs = _Runs(net, 3, batch_norm=True).double()
    with torch.no_grad():
        runs.gain.copy_(net.norm1.weight.expand_as(runs.gain))
        runs.shift.copy_(net.norm1.bias.expand_as(runs.shift))
    pairs, labels = torch.randint(7, (3, 16, 2)), torch.randint(7, (3, 16))
    _squared_errors(runs.gathered(pairs), labels).sum().div(16 * 7).backward()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for r in range(3):
        net.load_state_dict(state)
        net.zero_grad()
        one_hot_mse(net.train()(pairs[r]), labels[r]).backward()
        torch.testing.assert_close(runs.first.grad[r].t(), net.fc1.weight.grad)
        torch.testing.assert_close(runs.gain.grad[r, 0], net.norm1.weight.grad)
        torch.testing.assert_close(runs.mean[r, 0], net.norm1.running_mean)
        torch.testing.assert_close(runs.variance[r, 0], net.norm1.running_var)
    whole = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    with torch.no_grad():
        torch.testing.assert_close(runs.eval().table()[2], net.eval()(whole))


def test_batches_train_and_dropout_acts():
    """Mini-batches with normalisation fit the training set; dropout changes what is learned, and is seeded."""
    fitted = phase_diagram(7, fracs=[0.8], noises=[0.0], width=32, steps=40, norm="batch", batch_size=16)
    assert float(fitted["train"]) > 0.9
    a, b, c = (
        phase_diagram(7, fracs=[0.8], noises=[0.2], width=32, steps=20, dropout=rate) for rate in (0.5, 0.5, 0.0)
    )
    assert torch.equal(a["size"], b["size"])
    assert not torch.equal(a["size"], c["size"])


def test_weights_that_decayed_to_nothing_are_forgetting():
    """``(1 - 0.2)^n`` of the weights is left where nothing is learned; fails when it is called confusion."""
    diagram = phase_diagram(7, fracs=[0.1], noises=[0.5], width=8, steps=400, weight_decay=60.0)
    assert diagram.phases() == [[Phase.FORGETTING]]
    assert diagram.share(Phase.FORGETTING) == 1.0
    assert phase_diagram(7, fracs=[0.1], noises=[0.5], width=8, steps=0).phases() == [[Phase.CONFUSION]]


def test_squared_errors():
    """Against one-hot labels; the shortcut needs no (R, B, p) of them."""
    logits, labels = torch.randn(2, 5, 7).double(), torch.randint(7, (2, 5))
    slow = (logits - F.one_hot(labels, 7)).square().sum(dim=2)
    torch.testing.assert_close(_squared_errors(logits, labels), slow)
