"""The distillation: two networks that are trained in turn, and kept and forgotten labels in one batch.

:mod:`regularized.unlearning.score_forgetting.loss` has the symbols.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_value_

from regularized.mechanisms.ema import EMA, Decay
from regularized.mechanisms.frozen import constant_parameters
from regularized.mechanisms.ranges import allowed, at_least, between, count, finite, positive
from regularized.training.finite import NonFiniteLoss, PendingFlags
from regularized.training.identity import fingerprint
from regularized.training.optimizers import Optimizers
from regularized.training.progress import Coefficient, Progress
from regularized.training.randomness import mix, preserved, seed_all
from regularized.training.state import restore, state_of
from regularized.unlearning.score_forgetting.diffusion import ConditionalDiffusion, OneStepGenerator
from regularized.unlearning.score_forgetting.labels import LabelSampler
from regularized.unlearning.score_forgetting.loss import eps_matching_loss, sid_generator_loss
from regularized.unlearning.score_forgetting.probe import frozen, probe_teacher

__all__ = ["Losses", "ScoreForgettingDistillation"]

OptimizerFactory: TypeAlias = Callable[[Iterable[Parameter]], torch.optim.Optimizer]

FAKE, GENERATOR = 0, 1
_NAMES = ("the fake score", "the generator")
_TERMS = ("the kept samples", "the forgotten samples")
_STATE = ("fake", "generator", "average", "optimizers", "steps")

_adam: OptimizerFactory = partial(torch.optim.Adam, lr=1e-5, betas=(0.0, 0.999))


class Losses(NamedTuple):
    """Means over the samples of a term, unweighted, detached, on the device; 0 for a term without samples."""

    fake_kept: Tensor
    fake_forgotten: Tensor
    generator_kept: Tensor
    generator_forgotten: Tensor


class _Rows(NamedTuple):
    """Who is in a batch, kept samples first. Each group draws from a stream of its own."""

    labels: Tensor
    teacher_labels: Tensor
    sizes: tuple[int, int]
    streams: tuple[torch.Generator, torch.Generator]

    def draw(self, one: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """What ``one`` draws for each group, in one tensor."""
        return torch.cat([one(size, stream) for size, stream in zip(self.sizes, self.streams) if size])


class ScoreForgettingDistillation:
    """Distil a class-conditional diffusion model into a one-step generator that does not know one of its classes.

    For kept labels the generator follows the teacher's score; for the forgotten label it follows the teacher's score of
    another class. No data are needed. :attr:`sampler` is what is kept at the end. The teacher itself does not forget;
    the fake score is a multi-step model of what the generator makes.

    The authors run every network a second time on a whole batch of the forgotten label, whose weight is 0.01. Here
    ``forget_share`` of a batch is added to the batch of kept labels, and its *mean* has that weight: by default an
    eighth, for about an eighth more time. Kept samples are drawn as if nothing were forgotten. Batch normalisation in
    the networks would see both.

    Its own draws are a function of the seed and the number of the step, so a state needs no random state. It runs in
    one process.

    Args:
        teacher: the model; it is kept, and frozen in place.
        forget: c_f, the class to forget; None distils and forgets nothing.
        override: c_o, the class whose samples its prompt shall give (the authors: 1 for 0); default None, a kept class
            at random for each sample.
        kept_weight: lambda_r, default 1.
        forget_weight: lambda_f, default 0.01 (the authors' CIFAR-10 and STL-10; 1 for Stable Diffusion); with 0 no
            sample of the label is drawn.
        forget_share: forgotten samples beside the kept ones, as a share of their number, rounded up; default 1/8, the
            authors' is 1.
        frequencies: (C,) how often kept classes are drawn; default all alike.
        alpha: of the generator's loss, default 1.2 (the authors'), see
            :func:`~regularized.unlearning.score_forgetting.sid_generator_loss`.
        t_init: step that the generator is told; default 440 (the authors').
        t_range: noise is that of the first to before the second of these steps; default (38, 712) (the authors').
        through_networks: whether the generator's gradient goes through both networks (default), or they are evaluated
            without gradient, which is Diff-Instruct and cheaper.
        optimizer: factory called with the parameters of the generator, and of the fake score; default Adam with rate
            1e-5 and betas (0, 0.999) (the authors').
        fake_optimizer: factory for the fake score where it differs (rate 3e-5 in the authors' two stages).
        schedule: factor on the rates, a number or a function of
            :class:`~regularized.training.progress.Progress`; default 1.
        clip: each entry of a gradient is clipped to [-clip, clip]; default 1 (the authors'), None for no clipping.
        decay: of the averaged generator; default 0.9999 (the authors'), for tens of thousands of steps.
        start: a distillation whose generator and fake score to start from (the authors' two stages); default copies of
            the teacher.
        seed: of all that is drawn; default 0.

    Attributes:
        teacher: phi.
        fake: psi.
        generator: theta.
        average: averaged copy of the generator.
        optimizers: of the fake score and of the generator.
        steps: steps done.

    Raises:
        ValueError: a setting is outside its range, or the teacher's answers cannot be used, see the message.
        TypeError: the teacher does not take labels.

    Warns:
        UserWarning: the teacher was not frozen, or answers as if it predicted something else.

    Examples:
        >>> from functools import partial
        >>> from torch import nn
        >>> class Centres(nn.Module):  # three classes, of one point each; it predicts the clean sample
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.centre = nn.Embedding.from_pretrained(torch.tensor([[0.0], [1.0], [2.0]]))
        ...
        ...     def forward(self, x_t, t, labels):
        ...         return self.centre(labels)
        >>> teacher = ConditionalDiffusion(Centres(), shape=(1,), num_classes=3, prediction="x0").eval()
        >>> adam = partial(torch.optim.Adam, lr=0.02, betas=(0.0, 0.999))
        >>> sfd = ScoreForgettingDistillation(teacher, forget=0, override=2, optimizer=adam, decay=0.9)
        >>> losses = sfd.fit(steps=200, batch_size=16)
        >>> sfd.sampler.sample(torch.tensor([0, 1, 2])).flatten().round().tolist()
        [2.0, 1.0, 2.0]
    """

    @allowed(
        kept_weight=at_least(0.0, remedy="0 keeps only what the start knows"),
        forget_weight=at_least(0.0, remedy="0 forgets nothing"),
        forget_share=between(0.0, 1.0, "(]", "forgotten samples for each kept one"),
        alpha=finite(),
        clip=positive().or_none("no clipping"),
    )
    def __init__(
        self,
        teacher: ConditionalDiffusion,
        *,
        forget: int | None,
        override: int | None = None,
        kept_weight: float = 1.0,
        forget_weight: float = 0.01,
        forget_share: float = 0.125,
        frequencies: Sequence[float] | Tensor | None = None,
        alpha: float = 1.2,
        t_init: int = 440,
        t_range: tuple[int, int] = (38, 712),
        through_networks: bool = True,
        optimizer: OptimizerFactory = _adam,
        fake_optimizer: OptimizerFactory | None = None,
        schedule: Coefficient = 1.0,
        clip: float | None = 1.0,
        decay: Decay = 0.9999,
        start: "ScoreForgettingDistillation | None" = None,
        seed: int = 0,
    ) -> None:
        self.labels: LabelSampler = LabelSampler(
            teacher.num_classes, forget=forget, override=override, frequencies=frequencies
        )
        t_min, t_max = t_range
        if not 0 <= t_min < t_max <= len(teacher.schedule):
            raise ValueError(
                f"t_range must be two steps of the schedule, from 0 to {len(teacher.schedule)}, the first below the "
                f"second; got {t_range}"
            )
        self.kept_weight = kept_weight
        self.forget_weight: float = 0.0 if forget is None else forget_weight
        if not self.kept_weight and not self.forget_weight:
            raise ValueError("both weights are 0, so there is nothing to train; raise kept_weight, or forget a class")
        self.teacher: ConditionalDiffusion = frozen(teacher)
        probe_teacher(teacher, self.labels, t_range=(t_min, t_max))
        self.fake: ConditionalDiffusion = _trainable(teacher if start is None else start.fake)
        generator = _trainable(teacher if start is None else start.generator.diffusion)
        self.generator: OneStepGenerator = OneStepGenerator(generator, t_init=t_init)
        self.average: EMA = EMA(self.generator, decay=decay)
        self.device: torch.device = next(self.fake.parameters()).device
        self._remedy = f"noise was that of steps {t_min} to {t_max - 1}: lower the rates, or narrow t_range"
        factories = (optimizer if fake_optimizer is None else fake_optimizer, optimizer)
        self.optimizers: Optimizers = Optimizers(
            [make(list(net.parameters())) for make, net in zip(factories, (self.fake, self.generator))],
            schedule=schedule,
            names=_NAMES,
            remedy=self._remedy,
        )
        self.forget_share = forget_share
        self.alpha = alpha
        self.t_range: tuple[int, int] = (t_min, t_max)
        self.through_networks = through_networks
        self.clip = clip
        self.seed = seed
        self.steps = 0
        self._flags = PendingFlags()

    @property
    def sampler(self) -> OneStepGenerator:
        """The averaged generator: what is kept at the end."""
        module = self.average.module
        assert isinstance(module, OneStepGenerator)
        return module

    # -- a step -----------------------------------------------------------------------------

    def step(self, batch_size: int = 128, *, progress: Progress | None = None) -> Losses:
        """One update of the fake score, and one of the generator.

        Args:
            batch_size: kept samples; forgotten ones come on top. Default 128 (the authors' in each process).
            progress: position in the training, for the schedule; default the steps done, of unknown total.

        Returns:
            Means of the four terms.

        Raises:
            NonFiniteLoss: a term, a gradient or a rate is not finite; the message names it. On an accelerator the term
                may be that of the update before.
            ValueError: ``batch_size`` is below 1.
        """
        count(1)("batch_size", batch_size)
        progress = Progress(self.steps, 0) if progress is None else progress
        rows = self._rows(batch_size)
        self.generator.train()
        self.fake.train()
        with torch.no_grad():
            x0 = self._generated(rows)
        fake = self._update(FAKE, self._fake_loss(x0, rows), rows, progress)
        self.fake.eval()
        generator = self._update(GENERATOR, self._generator_loss(self._generated(rows), rows), rows, progress)
        self.average.update(self.generator)
        self.steps += 1
        return Losses(*fake, *generator)

    def _rows(self, batch_size: int) -> _Rows:
        kept = batch_size if self.kept_weight else 0
        forgotten = math.ceil(batch_size * self.forget_share) if self.forget_weight else 0
        streams = [torch.Generator(self.device).manual_seed(mix(self.seed, self.steps, group)) for group in range(2)]
        of_kept, of_forgotten = streams
        labels = [self.labels.kept(kept, of_kept)] if kept else []
        teacher_labels = list(labels)
        if forgotten:
            labels.append(self.labels.forgotten(forgotten, of_forgotten))
            teacher_labels.append(self.labels.stand_in(forgotten, of_forgotten))
        return _Rows(torch.cat(labels), torch.cat(teacher_labels), (kept, forgotten), (of_kept, of_forgotten))

    def _normal(self, rows: _Rows) -> Tensor:
        shape, dtype = self.teacher.shape, next(self.fake.parameters()).dtype
        return rows.draw(lambda n, g: torch.randn((n, *shape), generator=g, device=self.device, dtype=dtype))

    def _generated(self, rows: _Rows) -> Tensor:
        samples: Tensor = self.generator(self._normal(rows), rows.labels)
        return samples

    def _noised(self, x0: Tensor, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and e."""
        t = rows.draw(lambda n, g: torch.randint(*self.t_range, (n,), generator=g, device=self.device))
        noise = self._normal(rows)
        return self.teacher.schedule.add_noise(x0, noise, t), t, noise

    def _fake_loss(self, x0: Tensor, rows: _Rows) -> Tensor:
        """(B,)."""
        x_t, t, noise = self._noised(x0, rows)
        return eps_matching_loss(self.fake.noise_in(x_t, t, rows.labels), noise)

    def _generator_loss(self, x0: Tensor, rows: _Rows) -> Tensor:
        """(B,); its graph goes to x0, and to no other weights than the generator's."""
        x_t, t, _ = self._noised(x0, rows)
        with constant_parameters(self.fake), torch.set_grad_enabled(self.through_networks):
            teacher_x0 = self.teacher.denoised(x_t, t, rows.teacher_labels)
            fake_x0 = self.fake.denoised(x_t, t, rows.labels)
        return sid_generator_loss(teacher_x0, fake_x0, x0, alpha=self.alpha if self.through_networks else 1.0)

    def _update(self, number: int, losses: Tensor, rows: _Rows, progress: Progress) -> tuple[Tensor, Tensor]:
        """Step one of the two networks on the weighted means of both groups; the means, detached."""
        self._flags.settle()
        kept, forgotten = (part.sum() / max(size, 1) for part, size in zip(losses.split(list(rows.sizes)), rows.sizes))
        means = torch.stack([kept, forgotten]).detach()
        self._flags.send([f"{_NAMES[number]}'s loss of {term}" for term in _TERMS], means.isfinite(), self._error)
        if self.device.type == "cpu":
            self._flags.settle()
        loss = self.kept_weight * kept + self.forget_weight * forgotten
        optimizer = self.optimizers[number]
        optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            clip_grad_value_([p for group in optimizer.param_groups for p in group["params"]], self.clip)
        self.optimizers.step(number, progress=progress, loss=loss)
        return means[0], means[1]

    def _error(self, suspect: str) -> NonFiniteLoss:
        return NonFiniteLoss(f"{suspect} is not finite in step {self.steps}; {self._remedy}")

    # -- training ---------------------------------------------------------------------------

    def fit(
        self,
        *,
        steps: int,
        batch_size: int = 128,
        after_step: Callable[["ScoreForgettingDistillation", Losses], object] | None = None,
    ) -> Losses:
        """Train until ``steps`` steps are done in all.

        One restored by :meth:`load_state_dict` ends bit for bit (CPU) as one that was never stopped: dropout, too, is
        a function of the seed and the step here. The global random state is left as it was.

        Args:
            steps: in all, also for the schedule.
            batch_size: see :meth:`step`.
            after_step: called with this object and the losses after each step, for evaluation or saving.

        Returns:
            Means over the steps of this call.

        Raises:
            NonFiniteLoss: see :meth:`step`.
            ValueError: so many steps are done already, or ``batch_size`` is below 1.
        """
        between(self.steps + 1, float("inf"), "[)", "more than the steps done", whole=True)("steps", steps)
        first, total = self.steps, torch.zeros(len(Losses._fields), device=self.device)
        with preserved():
            while self.steps < steps:
                seed_all(mix(self.seed, self.steps))
                losses = self.step(batch_size, progress=Progress(self.steps, steps))
                total += torch.stack(losses)
                if after_step is not None:
                    after_step(self, losses)
        self._flags.settle()
        self.optimizers.settle()
        return Losses(*(total / (self.steps - first)))

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, and checksums of what must be the same; the teacher is not in it.

        ``torch.load(..., weights_only=True)`` reads what ``torch.save`` writes of it.

        Raises:
            NonFiniteLoss: the last step, or a weight, is not finite.
        """
        self._flags.settle()
        return state_of(self, *_STATE) | {"seed": self.seed, "teacher": self._teacher_checksum()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, of a distillation built with the same settings.

        Raises:
            ValueError: it is of another teacher or seed, or does not fit; nothing is changed then.
        """
        given = dict(state)
        for name, own in (("seed", self.seed), ("teacher", self._teacher_checksum())):
            if given.pop(name, None) != own:
                raise ValueError(
                    f"the state is of a distillation with another {name} than this one; build it with the same"
                )
        restore(self, given, *_STATE)
        self._flags.forget()

    def _teacher_checksum(self) -> str:
        return fingerprint(self.teacher.state_dict().values())


def _trainable(model: ConditionalDiffusion) -> ConditionalDiffusion:
    """A copy, all of whose weights are trained."""
    return copy.deepcopy(model).requires_grad_(True)
