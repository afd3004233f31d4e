"""Learning from the Undesirable in the stock ``transformers.Trainer``, and in trainers that inherit from it (TRL's).

Needs the extra: ``pip install "regularized[huggingface]"``.
"""

from typing import Any

from regularized.fine_tuning.lfu.regularizer import LfU

try:
    import transformers
except ModuleNotFoundError as _error:
    if _error.name != "transformers":
        raise
    raise ImportError(
        'regularized.fine_tuning.lfu.huggingface needs transformers: pip install "regularized[huggingface]"'
    ) from _error

__all__ = ["LfUCallback"]


class LfUCallback(transformers.TrainerCallback):
    """Adds the penalty's gradient just before each optimizer step of a trainer that computes its own loss.

    The trainer clips before that; give it ``max_grad_norm=0`` and LfU ``clip_norm=1.0`` to bound both together.

    Args:
        lfu: made for the model that is trained, after its adapters are on it.

    Raises:
        ImportError: transformers is not installed.
        ValueError: at the start of training, with ``fp16=True``: the gradient may still be scaled where the callback is
            asked. Use ``bf16=True``.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> callback = LfUCallback(LfU(model, layers=["1"]))  # Trainer(model, args, ..., callbacks=[callback])
    """

    def __init__(self, lfu: LfU) -> None:
        self.lfu = lfu

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cannot be right."""
        if args.fp16:
            raise ValueError("LfUCallback does not work with fp16=True, whose gradients are scaled; use bf16=True")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the forward passes of this optimizer step."""
        if self.lfu.strength != 0:
            self.lfu.listen()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All micro-batches are back-propagated: add the penalty's gradient."""
        self.lfu.backward()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave no hook on the model."""
        self.lfu.reset()
