"""Training by a plan of stages, with a state to go on from at any step."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regularized.generation.dreamid_omni.loss import OmniBatch, joint_flow_matching_loss
from regularized.generation.dreamid_omni.model import Conditions, SymmetricConditionalDiT
from regularized.generation.dreamid_omni.stages import ProgressivePlan
from regularized.mechanisms.ema import EMA
from regularized.mechanisms.ranges import allowed, between, count, positive, share
from regularized.training.optimizers import Optimizers
from regularized.training.progress import Coefficient, Progress
from regularized.training.randomness import mix
from regularized.training.state import restore, state_of

__all__ = ["OmniData", "OmniTraining"]

_STATE = ("settings", "model", "average", "optimizers", "done")


class OmniData(Protocol):
    """Where batches come from."""

    @property
    def tasks(self) -> Collection[str]:
        """The tasks that it can supply."""
        ...

    def sample(self, count: int, task: str, pairing: str, generator: torch.Generator) -> OmniBatch:
        """Draw so many clips of one task and one layout."""
        ...


class OmniTraining:
    """The three stages as one run.

    Everything that a step draws (batch, times, noise, dropped conditions) is a function of the seed and the step, so
    that a run that is restored goes on bit for bit (CPU).

    Args:
        model: the transformer.
        data: batches of the tasks of the plan.
        plan: the stages.
        optimizer: factory, called with the parameters.
        schedule: factor on the learning rate, a number or a function of
            :class:`~regularized.training.progress.Progress`; default 1.
        batch_size: clips a step; default 32 (paper).
        weights: lambda_v and lambda_a; default 1 and 1 (ours).
        dropout: share of the clips without text, and without references; default 0.1 (ours).
        shift: of the times of the noise; default 1.
        clip_norm: largest norm of the gradient; default 1 (ours).
        ema: share of the average that stays at a step, or None for no average; default 0.99 (ours).
        seed: of all that is drawn; default 0.

    Attributes:
        done: steps done.
        average: the averaged model, or None.

    Raises:
        ValueError: a setting outside its range, or the plan has a task that the data cannot supply.

    Examples:
        >>> from functools import partial
        >>> from regularized.generation.dreamid_omni import Stage, TalkingGlyphs
        >>> world = TalkingGlyphs()
        >>> plan = ProgressivePlan([Stage("in_pair", 1, {"r2av": 1}), Stage("cross_pair", 1, {"r2av": 1, "ra2v": 1})])
        >>> model = SymmetricConditionalDiT(world.config())
        >>> adam = partial(torch.optim.AdamW, lr=1e-3)
        >>> training = OmniTraining(model, world, plan, optimizer=adam, batch_size=4)
        >>> training.fit().shape, training.done
        (torch.Size([2, 3]), 2)
    """

    @allowed(
        batch_size=count(1),
        dropout=share(),
        shift=positive(),
        clip_norm=positive(infinity=True),
        ema=between(0.0, 1.0, "[)").or_none("no average"),
    )
    def __init__(
        self,
        model: SymmetricConditionalDiT,
        data: OmniData,
        plan: ProgressivePlan,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        schedule: Coefficient = 1.0,
        batch_size: int = 32,
        weights: tuple[float, float] = (1.0, 1.0),
        dropout: float = 0.1,
        shift: float = 1.0,
        clip_norm: float = 1.0,
        ema: float | None = 0.99,
        seed: int = 0,
    ) -> None:
        plan.check(data.tasks)
        self.model = model
        self.data = data
        self.plan = plan
        self.average: EMA | None = None if ema is None else EMA(model, decay=ema)
        self.optimizers: Optimizers = Optimizers(
            [optimizer(model.parameters())], schedule=schedule, names=("the transformer",)
        )
        self.batch_size = batch_size
        self.weights = weights
        self.dropout = dropout
        self.shift = shift
        self.clip_norm = clip_norm
        self.seed = seed
        self.done: int = 0
        rope = model.syn_rope
        positions = {"placing": rope.placing, "margin": rope.margin, "gamma": rope.gamma, "theta": rope.theta}
        self.settings: _Settings = _Settings({"plan": plan.settings(), "positions": positions, "seed": seed})

    @property
    def trained(self) -> SymmetricConditionalDiT:
        """What to sample from: the average, where there is one."""
        model = self.model if self.average is None else self.average.module
        assert isinstance(model, SymmetricConditionalDiT)
        return model

    def training_step(self) -> Tensor:
        """The next step of the plan.

        Returns:
            (3,) the loss, that of the video and that of the audio, detached, on the device.

        Raises:
            IndexError: the plan is over.
            NonFiniteLoss: the loss or a gradient is not finite.
        """
        stage, task = self.plan.at(self.done)
        generator = torch.Generator().manual_seed(mix(self.seed, self.done))
        batch = self.data.sample(self.batch_size, task, stage.pairing, generator)
        batch.check()
        device = next(self.model.parameters()).device
        parts = joint_flow_matching_loss(
            self.model,
            _to(batch, device),
            weights=self.weights,
            dropout=self.dropout,
            shift=self.shift,
            generator=generator,
        )
        self.optimizers[0].zero_grad()
        parts.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizers.step(progress=Progress(self.done, len(self.plan)), loss=parts.loss)
        if self.average is not None:
            self.average.update(self.model)
        self.done += 1
        return torch.stack([part.detach() for part in parts])

    def fit(self, *, until: int | None = None, after_step: Callable[["OmniTraining"], object] | None = None) -> Tensor:
        """Train until so many steps are done in all.

        Args:
            until: steps in all; default the whole plan. Schedules are always of the whole plan.
            after_step: called with this object after each step.

        Returns:
            (steps of this call, 3) losses on the CPU: of both streams, of the video, of the audio.

        Raises:
            NonFiniteLoss: a loss or gradient is not finite.
        """
        losses = []
        end = len(self.plan) if until is None else min(until, len(self.plan))
        while self.done < end:
            losses.append(self.training_step())
            if after_step is not None:
                after_step(self)
        self.optimizers.settle()
        return torch.stack(losses).cpu() if losses else torch.zeros(0, 3)

    def state_dict(self) -> dict[str, Any]:
        """Weights, average, optimizer, position, and what plan and positions it belongs to.

        Raises:
            NonFiniteLoss: the last step, or a weight, is not finite.
        """
        return state_of(self, *_STATE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`.

        Raises:
            ValueError: it belongs to another plan, other positions, another model or optimizer; nothing is changed.
        """
        restore(self, state, *_STATE)


class _Settings:
    """Plain values that a state must agree with."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def check_state(self, state: Mapping[str, Any], path: str) -> None:
        for name, value in self.values.items():
            if state.get(name) != value:
                raise ValueError(
                    f"{path}: {name} is {state.get(name)} in the state and {value} here; build the training as it was"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state, "settings")


def _to(batch: OmniBatch, device: torch.device) -> OmniBatch:
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            return tuple(map(moved, value))
        return value

    given = Conditions(*map(moved, batch.given))
    video, audio, mask_video, mask_audio = map(moved, (batch.video, batch.audio, batch.mask_video, batch.mask_audio))
    return OmniBatch(video, audio, given, mask_video, mask_audio)
