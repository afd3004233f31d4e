"""What the contract suite checks of SaRA."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regularized.evidence.contract import BadInput, Subject, plain
from regularized.fine_tuning.sara.adapter import SparseAdapter
from regularized.fine_tuning.sara.penalty import Polar, polar_factor
from regularized.fine_tuning.sara.term import SaRA, suggested_learning_rate
from regularized.training.terms import CrossEntropy


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 72), nn.ReLU(), nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 4))


def _convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def _both() -> nn.Module:
    """Convolution, normalisation, biases, and matrices of which two are large enough for the penalty."""
    return nn.Sequential(
        _convolutions(), nn.Linear(24, 72), nn.ReLU(), nn.Linear(72, 72), nn.Linear(72, 72), nn.Linear(72, 4)
    )


def _sara() -> Mapping[str, nn.Module]:
    # On a GPU as its page advises: a singular value decomposition there makes the host wait.
    polar: Polar = "newton_schulz" if torch.cuda.is_available() else "svd"
    return {"task": CrossEntropy(), "sara": SaRA(fraction=0.3, polar=polar)}


def _everything() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "sara": SaRA(threshold=float("inf"), reselect_at=0, lambda_rank=0)}


def _data(n: int, seed: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    return {"inputs": x, "targets": torch.arange(n) % 4, "index": torch.arange(n)}


def _part() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    return partial(polar_factor, method="newton_schulz"), (torch.randn(5, 7),)


def subjects() -> list[Subject]:
    """With penalty and second selection; an infinite threshold without them is plain training, the limit."""
    return [Subject("sara", _both, _sara, plain, _data, off=_everything, part=_part)]


def _unbound() -> None:
    model = _model()
    sara = SaRA(model, fraction=0.3, total_steps=4)
    optimizer = torch.optim.SGD(sara.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()


def _foreign_optimizer() -> None:
    model = _model()
    SaRA(model, fraction=0.3, total_steps=4).bind(torch.optim.SGD(model.parameters(), lr=0.1))


def _trained() -> tuple[nn.Module, SaRA]:
    model = _model()
    sara = SaRA(model, fraction=0.3, total_steps=4)
    optimizer = sara.bind(torch.optim.SGD(sara.parameters(), lr=0.1))
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    sara.finalize()
    return model, sara


def _file(model: nn.Module) -> None:
    _, sara = _trained()
    with tempfile.TemporaryDirectory() as folder:
        sara.adapter().save(folder)
        SparseAdapter.load(folder).merge(model)


def _wider() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 72), nn.ReLU(), nn.Linear(72, 4))


def _damaged_file() -> None:
    _, sara = _trained()
    with tempfile.TemporaryDirectory() as folder:
        sara.adapter().save(folder)
        path = Path(folder) / "sparse_adapter.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        SparseAdapter.load(folder)


def _state_of_another_mask() -> None:
    _, sara = _trained()
    SaRA(_wider(), fraction=0.3, total_steps=4).load_state_dict(sara.state_dict())


def _state_of_another_base() -> None:
    _, sara = _trained()
    SaRA(_model(), fraction=0.3, total_steps=4).load_state_dict(sara.state_dict())


def _quantized() -> None:
    layer = nn.Linear(80, 80)
    layer.weight = nn.Parameter(torch.zeros(80, 80, dtype=torch.int8), requires_grad=False)
    SaRA(layer, fraction=0.1, total_steps=4)


def _wrapped_already() -> None:
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)  # a real one needs a process group
    nn.Module.__init__(wrapper)
    SaRA(wrapper, fraction=0.1, total_steps=4)


def _no_room() -> None:
    """All trained weights leave the small zone before the second selection."""
    model = nn.Linear(3, 2)
    sara = SaRA(model, fraction=0.5, total_steps=2, lambda_rank=0)
    optimizer = sara.bind(torch.optim.SGD(sara.parameters(), lr=100.0))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def _convolution_for_peft() -> None:
    net = _convolutions()
    sara = SaRA(net, fraction=0.3, reselect_at=0, lambda_rank=0)
    sara.finalize()
    adapter = sara.adapter()
    adapter.unmerge(net)
    with tempfile.TemporaryDirectory() as folder:
        adapter.export_peft(folder, net)


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    one = partial(SaRA, total_steps=4)
    return [
        BadInput(
            "selects nothing", lambda: one(_model(), threshold=1e-12), ValueError, ("no weight", "1e-12", "50% below")
        ),
        BadInput(
            "selects everything",
            lambda: one(_model(), threshold=1e3),
            ValueError,
            ("every weight", "1000", "10% below", "float('inf')"),
        ),
        BadInput("threshold <= 0", lambda: one(threshold=0.0), ValueError, ("threshold must be positive", "0.0")),
        BadInput("fraction outside (0, 1)", lambda: one(fraction=1.0), ValueError, ("fraction", "(0, 1)", "1.0")),
        BadInput("both", lambda: one(fraction=0.1, threshold=0.1), ValueError, ("either", "fraction=0.1")),
        BadInput("neither", lambda: one(_model()), ValueError, ("either", "threshold=")),
        BadInput("tiny rate", lambda: suggested_learning_rate(0.05), UserWarning, ("2.5e-11", "Tune")),
        BadInput(
            "no eligible matrix",
            lambda: one(_convolutions(), fraction=0.3),
            ValueError,
            ("lambda_rank=0.005", "above 64", "lambda_rank=0"),
        ),
        BadInput("lambda < 0", lambda: one(fraction=0.1, lambda_rank=-1.0), ValueError, ("lambda_rank", "-1.0")),
        BadInput(
            "no total_steps", lambda: SaRA(_model(), fraction=0.3), ValueError, ("total_steps=...", "reselect_at=0")
        ),
        BadInput("reselect_at >= 1", lambda: one(fraction=0.1, reselect_at=1.0), ValueError, ("[0, 1)", "1.0")),
        BadInput(
            "optimizer of the model's parameters",
            _foreign_optimizer,
            ValueError,
            ("SGD(sara.parameters()", "model.parameters()"),
        ),
        BadInput("optimizer not bound", _unbound, RuntimeError, ("sara.bind(optimizer)",)),
        BadInput("file for another base", lambda: _file(_model()), ValueError, ("0.weight", "checksum", "pretrained")),
        BadInput("file for another shape", lambda: _file(_wider()), ValueError, ("0.weight", "(80, 6)", "(72, 6)")),
        BadInput("file for another model", lambda: _file(nn.Linear(3, 2)), ValueError, ("0.weight", "another model")),
        BadInput("damaged file", _damaged_file, ValueError, ("no readable adapter",)),
        BadInput("state of another mask", _state_of_another_mask, RuntimeError, ("bytes", "another model")),
        BadInput("state of another base", _state_of_another_base, RuntimeError, ("0.weight", "same pretrained")),
        BadInput("quantized", _quantized, ValueError, ("weight is quantized (torch.int8)", "exclude=['weight']")),
        BadInput(
            "unknown pattern",
            lambda: one(_model(), fraction=0.1, exclude=["*norm*"]),
            ValueError,
            ("'*norm*'", "0.weight"),
        ),
        BadInput(
            "all frozen",
            lambda: one(_model().requires_grad_(False), fraction=0.1),
            ValueError,
            ("no parameter", "requires_grad"),
        ),
        BadInput("wrapped in DDP before", _wrapped_already, ValueError, ("before DistributedDataParallel", "first")),
        BadInput("all have grown", _no_room, UserWarning, ("no trained weight", "first selection")),
        BadInput("convolution for PEFT", _convolution_for_peft, ValueError, ("0.weight", "nn.Linear", "save(folder)")),
        BadInput(
            "half precision SVD",
            lambda: polar_factor(torch.ones(3, 3).half()),
            ValueError,
            ("float32 or float64", "torch.float16"),
        ),
    ]
