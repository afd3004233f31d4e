"""Bad inputs of `sara`: each is answered by what was given, what is allowed, and how to mend it."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from regularized.fine_tuning.sara.adapter import SparseAdapter
from regularized.fine_tuning.sara.penalty import polar_factor
from regularized.fine_tuning.sara.term import SaRA, suggested_learning_rate
from regularized.papers.sara.contract import small_convolutions


def _model():
    return nn.Sequential(nn.Linear(6, 72), nn.ReLU(), nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 4))


def _unbound():
    model = _model()
    sara = SaRA(model, fraction=0.3, total_steps=4)
    optimizer = torch.optim.SGD(sara.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()


def _foreign_optimizer():
    model = _model()
    SaRA(model, fraction=0.3, total_steps=4).bind(torch.optim.SGD(model.parameters(), lr=0.1))


def _trained():
    model = _model()
    sara = SaRA(model, fraction=0.3, total_steps=4)
    optimizer = sara.bind(torch.optim.SGD(sara.parameters(), lr=0.1))
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    sara.finalize()
    return model, sara


def _file(model: nn.Module):
    _, sara = _trained()
    with tempfile.TemporaryDirectory() as folder:
        sara.adapter().save(folder)
        SparseAdapter.load(folder).merge(model)


def _wider():
    return nn.Sequential(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 72), nn.ReLU(), nn.Linear(72, 4))


def _damaged_file():
    _, sara = _trained()
    with tempfile.TemporaryDirectory() as folder:
        sara.adapter().save(folder)
        path = Path(folder) / "sparse_adapter.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        SparseAdapter.load(folder)


def _state_of_another_mask():
    _, sara = _trained()
    SaRA(_wider(), fraction=0.3, total_steps=4).load_state_dict(sara.state_dict())


def _state_of_another_base():
    _, sara = _trained()
    SaRA(_model(), fraction=0.3, total_steps=4).load_state_dict(sara.state_dict())


def _quantized():
    layer = nn.Linear(80, 80)
    layer.weight = nn.Parameter(torch.zeros(80, 80, dtype=torch.int8), requires_grad=False)
    SaRA(layer, fraction=0.1, total_steps=4)


def _wrapped_already():
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)  # a real one needs a process group
    nn.Module.__init__(wrapper)
    SaRA(wrapper, fraction=0.1, total_steps=4)


def _no_room():
    """All trained weights leave the small zone before the second selection."""
    model = nn.Linear(3, 2)
    sara = SaRA(model, fraction=0.5, total_steps=2, lambda_rank=0)
    optimizer = sara.bind(torch.optim.SGD(sara.parameters(), lr=100.0))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def _convolution_for_peft():
    net = small_convolutions()
    sara = SaRA(net, fraction=0.3, reselect_at=0, lambda_rank=0)
    sara.finalize()
    adapter = sara.adapter()
    adapter.unmerge(net)
    with tempfile.TemporaryDirectory() as folder:
        adapter.export_peft(folder, net)


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    one = partial(SaRA, total_steps=4)
    return [
        refused(
            "selects nothing", lambda: one(_model(), threshold=1e-12), ValueError, ("no weight", "1e-12", "50% below")
        ),
        refused(
            "selects everything",
            lambda: one(_model(), threshold=1e3),
            ValueError,
            ("every weight", "1000", "10% below", "float('inf')"),
        ),
        refused("threshold <= 0", lambda: one(threshold=0.0), ValueError, ("threshold must be positive", "0.0")),
        refused("fraction outside (0, 1)", lambda: one(fraction=1.0), ValueError, ("fraction", "(0, 1)", "1.0")),
        refused("both", lambda: one(fraction=0.1, threshold=0.1), ValueError, ("either", "fraction=0.1")),
        refused("neither", lambda: one(_model()), ValueError, ("either", "threshold=")),
        refused("tiny rate", lambda: suggested_learning_rate(0.05), UserWarning, ("2.5e-11", "Tune")),
        refused(
            "no eligible matrix",
            lambda: one(small_convolutions(), fraction=0.3),
            ValueError,
            ("lambda_rank=0.005", "above 64", "lambda_rank=0"),
        ),
        refused("lambda < 0", lambda: one(fraction=0.1, lambda_rank=-1.0), ValueError, ("lambda_rank", "-1.0")),
        refused(
            "no total_steps", lambda: SaRA(_model(), fraction=0.3), ValueError, ("total_steps=...", "reselect_at=0")
        ),
        refused("reselect_at >= 1", lambda: one(fraction=0.1, reselect_at=1.0), ValueError, ("[0, 1)", "1.0")),
        refused(
            "optimizer of the model's parameters",
            _foreign_optimizer,
            ValueError,
            ("SGD(sara.parameters()", "model.parameters()"),
        ),
        refused("optimizer not bound", _unbound, RuntimeError, ("sara.bind(optimizer)",)),
        refused("file for another base", lambda: _file(_model()), ValueError, ("0.weight", "checksum", "pretrained")),
        refused("file for another shape", lambda: _file(_wider()), ValueError, ("0.weight", "(80, 6)", "(72, 6)")),
        refused("file for another model", lambda: _file(nn.Linear(3, 2)), ValueError, ("0.weight", "another model")),
        refused("damaged file", _damaged_file, ValueError, ("no readable adapter",)),
        refused("state of another mask", _state_of_another_mask, RuntimeError, ("bytes", "another model")),
        refused("state of another base", _state_of_another_base, RuntimeError, ("0.weight", "same pretrained")),
        refused("quantized", _quantized, ValueError, ("weight is quantized (torch.int8)", "exclude=['weight']")),
        refused(
            "unknown pattern",
            lambda: one(_model(), fraction=0.1, exclude=["*norm*"]),
            ValueError,
            ("'*norm*'", "0.weight"),
        ),
        refused(
            "all frozen",
            lambda: one(_model().requires_grad_(False), fraction=0.1),
            ValueError,
            ("no parameter", "requires_grad"),
        ),
        refused("wrapped in DDP before", _wrapped_already, ValueError, ("before DistributedDataParallel", "first")),
        refused("all have grown", _no_room, UserWarning, ("no trained weight", "first selection")),
        refused("convolution for PEFT", _convolution_for_peft, ValueError, ("0.weight", "nn.Linear", "save(folder)")),
        refused(
            "half precision SVD",
            lambda: polar_factor(torch.ones(3, 3).half()),
            ValueError,
            ("float32 or float64", "torch.float16"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
