"""The step, the loop, schedules, checkpoints, and the adapters to other trainers.

Names are loaded when first used: terms and schedules need torch alone, only :class:`Trainer` loads Accelerate.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regularized.training.checkpoint import CheckpointError
    from regularized.training.data import IndexedDataset, TensorData
    from regularized.training.finite import NonFiniteLoss
    from regularized.training.objective import Objective
    from regularized.training.options import Checkpoints, Compute, Evaluation, Logging
    from regularized.training.peers import PeerError
    from regularized.training.progress import Progress, cosine, gaussian_ramp, linear, piecewise, warmup
    from regularized.training.step import Batch, Step
    from regularized.training.stopping import EarlyStopping
    from regularized.training.terms import CrossEntropy, Loss, Ridge, Term
    from regularized.training.trainer import Trainer

_LAZY = {
    "Batch": "step",
    "CheckpointError": "checkpoint",
    "Checkpoints": "options",
    "Compute": "options",
    "CrossEntropy": "terms",
    "EarlyStopping": "stopping",
    "Evaluation": "options",
    "IndexedDataset": "data",
    "Logging": "options",
    "Loss": "terms",
    "NonFiniteLoss": "finite",
    "Objective": "objective",
    "PeerError": "peers",
    "Progress": "progress",
    "Ridge": "terms",
    "Step": "step",
    "TensorData": "data",
    "Term": "terms",
    "Trainer": "trainer",
    "cosine": "progress",
    "gaussian_ramp": "progress",
    "linear": "progress",
    "piecewise": "progress",
    "warmup": "progress",
}

__all__ = [
    "Batch",
    "CheckpointError",
    "Checkpoints",
    "Compute",
    "CrossEntropy",
    "EarlyStopping",
    "Evaluation",
    "IndexedDataset",
    "Logging",
    "Loss",
    "NonFiniteLoss",
    "Objective",
    "PeerError",
    "Progress",
    "Ridge",
    "Step",
    "TensorData",
    "Term",
    "Trainer",
    "cosine",
    "gaussian_ramp",
    "linear",
    "piecewise",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
