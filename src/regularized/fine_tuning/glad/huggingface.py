"""GLAD in transformers' ``Trainer``. The mixin itself needs torch alone."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from regularized.fine_tuning.glad.optimizer import GLAD

__all__ = ["SteeredTraining"]


class SteeredTraining:
    """Mixin that lets ``Trainer``, which gives an optimizer no closure, train with GLAD::

        class SteeredTrainer(SteeredTraining, transformers.Trainer): ...

        optimizer = GLAD(torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4))
        SteeredTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()

    The micro-batches of an optimizer step are kept until the last one is there; then all are passed twice. Everything
    else is transformers' own: schedule, clipping, mixed precision, DDP, logs, checkpoints. Do not combine it with a
    trainer that overrides ``training_step`` and counts its calls.

    Args:
        args: whatever the trainer takes.
        kwargs: the same, by name.

    Raises:
        TypeError: while training, the trainer's optimizer is not a :class:`~regularized.fine_tuning.glad.GLAD`.

    Examples:
        >>> import transformers
        >>> class SteeredTrainer(SteeredTraining, transformers.Trainer):
        ...     pass
    """

    args: Any
    accelerator: Any
    optimizer: Any
    current_gradient_accumulation_steps: int
    _prepare_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._window: list[Any] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep the micro-batch; with the last one of an optimizer step, both passes over all of them.

        Args:
            model: the model, in its wrapper where there is one.
            inputs: the micro-batch.
            num_items_in_batch: given on to transformers.

        Returns:
            The loss of the optimizer step with its last micro-batch, before that 0.
        """
        self._window.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window = self._window[
            -self.current_gradient_accumulation_steps :
        ]  # without those of a step that was broken off
        self._window = []
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # in Accelerate's wrapper
        if not isinstance(optimizer, GLAD):
            raise TypeError(
                f"SteeredTraining needs a GLAD optimizer, got {type(optimizer).__name__}; give the trainer "
                "optimizers=(GLAD(torch.optim.AdamW(...)), None)"
            )
        one_pass = super().training_step  # type: ignore[misc]

        def closure() -> Tensor:
            losses = []
            for number, batch in enumerate(window, start=1):
                with nullcontext() if number == len(window) else self.accelerator.no_sync(model):
                    losses.append(one_pass(model, dict(batch), num_items_in_batch))
            return torch.stack(losses).sum()

        loss: Tensor = optimizer.backward(closure)
        return loss
