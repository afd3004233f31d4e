"""SaRA in transformers' own ``Trainer``: what its checkpoints lack.

Needs the extra: ``pip install "regularized[huggingface]"``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from regularized.fine_tuning.sara.term import SaRA
from regularized.training import checkpoint

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as _error:
    if _error.name != "transformers":
        raise
    raise ImportError(
        'regularized.fine_tuning.sara.huggingface needs transformers: pip install "regularized[huggingface]"'
    ) from _error

__all__ = ["SaraCallback"]

_NAME = "sara"  # .safetensors and .json, in each checkpoint


class SaraCallback(TrainerCallback):
    """Keeps what SaRA knows with each checkpoint, and brings it back when the run is resumed.

    ``transformers.Trainer`` saves the model and the optimizer; which entries are trained, and where the second
    selection stands, neither of them knows. It clips the gradients of the model alone: this clips the entries'. (In
    :class:`~regularized.training.huggingface.TermsTrainer` SaRA is a term, and needs no callback.)

    Args:
        sara: the object that was made of the model, bound to the optimizer that the trainer gets.

    Raises:
        ValueError: when training starts: the trainer's optimizer is not the one that was bound.
        CheckpointError: the checkpoint that is resumed was written without this callback.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(80, 80)
        >>> sara = SaRA(model, fraction=0.1, total_steps=10)
        >>> optimizer = sara.bind(torch.optim.AdamW(sara.parameters(), lr=1e-3))
        >>> arguments = {"optimizers": (optimizer, None), "callbacks": [SaraCallback(sara)]}  # of the Trainer
    """

    def __init__(self, sara: SaRA) -> None:
        self._sara = sara

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the optimizer, and go on from a checkpoint."""
        wrapped: Any = kwargs.get("optimizer")
        optimizer: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)  # accelerate's wrapper
        self._sara.bind(optimizer)
        if state.global_step:
            self._sara.load_state_dict(checkpoint.load(_folder(args, state), _NAME))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip, as the arguments say."""
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self._sara.parameters(), args.max_grad_norm)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state beside the model's."""
        if state.is_world_process_zero:
            checkpoint.write_part(_folder(args, state), _NAME, self._sara.state_dict())


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Of transformers' checkpoint at this step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
