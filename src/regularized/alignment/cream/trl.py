"""The training half of a round by TRL's DPO trainer: its data loading, mixed precision, PEFT, logging and checkpoints.

:class:`~regularized.alignment.cream.CREAM` collects the pairs with the log-probabilities of their reference; the
trainer takes both, so it runs no reference model and no pass of its own over the data::

    pairs = cream.collect(prompts)
    trainer = cream_trainer(cream.policy, pairs, cream.reference_log_probs, args=DPOConfig(...), processing_class=...)
    trainer.train()
    cream.finish_round()

It needs ``pip install "regularized[alignment]"``; TRL is loaded at the first call.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from regularized.alignment.cream.loss import ConsistencyDPOLoss
from regularized.alignment.cream.pairs import PreferencePairs

__all__ = ["cream_trainer", "pair_dataset"]

_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", "consistency"]

# Settings of DPOConfig that change the loss, with the only values that leave it CREAM's.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "loss_type": ("sigmoid", ["sigmoid"]),
    "f_divergence_type": ("reverse_kl",),
    "label_smoothing": (0.0,),
    "ld_alpha": (None,),
    "use_weighting": (False,),
    "sync_ref_model": (False,),
}


def pair_dataset(pairs: PreferencePairs, reference_log_probs: Tensor) -> Any:
    """Pairs as a ``datasets.Dataset`` of TRL's form, tokenized, with the reference's log-probabilities and soft label.

    Args:
        pairs: K pairs.
        reference_log_probs: (K, 2), chosen first.
    """
    datasets: Any = import_module("datasets")
    rows = []
    labels, references = pairs.consistency.tolist(), reference_log_probs.tolist()
    for tokens, mask, reference, label in zip(pairs.tokens.cpu(), pairs.mask.cpu(), references, labels, strict=True):
        start = int(mask[0].int().argmax())
        chosen, rejected = (row[scored].tolist() for row, scored in zip(tokens, mask, strict=True))
        values = [tokens[0, :start].tolist(), chosen, rejected, *reference, label]
        rows.append(dict(zip(_COLUMNS, values, strict=True)))
    return datasets.Dataset.from_list(rows)


def cream_trainer(
    model: nn.Module,
    pairs: PreferencePairs,
    reference_log_probs: Tensor,
    *,
    args: Any,
    processing_class: Any,
    **options: Any,
) -> Any:
    """TRL's ``DPOTrainer`` with a soft label for each pair.

    Args:
        model: M_t, trained in place. TRL switches its dropout off.
        pairs: of :meth:`CREAM.collect <regularized.alignment.cream.CREAM.collect>`.
        reference_log_probs: (K, 2), its ``reference_log_probs``.
        args: a ``trl.DPOConfig``. ``beta``, ``learning_rate`` and all that concerns training count; what would change
            the loss must be left alone.
        processing_class: the tokenizer; it pads, and is saved with the model.
        options: further ones of TRL's trainer, such as ``callbacks``.

    Returns:
        The trainer; ``train()`` is the training half of the round, and it resumes from its own checkpoints.

    Raises:
        ValueError: a setting would change the loss; or pairs are longer than ``max_length``, where TRL would cut them
            and the reference's log-probabilities would be those of other responses.
    """
    for name, allowed in _FIXED.items():
        if (given := getattr(args, name)) not in allowed:
            raise ValueError(f"{name}={given!r} would change the loss, which is CREAM's; leave it at {allowed[0]!r}")
    longest = int(pairs.mask.any(dim=1).any(dim=0).nonzero()[-1]) + 1
    if args.max_length is not None and longest > args.max_length:
        raise ValueError(
            f"the longest pair has {longest} tokens and max_length={args.max_length} would cut it; raise it (None cuts "
            "nothing), or sample with fewer max_new_tokens"
        )
    args = copy.copy(args)
    args.precompute_ref_log_probs = True
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer_class, collator_class = _classes()
    return trainer_class(
        model=model,
        args=args,
        train_dataset=pair_dataset(pairs, reference_log_probs),
        processing_class=processing_class,
        data_collator=collator_class(pad_token_id=tokenizer.pad_token_id),
        **options,
    )


@cache
def _classes() -> tuple[Any, Any]:
    """The trainer and its collator, made of TRL's."""
    trl: Any = import_module("trl")
    collators: Any = import_module("trl.trainer.dpo_trainer")

    class CREAMTrainer(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenized as it was sampled

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = list(_COLUMNS)

        def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
            chosen, rejected = model(**given, labels=labels, fused_lm_head=True).log_probs.sum(dim=1).chunk(2)
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            loss = ConsistencyDPOLoss(beta=self.beta)(chosen, rejected, *reference, consistency=inputs["consistency"])
            better, worse = (
                self.beta * (now - then).detach() for now, then in zip((chosen, rejected), reference, strict=True)
            )
            for name, values in {
                "rewards/chosen": better,
                "rewards/rejected": worse,
                "rewards/margins": better - worse,
                "rewards/accuracies": (better > worse).float(),
                "logps/chosen": chosen.detach(),
                "logps/rejected": rejected.detach(),
                "consistency": inputs["consistency"],
            }.items():
                mean = self.accelerator.gather_for_metrics(values).mean()
                self._metrics["train" if self.model.training else "eval"][name].append(mean)
            return (loss, model(**given)) if return_outputs else loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            """As TRL's; metrics stay on their device until they are logged."""
            for kept in self._metrics.values():
                for name, values in kept.items():
                    kept[name] = [float(value) for value in values]
            super().log(logs, start_time)

    class Collator(collators.DataCollatorForPreference):  # type: ignore[misc]
        def torch_call(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = super().torch_call(list(examples))
            return batch | {"consistency": torch.tensor([example["consistency"] for example in examples])}

    return CREAMTrainer, Collator
