"""Training of a top-k sparse autoencoder: pre-training with a falling k, and fine-tuning that revives dead features.

Wu et al. 2025 (arXiv 2502.14133), see :mod:`regularized.fine_tuning.sae_regularization.autoencoder` for symbols.

Pre-training begins with many features a row and lowers their number linearly: a feature that is seldom among the 20
largest is among the 200 largest at the start, and so gets gradient. Fine-tuning on a task finds, once an epoch, the
features that never fire on the task's texts, and lets them reconstruct what the live ones leave over.

Paper and code differ: the code also has an auxiliary loss in pre-training, with coefficient 0; it is left out here. Its
gradients are summed over 512 texts before a step, ours are means; under Adam that differs by the epsilon alone.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE, check_k, usable_rows
from regularized.mechanisms.ranges import allowed, at_least, count
from regularized.training.data import TensorData, as_source
from regularized.training.sharded import check_whole
from regularized.training.step import Batch

__all__ = ["SAETraining", "falling_k"]

_FUSED = ("cpu", "cuda")  # on these torch updates weights and moments in one pass


def falling_k(step: int, *, start: int, end: int, steps: int) -> int:
    """Features of a row at a step: from ``start`` linearly to ``end`` within ``steps`` steps, then ``end``.

    Args:
        step: optimizer steps done, from 0.
        start: k that the schedule falls from; already the first step is one interval below it, as in the code.
        end: k at the end.
        steps: length of the fall; 0 gives ``end`` at once.

    Examples:
        >>> [falling_k(step, start=200, end=20, steps=4) for step in range(6)]
        [155, 110, 65, 20, 20, 20]
    """
    if step + 1 >= steps:
        return end
    return max(end, int(start - (start - end) * (step + 1) / steps))


def _official_adam(parameters: list[nn.Parameter]) -> torch.optim.Adam:
    fused = all(p.device.type in _FUSED for p in parameters)
    return torch.optim.Adam(parameters, lr=1e-3, eps=6.25e-10, fused=fused)


class SAETraining:
    """Pre-training or task fine-tuning of a :class:`~regularized.fine_tuning.sae_regularization.TopKSAE`.

    A step costs one dense product (B x C x d) and B x k x d for decoder and gradients; nothing is read back from the
    device but the loss, once an epoch. Fine-tuning adds a pass over the data at the start of each epoch.

    Args:
        sae: the autoencoder; its parameters are made trainable. Freeze it afterwards: ``sae.requires_grad_(False)``.
        optimizer: factory; default Adam with learning rate 1e-3 and eps 6.25e-10 (official), in one fused pass over the
            weights where torch has it. Fine-tuning: 5e-5.
        k_start: features of a row at the start; default ``min(200, C)`` (official 200). None with fine-tuning.
        k_steps: steps until k has fallen to the autoencoder's own; default half of the first epoch's (official).
        dead_weight: 0 is pre-training; above 0 fine-tuning with that share of the dead features' loss, official 0.1,
            with the autoencoder's own k throughout. Default 0.
        seed: of the order of the rows; default 0.

    Attributes:
        sae: the autoencoder.
        epoch: epochs done.
        steps: optimizer steps done: the position of the k schedule.

    Raises:
        ValueError: an autoencoder without k; ``k_start`` below its k, above C, or together with fine-tuning; a negative
            ``dead_weight`` or ``k_steps``; weights in shards.
        FloatingPointError: the loss of an epoch is not finite.

    Examples:
        >>> from functools import partial
        >>> x = torch.randn(256, 8)
        >>> training = SAETraining(TopKSAE(8, 32, k=2), k_start=8)
        >>> records = training.fit(x, epochs=3, batch_size=64)
        >>> records[-1]["loss"] < records[0]["loss"], records[-1]["k"]
        (True, 2)
        >>> tuning = SAETraining(training.sae, optimizer=partial(torch.optim.Adam, lr=5e-5), dead_weight=0.1)
        >>> sorted(tuning.fit(x, epochs=1, batch_size=64)[0])
        ['dead', 'k', 'loss']
    """

    @allowed(
        dead_weight=at_least(0.0, remedy="the authors use 0.1"), k_steps=count(0).or_none("half of the first epoch")
    )
    def __init__(
        self,
        sae: TopKSAE,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        k_start: int | None = None,
        k_steps: int | None = None,
        dead_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        if sae.k is None:
            raise ValueError("SAETraining needs a top-k autoencoder, this one has k=None; it can be used as it is")
        if k_start is not None:
            check_k(k_start, sae.num_features)
            if dead_weight:
                raise ValueError("k_start belongs to pre-training; leave it out where dead_weight is above 0")
            if k_start < sae.k:
                raise ValueError(f"k falls from k_start to the autoencoder's k={sae.k}; got k_start={k_start}")
        check_whole(sae.parameters(), "the autoencoder")
        self.sae: TopKSAE = sae.requires_grad_(True).train()
        self.optimizer: torch.optim.Optimizer = (_official_adam if optimizer is None else optimizer)(
            list(sae.parameters())
        )
        self.k_start: int = max(sae.k, min(200, sae.num_features)) if k_start is None else k_start
        self.k_steps = k_steps
        self.dead_weight = dead_weight
        self.seed = seed
        self.epoch: int = 0
        self.steps: int = 0

    @property
    def k(self) -> int:
        """Features of a row in the next step."""
        assert self.sae.k is not None
        if self.dead_weight or self.k_steps is None:
            return self.sae.k
        return falling_k(self.steps, start=self.k_start, end=self.sae.k, steps=self.k_steps)

    def training_step(self, x: Tensor, *, dead: Tensor | None = None, dead_weight: float | None = None) -> Tensor:
        """One optimizer step.

        Args:
            x: (B, d) embeddings on the autoencoder's device.
            dead: (C,) bool, for fine-tuning; default None is a step of pre-training.
            dead_weight: 0 where no feature is dead; default the training's own.

        Returns:
            Mean loss, detached, on the device.
        """
        sae = self.sae
        if dead is None:
            loss = sae.loss(x, k=self.k, count=True)
        else:
            share = self.dead_weight if dead_weight is None else dead_weight
            loss = sae.fine_tuning_loss(x, dead, dead_weight=share, count=True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    def fit(self, data: Any, *, epochs: int, batch_size: int = 512) -> list[dict[str, float]]:
        """Train until ``epochs`` epochs are done in all.

        Restored by :meth:`load_state_dict` it goes on where it stopped and ends bit for bit (CPU) as if it never had
        been.

        Args:
            data: (N, d) tensor of embeddings, or what :func:`~regularized.training.data.as_source` takes.
            epochs: epochs in all; the authors pre-train for 5 and fine-tune for 5 or 40.
            batch_size: rows of a step where ``data`` is a tensor; default 512 (the authors: 512 texts of at most 256
                tokens).

        Returns:
            For each epoch of this call the mean ``loss``, the last ``k``, and the number of ``dead`` features: those of
            fine-tuning at the start of the epoch, 0 in pre-training.
        """
        if isinstance(data, Tensor):
            data = TensorData(usable_rows(data), batch_size=batch_size, seed=self.seed)
        source = as_source(data, seed=self.seed)
        if self.k_steps is None:
            self.k_steps = len(source) // 2
        device = self.sae.encoder.device
        records = []
        while self.epoch < epochs:
            dead = self._dead(source) if self.dead_weight else None
            number = 0 if dead is None else int(dead.sum())
            share = self.dead_weight if number else 0.0  # nobody can reconstruct what the live ones leave over
            last_k, total = self.k, torch.zeros((), device=device)
            for batch in source.batches(self.epoch):
                last_k = self.k
                x = Batch.of(batch).inputs.to(device, non_blocking=True)
                total += self.training_step(x, dead=dead, dead_weight=share)
            loss = float(total) / len(source)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is not finite in epoch {self.epoch}; lower the learning rate, and look for rows that "
                    "are not finite (usable_rows)"
                )
            records.append({"loss": loss, "k": last_k, "dead": number})
            self.epoch += 1
        return records

    def _dead(self, source: Any) -> Tensor:
        dead = torch.ones_like(self.sae.fired, dtype=torch.bool)
        for batch in source.batches(self.epoch):
            dead &= self.sae.never_active(Batch.of(batch).inputs)
        return dead

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on: autoencoder with its counters, optimizer, position of epochs and schedule."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "steps": self.steps,
            "k_steps": self.k_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]
        self.steps = state["steps"]
        self.k_steps = state["k_steps"]
