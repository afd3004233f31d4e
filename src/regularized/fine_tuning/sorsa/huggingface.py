"""SORSA's penalty in transformers' ``Trainer``, for models that PEFT has adapted.

Needs the extra: ``pip install "regularized[huggingface]"``.
"""

from typing import Any

import torch

from regularized.fine_tuning.sorsa.penalty import GAMMA, OrthonormalPenalty
from regularized.mechanisms.ranges import allowed

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as _error:
    if _error.name != "transformers":
        raise
    raise ImportError(
        'regularized.fine_tuning.sorsa.huggingface needs transformers: pip install "regularized[huggingface]"'
    ) from _error

__all__ = ["SorsaCallback"]


class SorsaCallback(TrainerCallback):
    """The penalty in transformers' ``Trainer``: once an optimizer step, after clipping, whatever the accumulation.

    The learning rate is that of the ``TrainingArguments``. Works with one process and with DDP; with DeepSpeed and FSDP
    gradients are not where PyTorch keeps them, which is an error.

    Args:
        gamma: strength, >= 0; default 4e-4, see :class:`~regularized.fine_tuning.sorsa.OrthonormalPenalty`. The
            authors' trainer divides by the number of accumulation steps, too: give ``gamma=4e-4 / 64`` for their runs.

    Raises:
        ValueError: gamma < 0; when training starts: no SORSA layer, or fp16 without clipping, where gradients are still
            scaled when the callback is called.

    Examples:
        >>> SorsaCallback(gamma=4e-4).gamma
        0.0004
    """

    @allowed(gamma=GAMMA)
    def __init__(self, gamma: float = 4e-4) -> None:
        self.gamma = gamma
        self._penalty: OrthonormalPenalty | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the layers, and at the optimizer."""
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                "with fp16 and max_grad_norm=0 the gradients are still multiplied by the loss scale when callbacks see "
                "them; set max_grad_norm (1.0 is the authors'), or train in bf16"
            )
        optimizer = kwargs.get("optimizer")
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self._penalty = OrthonormalPenalty(
            kwargs["model"],
            gamma=self.gamma,
            lr=args.learning_rate,
            optimizer=inner if isinstance(inner, torch.optim.Optimizer) else None,
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient."""
        assert self._penalty is not None
        self._penalty.add_gradient()
