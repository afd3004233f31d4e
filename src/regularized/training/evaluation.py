"""The loss of a validation batch, for the adapters to loops that ask for one."""

import torch
from torch import Tensor

from regularized.training.objective import Objective
from regularized.training.step import Step

__all__ = ["evaluation_loss"]


def evaluation_loss(objective: Objective, step: Step, *, scale: float = 1.0) -> Tensor:
    """The objective of one batch with its terms in eval mode and without gradients; their state stays as it is.

    Args:
        objective: the terms; each gets its mode back afterwards.
        step: the batch.
        scale: see :meth:`~regularized.training.objective.Objective.loss`.

    Returns:
        Scalar.

    Raises:
        RuntimeError: a term changed one of its buffers although it was in eval mode.

    Examples:
        >>> from torch import nn
        >>> from regularized.training import Batch, CrossEntropy, Progress
        >>> batch = Batch.of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))
        >>> step = Step(nn.Linear(3, 2, bias=False), batch, Progress(0, 1))
        >>> round(evaluation_loss(Objective({"task": CrossEntropy()}), step).item(), 4)
        0.6931
    """
    modes = [(module, module.training) for module in objective.modules()]
    before = _versions(objective)
    objective.eval()
    try:
        with torch.no_grad():
            counts = objective.counts([step.batch], device=_device(step))
            loss = objective.loss(step, counts, scale=scale)
    finally:
        for module, mode in modes:
            module.training = mode
    changed = [name for name, version in _versions(objective).items() if before.get(name) != version]
    if changed:
        raise RuntimeError(
            f"evaluation changed {changed[0].removeprefix('terms.')!r}: a term must leave its state alone in eval "
            "mode, or validation data would enter what it remembers of the training; update it only `if self.training`"
        )
    return loss


def _versions(objective: Objective) -> dict[str, tuple[int, int]]:
    # torch counts the in-place changes of each tensor on the host: nothing is read from the device.
    return {name: (id(buffer), buffer._version) for name, buffer in objective.named_buffers()}


def _device(step: Step) -> torch.device | None:
    return next((p.device for p in step.model.parameters()), None)
