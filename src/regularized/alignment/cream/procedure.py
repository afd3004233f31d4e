"""The self-rewarding loop: sample, rank twice, pair, train; round after round, and resumable anywhere.

With the symbols of :mod:`~regularized.alignment.cream.loss`, round t does::

    collect   Y = N samples of M_t for each prompt
              r = log pi_t(Y) - log pi_0(Y)
              r' = log pi_{t-1}(Y) - log pi_0(Y)             in round 1, where M_{t-1} is M_0: log pi_0(Y) / |Y|
              c = agreement of both rankings;  y+, y- = argmax r, argmin r;  C = mean of c
    train     M_{t+1} from M_t by DPO with soft label C against M_t

Three forward passes of each response, and no more: those of M_t are at once the reference of the training.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.alignment.cream.consistency import Agreement
from regularized.alignment.cream.loss import ConsistencyDPOLoss
from regularized.alignment.cream.pairs import Label, PreferencePairs, build_preference_pairs
from regularized.alignment.cream.rewards import Judge, length_normalised, likelihood_ratio
from regularized.alignment.sampling import Responses, Sampler
from regularized.alignment.sequence_log_probs import next_token_logits, sequence_log_probs
from regularized.mechanisms.frozen import Frozen, check_apart
from regularized.mechanisms.ranges import Choice, allowed, count, positive
from regularized.training.data import TensorData
from regularized.training.identity import fingerprint
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part
from regularized.training.progress import Coefficient, Progress, cosine, warmup
from regularized.training.randomness import mix, preserved, seed_all
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["CREAM", "Round"]

Reference: TypeAlias = Literal["round", "base"]

_STATE = ("round", "policy", "previous", "history", "base_is", "_collected", "_pairs", "_optimizers", "_epochs")


@dataclass(frozen=True, slots=True)
class Round:
    """What a round was.

    Args:
        round: its number, from 1.
        pairs: pairs that were trained on.
        dropped: prompts that gave none.
        agreement: mean agreement of the rankings by M_t and M_{t-1}, over the pairs.
        consistency: mean soft label.
        loss: mean loss of the last epoch.
    """

    round: int
    pairs: int
    dropped: int
    agreement: float
    consistency: float
    loss: float


class CREAM:
    """Self-rewarding rounds whose preferences count as far as two successive models rank alike.

    Args:
        policy: M_1, trained in place: a causal model from ids (B, T) to logits (B, T, V), or to an object that has
            them, as in transformers. Parameters that need no gradient stay as they are.
        base: M_0, what the policy was fine-tuned from. It is frozen, in place, and never changes.
        sample: draws responses, such as ``partial(sample_responses, count=5, max_new_tokens=64, end=...)``.
        optimizer: factory, called with the trained parameters at the start of each round.
        consistency: what the soft label is: ``"mean"`` agreement of all pairs (default, the paper's main form), that of
            ``"each"`` pair, or a number: 1 is plain self-rewarding.
        method: how agreement is measured; default ``"kendall"``.
        judge: rewards from elsewhere; default None, the model's own.
        reference: what a preference is measured against: ``"round"``, the model that the round began with (default, the
            authors' code), or the ``"base"``.
        beta: default 0.1 (the authors' code).
        epochs: passes over the pairs of a round; default 1 (the same).
        batch_size: pairs in a step; default 8 (ours; the authors' README has 4 on each of 8 devices).
        schedule: factor on the learning rate over a round; default a warm-up over a tenth and half a cosine (the same).
        max_norm: of the gradient; default 1 (the same), None clips nothing.
        chunk: prompts that are sampled and ranked at a time; default 64. With :meth:`collect` one can go on behind
            each of them.
        seed: of all that is drawn.

    Attributes:
        policy: the model.
        round: number of the round that comes next, or is under way; from 1.
        history: :class:`Round` of each that is done.

    Raises:
        ValueError: an option is out of range; policy and base are one model, or share weights.

    Examples:
        >>> from functools import partial
        >>> from regularized.alignment.sampling import sample_responses
        >>> from regularized.evidence.language_models import small_lm
        >>> cream = CREAM(
        ...     small_lm(1, 8, width=16, layers=1, heads=2),
        ...     small_lm(0, 8, width=16, layers=1, heads=2),
        ...     sample=partial(sample_responses, count=4, max_new_tokens=3),
        ...     optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01),
        ... )
        >>> prompts = [torch.tensor([k % 8, k // 8]) for k in range(32)]
        >>> [cream.run_round(prompts).round for _ in range(2)]
        [1, 2]
    """

    @allowed(
        reference=Choice("round", "base"),
        epochs=count(1),
        batch_size=count(1),
        max_norm=positive("the largest norm of a gradient").or_none("no clipping"),
        chunk=count(1),
    )
    def __init__(
        self,
        policy: nn.Module,
        base: nn.Module,
        *,
        sample: Sampler,
        optimizer: Callable[..., torch.optim.Optimizer],
        consistency: Label = "mean",
        method: Agreement = "kendall",
        judge: Judge | None = None,
        reference: Reference = "round",
        beta: float = 0.1,
        epochs: int = 1,
        batch_size: int = 8,
        schedule: Coefficient | None = None,
        max_norm: float | None = 1.0,
        chunk: int = 64,
        seed: int = 0,
    ) -> None:
        check_apart(policy, base, names=("policy", "base"))
        self.policy: nn.Module = policy
        self.base: Frozen = Frozen(base)
        # M_{t-1} while a round is collected, M_t while it is trained.
        self.previous: Frozen = Frozen(copy.deepcopy(policy))
        self.loss: ConsistencyDPOLoss = ConsistencyDPOLoss(beta=beta)
        self.sample = sample
        self.consistency: Label = consistency
        self.method: Agreement = method
        self.judge = judge
        self.reference: Reference = reference
        self.epochs = epochs
        self.batch_size = batch_size
        self.schedule: Coefficient = warmup(cosine(), 0.1) if schedule is None else schedule
        self.max_norm = max_norm
        self.chunk = chunk
        self.seed = seed
        self.base_is: str = fingerprint(base.state_dict().values())
        self.round: int = 1
        self.history: list[dict[str, Any]] = []
        self._optimizer = optimizer
        self._collected: dict[str, Any] = {}
        self._pairs: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        """Optimizer and epochs of a round; those of the one before are over."""
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self._optimizers = Optimizers([self._optimizer(trained)], schedule=self.schedule, names=["policy"])
        self._epochs = Epochs(self.seed)

    # -- a round --------------------------------------------------------------------------------

    def run_round(self, prompts: Sequence[Tensor], *, after_step: Callable[[], object] | None = None) -> Round:
        """The round that comes next, or what is left of the one under way.

        Args:
            prompts: tensors (n,) of ids; a round should have prompts of its own.
            after_step: called after each chunk of prompts and each training step: :meth:`state_dict` may be saved
                there. When it raises, the next call goes on behind that step.

        Returns:
            What the round was.
        """
        self.collect(prompts, after_chunk=after_step)
        self.train(after_step=after_step)
        return self.finish_round()

    def collect(self, prompts: Sequence[Tensor], *, after_chunk: Callable[[], object] | None = None) -> PreferencePairs:
        """The first half: sample responses, rank them twice, build pairs. Once it is done it is not done again.

        Args:
            prompts: tensors (n,) of ids.
            after_chunk: called after each chunk; when it raises, the next call goes on behind it.

        Returns:
            The pairs, for :meth:`train` or for a trainer of your own, such as
            :func:`~regularized.alignment.cream.trl.cream_trainer`.

        Raises:
            ValueError: the round was begun with other prompts; or no prompt gives a pair.
        """
        if self._pairs:
            return self.pairs
        these = fingerprint([*prompts, torch.tensor([len(prompts), self.chunk])])
        if self._collected.setdefault("prompts", these) != these:
            raise ValueError(
                f"round {self.round} was begun with other prompts, or another chunk; go on with those, or load the "
                "state of the end of a round, where prompts may change"
            )
        chunks: list[dict[str, Tensor]] = self._collected.setdefault("chunks", [])
        for number in range(len(chunks), -(-len(prompts) // self.chunk)):
            some = prompts[number * self.chunk : (number + 1) * self.chunk]
            with preserved():
                seed_all(mix(self.seed, self.round, number))
                chunks.append(self._rank(some))
            if after_chunk is not None:
                after_chunk()
        tokens, mask = (_padded([chunk[name] for chunk in chunks]) for name in ("tokens", "mask"))
        now, before, reference = (
            torch.cat([chunk[name] for chunk in chunks]) for name in ("now", "before", "reference")
        )
        pairs = build_preference_pairs(
            Responses(tokens, mask), now, before, consistency=self.consistency, method=self.method
        )
        self._pairs = {"pairs": pairs.state_dict(), "reference": pairs.of(reference)}
        self._collected = {"prompts": these}
        self.previous.module.load_state_dict(self.policy.state_dict())  # M_t: the next round's M_{t-1}
        return pairs

    @property
    def pairs(self) -> PreferencePairs:
        """The pairs of the round under way.

        Raises:
            RuntimeError: they are not collected yet.
        """
        if not self._pairs:
            raise RuntimeError(f"the pairs of round {self.round} are not collected yet; call collect(prompts) first")
        return PreferencePairs(**self._pairs["pairs"])

    @property
    def reference_log_probs(self) -> Tensor:
        """(K, 2) log-probabilities of the pairs' responses under the reference."""
        _ = self.pairs
        reference: Tensor = self._pairs["reference"]
        return reference

    def _rank(self, prompts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Responses to a chunk of prompts, both rewards, and the reference's log-probabilities, on the CPU."""
        responses = self.sample(self.policy, prompts)
        first = responses.first_identical()  # equal responses get equal scores, to the last bit

        def scores(model: nn.Module) -> Tensor:
            return self._score(model, responses).gather(1, first)

        policy_scores = scores(self.policy)
        needs_base = self.judge is None or self.reference == "base"
        base_scores = scores(self.base.module) if needs_base else policy_scores
        if self.judge is not None:
            with torch.no_grad():
                now = self.judge(self.policy, responses, round=self.round)
                earlier = self.base if self.round == 1 else self.previous
                before = self.judge(earlier.module, responses, round=self.round - 1)
        else:
            now = likelihood_ratio(policy_scores, base_scores)
            if self.round == 1:
                before = length_normalised(base_scores, responses.lengths)
            else:
                before = likelihood_ratio(scores(self.previous.module), base_scores)
        found = {
            "tokens": responses.tokens,
            "mask": responses.mask,
            "now": now,
            "before": before,
            "reference": policy_scores if self.reference == "round" else base_scores,
        }
        return {name: tensor.detach().cpu() for name, tensor in found.items()}

    @torch.no_grad()
    def _score(self, model: nn.Module, responses: Responses) -> Tensor:
        """(P, N) log-probabilities, in evaluation mode, some at a time: without a graph more fit than in training."""
        training = model.training
        model.eval()
        size = 8 * self.batch_size
        scores = [
            sequence_log_probs(next_token_logits(model, tokens), tokens, mask)
            for tokens, mask in zip(
                responses.tokens.flatten(0, 1).split(size),
                responses.mask.flatten(0, 1).split(size),
                strict=True,
            )
        ]
        model.train(training)
        return torch.cat(scores).view(responses.mask.shape[:2])

    def train(self, *, after_step: Callable[[], object] | None = None) -> list[float]:
        """The second half: DPO with soft labels on the collected pairs.

        Args:
            after_step: called after each step; when it raises, the next call goes on behind it.

        Returns:
            Mean loss of each epoch that was made in this call.
        """
        pairs = self.pairs
        data = TensorData(
            {"tokens": pairs.tokens, "mask": pairs.mask},
            extras={"reference": self.reference_log_probs, "consistency": pairs.consistency},
            batch_size=self.batch_size,
            seed=mix(self.seed, self.round),
        )
        self.policy.train()
        part = Part(data, self.training_step, stream=(self.round,))
        losses = []
        for (mean,) in self._epochs.run([part], until=self.epochs, after_step=after_step):
            losses.append(float(mean))
            self._pairs["loss"] = losses[-1]
        return losses

    def training_step(self, batch: Batch, *, progress: Progress) -> Tensor:
        """One step on a batch of pairs, chosen and rejected in one pass.

        Args:
            batch: inputs ``tokens`` and ``mask`` (B, 2, T) on the CPU, extras ``reference`` (B, 2) and ``consistency``.
            progress: position in the round.

        Returns:
            The loss, detached.
        """
        device = next(self.policy.parameters()).device
        inputs: Any = batch.inputs
        tokens, mask = inputs["tokens"].flatten(0, 1), inputs["mask"].flatten(0, 1)
        width = int(mask.any(dim=0).nonzero()[-1]) + 1  # on the CPU: nobody waits for a device
        tokens, mask = tokens[:, :width].to(device), mask[:, :width].to(device)
        chosen, rejected = (
            sequence_log_probs(next_token_logits(self.policy, tokens), tokens, mask).view(-1, 2).unbind(1)
        )
        reference_chosen, reference_rejected = batch.extras["reference"].to(device).unbind(1)
        loss: Tensor = self.loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            consistency=batch.extras["consistency"].to(device),
        )
        self._optimizers[0].zero_grad()
        loss.backward()
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_([p for p in self.policy.parameters() if p.grad is not None], self.max_norm)
        self._optimizers.step(progress=progress, loss=loss)
        return loss.detach()

    def finish_round(self) -> Round:
        """End the round: its pairs and its optimizer are let go, and the next one may begin.

        Call it yourself after :meth:`collect` and a trainer of your own; :meth:`run_round` does.
        """
        pairs = self.pairs
        done = Round(
            round=self.round,
            pairs=len(pairs),
            dropped=pairs.dropped,
            agreement=float(pairs.agreement.mean()),
            consistency=float(pairs.consistency.mean()),
            loss=float(self._pairs.get("loss", float("nan"))),
        )
        self._optimizers.settle()
        self.history.append(asdict(done))
        self.round += 1
        self._collected, self._pairs = {}, {}
        self._begin()
        return done

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on: between rounds, between chunks of prompts, and between steps.

        Of the base only a checksum is in it: it is given anew.
        """
        return state_of(self, *_STATE)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, exactly.

        Raises:
            ValueError: the state is of another procedure, or was made beside another base.
        """
        if state.get("base_is", self.base_is) != self.base_is:
            raise ValueError(
                "the state was made beside another base model; its rewards would be others. Give the same base"
            )
        restore(self, state, *_STATE)


def _padded(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks (P, N, T) of several widths, one below the other."""
    width = max(block.shape[2] for block in blocks)
    return torch.cat([nn.functional.pad(block, (0, width - block.shape[2])) for block in blocks])
