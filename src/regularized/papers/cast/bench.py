"""Cost of a step of CAST beside a dense step of AdamW on the same small Llama, and beside ModelOpt's static masks.

The dense step is forward, backward and AdamW; CAST's has the teacher's forward, the scales, its optimizer and the
drawing of masks at every tenth step. Bytes are those of a bfloat16 model on disk, dense and with packed 2:4 weights.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regularized.compression.cast import CAST, SparseAdamW, distillation_loss, save_sparse, to_semi_structured
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, on_first_call, stepper
from regularized.evidence.language_models import LanguageModel, next_token_loss, small_lm

Size = tuple[int, int, int]  # width, layers, windows of 64 tokens

_VOCABULARY = 1024
_OPTIONS: dict[str, Any] = {"lr": 1e-6, "l1": 1e-2, "total_steps": 10**6}


def _model(size: Size) -> LanguageModel:
    return small_lm(0, _VOCABULARY, width=size[0], layers=size[1], heads=2).to(device())


def _windows(size: Size) -> Tensor:
    return torch.randint(_VOCABULARY, (size[2], 65), generator=torch.Generator().manual_seed(0)).to(device())


def _dense(size: Size) -> StepFunction:
    model, windows = _model(size), _windows(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_OPTIONS["lr"])
    return stepper(lambda: next_token_loss(model, windows), optimizer)


def _cast(size: Size, **settings: Any) -> StepFunction:
    model, windows = _model(size), _windows(size)
    cast = CAST(model, target_modules=_linear(model), **settings)
    optimizer = SparseAdamW(cast.param_groups(), **_OPTIONS)
    inputs, labels = windows[:, :-1], windows[:, 1:]

    def loss() -> Tensor:
        taught = None if cast.teacher is None else cast.teacher(inputs)
        return distillation_loss(model(inputs), taught, labels, eta=cast.eta).loss

    return stepper(loss, optimizer)


def _linear(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]


def _modelopt(size: Size) -> StepFunction:
    """NVIDIA's recipe: a static magnitude mask, multiplied into each weight in each forward pass, and AdamW."""
    sparsity = import_module("modelopt.torch.sparsity")
    model, windows = _model(size), _windows(size)
    config: dict[str, Any] = {"nn.Linear": {"*": {}, "head": None}}
    sparse: nn.Module = sparsity.sparsify(model, mode=[("sparse_magnitude", config)], config={"verbose": False})
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=_OPTIONS["lr"])
    return stepper(lambda: next_token_loss(sparse, windows), optimizer)


def _pair(plain: Callable[[], StepFunction], method: Callable[[], StepFunction]) -> tuple[StepFunction, StepFunction]:
    warnings.filterwarnings("ignore", message="even at a constant rate")
    return on_first_call(plain), on_first_call(method)


def _sparse(size: Size) -> LanguageModel:
    """Cut to 2:4, plain."""
    model = _model(size)
    cast = CAST(model, target_modules=_linear(model), eta=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cast.finalize()
    return model


def _inference(size: Size) -> tuple[StepFunction, StepFunction]:
    """The same sparse weights as they are, and on the kernels that this machine has."""
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    dense, sparse = (_sparse(size).to(dtype).eval() for _ in range(2))
    to_semi_structured(sparse)
    tokens = _windows(size)
    return partial(_forward, dense, tokens), partial(_forward, sparse, tokens)


@torch.no_grad()
def _forward(model: nn.Module, tokens: Tensor) -> None:
    model(tokens)


def _kept(size: Size) -> tuple[int, int]:
    """Bytes on disk in bfloat16: the dense file of tensors, and the packed one with its settings."""
    from safetensors.torch import save_file

    model = _sparse(size).to("cpu", torch.bfloat16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(copy.deepcopy(model).state_dict(), folder / "dense.safetensors")
        save_sparse(model, folder / "packed")
        packed = sum(file.stat().st_size for file in (folder / "packed").iterdir())
        return (folder / "dense.safetensors").stat().st_size, packed


def workloads() -> list[Workload]:
    """Two sizes, without the teacher, and ModelOpt where it is installed (pip install nvidia-modelopt)."""
    small: Size = (128, 4, 16)
    large: Size = (192, 6, 16)
    rows = [
        Workload(
            f"small Llama, width {size[0]}, {size[1]} layers, 1,024 tokens",
            partial(_pair, partial(_dense, size), partial(_cast, size)),
            kept=partial(_kept, size),
        )
        for size in (small, large)
    ]
    rows.append(
        Workload(
            "the larger, without teacher",
            partial(_pair, partial(_dense, large), partial(_cast, large, eta=0.0)),
            floor=1.0,
        )
    )
    rows.append(
        Workload(
            "inference of the larger, 2:4 weights",
            partial(_inference, large),
            note="on sparse kernels where the machine has them; elsewhere, as on a CPU, both are dense",
            floor=0.5,
        )
    )
    if find_spec("modelopt") is not None:
        rows.append(
            Workload(
                "the larger, without teacher / ModelOpt's static mask",
                partial(_pair, partial(_modelopt, large), partial(_cast, large, eta=0.0)),
                note="plain is NVIDIA ModelOpt's sparse_magnitude with AdamW",
                floor=1.0,
            )
        )
    return rows
