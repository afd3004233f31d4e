"""Imitation and reward in one stage: a warm-up on demonstrations, then steps on both, whose mixture is learned."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from regularized.alignment.amft.controller import MetaWeightController
from regularized.alignment.amft.held_out import HeldOut
from regularized.alignment.amft.loss import imitation_loss, masked_mean, token_entropy, until_end
from regularized.alignment.amft.mixing import Mixer, Moved
from regularized.alignment.amft.ppo import PPO, ppo_losses
from regularized.alignment.amft.rollouts import (
    Critic,
    Pair,
    Reward,
    Sampler,
    completion_logits,
    evaluating,
    mean_entropy,
    pair_of,
    rewards_of,
    sample,
)
from regularized.mechanisms.ranges import allowed, count, positive
from regularized.training.data import Source, as_source
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Coefficient, Progress, Schedule, as_schedule
from regularized.training.randomness import mix as mix_seeds
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["AMFT"]

Validation: TypeAlias = Any
"""Held-out demonstrations, or a function of the policy that gives a loss: minus the utility."""

_STATE = ("policy", "critic", "controller", "optimizers", "epochs", "looks", "measured")
_MEASURED = ("imitation", "reward_loss", "reward", "entropy", "mu", "by_meta", "by_entropy")


class AMFT:
    """Fine-tuning on demonstrations and on a reward at once, with a learned weight between them.

    For ``warmup`` steps the policy imitates; then its entropy is measured, which becomes the target. Each further step
    imitates a batch of demonstrations, answers their prompts and is rewarded, and descends the mixture of both losses,
    whose weight the controller moves first. Answers are drawn anew for each step, so that the ratios of PPO are 1
    unless the sampler brings log-probabilities of another policy.

    A batch holds prompts of one length L, (B, L), and answers (B, T) that end with ``end``; what stands behind it does
    not count. The policy maps tokens to logits; a network that needs a mask of padding is wrapped so that it finds it.

    A step costs imitation, ``rollouts`` as many answers, and on one step of twenty the held-out gradient. One process.

    Args:
        policy: the network; trained in place.
        reward: from prompts (B, L) and answers (B, T) to rewards (B,), on the policy's device.
        optimizer: factory called with the parameters; paper: AdamW, rate 1e-6.
        end: token that ends an answer.
        length: the longest answer that is drawn, in tokens.
        controller: of the weight; default :class:`~regularized.alignment.amft.MetaWeightController` with its defaults;
            a :class:`~regularized.alignment.amft.ScheduledWeight` is the usual alternative.
        warmup: W, steps of imitation alone; default 50 (code).
        rollouts: answers to each prompt; default 8 (paper).
        ppo: settings of the loss on rewards.
        critic: a value function; default None compares answers to the same prompt with each other, which needs two.
        critic_optimizer: factory for its parameters; default ``optimizer``. Paper: AdamW, rate 5e-6.
        sampler: draws answers; default :func:`~regularized.alignment.amft.sample`.
        schedule: factor on the learning rates.
        clip_norm: of the mixture's gradient; default 1 (code). None does not clip.
        seed: of the order of the data, and of what is drawn; default 0.

    Attributes:
        policy: the network.
        controller: what mixes.
        last: what the last mixed step did to mu, see :class:`~regularized.alignment.amft.Moved`; None before it.

    Raises:
        ValueError: a setting is outside its range; one answer a prompt without a critic.

    Examples:
        >>> from functools import partial
        >>> from regularized.training.data import TensorData
        >>> policy = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
        >>> prompts = torch.randint(3, (64, 1))  # answer 0, 1, 2 with 3, 4, 5, and end with 6
        >>> answers = torch.cat([prompts + 3, torch.full_like(prompts, 6)], dim=1)
        >>> training = AMFT(
        ...     policy,
        ...     reward=lambda asked, given: ((given[:, 0] == asked[:, 0] + 3) & (given[:, 1] == 6)).float(),
        ...     optimizer=partial(torch.optim.Adam, lr=0.05),
        ...     end=6,
        ...     length=2,
        ...     warmup=4,
        ... )
        >>> data = TensorData(prompts, answers, batch_size=16)
        >>> records = training.fit(data, validation=(prompts[:16], answers[:16]), epochs=8)
        >>> sorted(records[-1])
        ['by_entropy', 'by_meta', 'entropy', 'imitation', 'mu', 'reward', 'reward_loss']
        >>> training.score(prompts) > 0.9
        True
    """

    @allowed(
        length=count(1, "the longest answer, in tokens"),
        warmup=count(0, "steps of imitation alone"),
        rollouts=count(1, "answers to each prompt"),
        clip_norm=positive().or_none("no clipping"),
    )
    def __init__(
        self,
        policy: nn.Module,
        *,
        reward: Reward,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        end: int,
        length: int,
        controller: Mixer | None = None,
        warmup: int = 50,
        rollouts: int = 8,
        ppo: PPO | None = None,
        critic: Critic | None = None,
        critic_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        sampler: Sampler | None = None,
        schedule: Coefficient = 1.0,
        clip_norm: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        if critic is None and rollouts < 2:
            raise ValueError(
                "without a critic answers are compared with others to the same prompt; give rollouts >= 2, or a Critic"
            )
        self.policy: nn.Module = policy
        self.reward: Reward = reward
        self.end: int = end
        self.length: int = length
        self.controller: Mixer = MetaWeightController() if controller is None else controller
        self.warmup: int = warmup
        self.rollouts: int = rollouts
        self.clip_norm: float | None = clip_norm
        self.seed: int = seed
        self.ppo: PPO = PPO() if ppo is None else ppo
        self.critic: Critic | None = critic
        self.sampler: Sampler = (
            partial(sample, length=length, end=end, per_prompt=rollouts) if sampler is None else sampler
        )
        self.parameters: list[nn.Parameter] = [p for p in policy.parameters() if p.requires_grad]
        optimizers, names = [optimizer(self.parameters)], ["the policy"]
        if critic is not None:
            critic.to(self.device)
            optimizers.append((critic_optimizer or optimizer)(list(critic.parameters())))
            names.append("the critic")
        self.schedule: Schedule = as_schedule(schedule, name="schedule")
        self.optimizers: Optimizers = Optimizers(optimizers, schedule=self.schedule, names=names)
        self.epochs: Epochs = Epochs(seed)
        self.looks: int = 0  # at the held-out data, which decides what is looked at next
        self.measured: bool = False  # whether the target entropy was
        self.last: Moved | None = None

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.epochs.done

    @property
    def steps(self) -> int:
        """Optimizer steps done, those of the warm-up included."""
        return self.optimizers.steps[0]

    # -- a step -----------------------------------------------------------------------------

    def training_step(self, batch: Any, *, progress: Progress, val_loss: Callable[[], Tensor] | None = None) -> Tensor:
        """One optimizer step: imitation alone during the warm-up, the mixture behind it.

        Behind the warm-up the controller must know its target entropy; :meth:`fit` sees to that.

        Args:
            batch: (prompts, answers), see :meth:`regularized.training.step.Batch.of`.
            progress: position in the training, for the learning rate and for a scheduled weight.
            val_loss: computes the held-out loss, for the meta-gradient.

        Returns:
            (8,) detached, on the device: 1 for a mixed step, and seven numbers of it that :meth:`fit` reports.

        Raises:
            ValueError: prompts and answers are not two matrices of equally many rows.
        """
        prompts, answers = self._pair(batch)
        if not self.policy.training:
            self.policy.train()
        if self.steps < self.warmup:
            return self._imitate(prompts, answers, progress)
        return self._mix(prompts, answers, progress, val_loss)

    def _imitate(self, prompts: Tensor, answers: Tensor, progress: Progress) -> Tensor:
        loss = self._imitation(prompts, answers)[0]
        self.optimizers[0].zero_grad()
        loss.backward()
        self._descend(loss, progress)
        return torch.stack([loss.new_zeros(()), loss.detach(), *[loss.new_zeros(())] * 6])

    def _mix(
        self, prompts: Tensor, answers: Tensor, progress: Progress, val_loss: Callable[[], Tensor] | None
    ) -> Tensor:
        imitate, explore = self.controller.needs(progress)
        nothing = torch.zeros((), device=prompts.device)
        sft = rl = None
        entropy = reward = nothing
        if imitate:
            sft, logits = self._imitation(prompts, answers)
            if not explore:
                entropy = masked_mean(token_entropy(logits.detach()), until_end(answers, self.end))
        if explore:
            rl, entropy, reward = self._reinforcement(prompts, progress)
        moved = self.controller.backward(
            sft=sft,
            rl=rl,
            params=self.parameters,
            entropy=entropy,
            val_loss=val_loss,
            lr=_rate(self.optimizers[0]) * self.schedule(progress),
            progress=progress,
        )
        self._descend(moved.loss, progress)
        self.last = moved
        values = (sft, rl, reward, entropy, moved.mu, moved.meta, moved.entropy)
        told = [nothing if value is None else value.detach().to(nothing) for value in values]
        return torch.stack([torch.ones_like(nothing), *told])

    def _imitation(self, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        logits = completion_logits(self.policy, prompts, answers)
        return imitation_loss(logits, answers, until_end(answers, self.end)), logits

    def _reinforcement(self, prompts: Tensor, progress: Progress) -> tuple[Tensor, Tensor, Tensor]:
        """L_RL, the entropy, and the mean reward; the value function learns on the way."""
        with torch.no_grad(), evaluating(self.policy):
            drawn = self.sampler(self.policy, prompts)
            rewards = rewards_of(self.reward, drawn.prompts, drawn.completions)
        losses = ppo_losses(
            self.policy,
            drawn,
            rewards,
            end=self.end,
            per_prompt=self.rollouts,
            critic=self.critic,
            settings=self.ppo,
        )
        if losses.values is not None:
            self.optimizers.minimise(losses.values, 1, progress=progress)
        return losses.policy, losses.entropy, rewards.mean()

    def _descend(self, loss: Tensor, progress: Progress) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizers.step(0, progress=progress, loss=loss)

    def _pair(self, batch: Any) -> Pair:
        return pair_of(batch, self.device)

    def _held_out(self, validation: Validation) -> Callable[[Batch], Callable[[], Tensor]]:
        """For a training batch, the function that computes the held-out loss."""
        if callable(validation) and not isinstance(validation, Source):
            return lambda batch: partial(self._look, lambda look: validation(self.policy))
        data = HeldOut(validation, pair=self._pair, loss=lambda *pair: self._imitation(*pair)[0], seed=self.seed)
        return lambda batch: partial(self._look, lambda look: data(look, self._pair(batch)))

    def _look(self, loss: Callable[[int], Tensor]) -> Tensor:
        self.looks += 1
        with evaluating(self.policy):
            return loss(self.looks - 1)

    # -- training ---------------------------------------------------------------------------

    def fit(
        self,
        demonstrations: Any,
        *,
        validation: Validation = None,
        epochs: int,
        after_epoch: Callable[["AMFT"], object] | None = None,
        after_step: Callable[["AMFT"], object] | None = None,
    ) -> list[dict[str, float]]:
        """Train until ``epochs`` epochs are done in all, the steps of the warm-up among them.

        Restored by :meth:`load_state_dict` it goes on where it stopped, and ends bit for bit (CPU) as if it had never
        been interrupted, also in the middle of an epoch.

        Args:
            demonstrations: batches of (prompts, answers): ``TensorData``, a ``DataLoader``, a list of batches.
            validation: held-out pairs in the same forms, or one pair (prompts, answers); a meta step looks at one
                batch, the next one at the next. Or a function of the policy that gives a loss, minus the utility.
                Needed for the meta-gradient alone.
            epochs: passes over the demonstrations, in all.
            after_epoch: called with this object after each epoch.
            after_step: called with this object after each step.

        Returns:
            For each epoch of this call means over its mixed steps: the losses ``imitation`` and ``reward_loss``, the
            ``reward`` and ``entropy`` of the answers, ``mu``, and what moved it, ``by_meta`` and ``by_entropy``. In an
            epoch of warm-up alone all but ``imitation`` are NaN.

        Raises:
            ValueError: a batch is no pair, or ``validation`` is missing on a meta step.
            NonFiniteLoss: a loss or gradient is not finite, a ``FloatingPointError``; the weights are those before it.

        Warns:
            UserWarning: the held-out data are those that are trained on.
        """
        source = as_source(demonstrations, seed=mix_seeds(self.seed, 0))
        held_out = None if validation is None else self._held_out(validation)

        def step(batch: Batch, *, progress: Progress) -> Tensor:
            self._pair(batch)
            if self.controller.uses_entropy and not self.measured and self.steps >= self.warmup:
                self.controller.set_target_entropy(mean_entropy(self.policy, source.batches(0), end=self.end))
                self.measured = True
            return self.training_step(batch, progress=progress, val_loss=held_out and held_out(batch))

        return fit_epochs(
            self, [Part(source, step)], until=epochs, record=_record, after_epoch=after_epoch, after_step=after_step
        )

    def answers(self, prompts: Tensor, *, greedy: bool = True) -> Tensor:
        """(N, T) an answer to each prompt.

        Args:
            prompts: (N, L).
            greedy: the most probable one (default), or one that is drawn.
        """
        asked = prompts.to(self.device)
        return sample(self.policy, asked, length=self.length, end=self.end, greedy=greedy).completions

    def score(self, prompts: Tensor, *, greedy: bool = True) -> float:
        """Mean reward of :meth:`answers`.

        Args:
            prompts: (N, L).
            greedy: as there.
        """
        answers = self.answers(prompts, greedy=greedy)
        return float(rewards_of(self.reward, prompts.to(answers.device), answers).mean())

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on: networks, optimizers, mu and its target, and the position.

        Raises:
            NonFiniteLoss: the last step, or a weight, is not finite.
            RuntimeError: a step was left half-way.
        """
        return state_of(self, *_STATE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, of a procedure built with the same settings.

        Raises:
            ValueError: parts of the state are missing, unknown, or of another procedure; nothing is changed then.
        """
        restore(self, state, *_STATE)


def _record(means: list[Tensor]) -> dict[str, float]:
    """What an epoch measured: the mean over its steps of imitation, and over its mixed steps of all else."""
    mixed, imitation, *rest = means[0].double().tolist()
    numbers = [value / mixed if mixed else float("nan") for value in rest]
    return dict(zip(_MEASURED, [imitation, *numbers], strict=True))


def _rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate that an optimizer was built with, before its schedule."""
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))
