"""A generator and its discriminator, trained against each other: the plain step of adaptation and unlearning."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regularized.mechanisms.ema import EMA
from regularized.mechanisms.frozen import check_apart, constant_parameters
from regularized.mechanisms.ranges import allowed, at_least, check_fields, count, share
from regularized.training.data import epoch_order
from regularized.training.data import share as part_of
from regularized.training.identity import fingerprint
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part
from regularized.training.progress import Progress
from regularized.training.state import restore, state_of
from regularized.training.step import Batch
from regularized.unlearning.adapt_unlearn.feedback import Latents, latent_sampler, sample
from regularized.unlearning.adapt_unlearn.loss import discriminator_loss, generator_loss, gradient_penalty
from regularized.unlearning.adapt_unlearn.term import trainable

__all__ = ["GAN", "GANSettings", "Pull", "Steps"]

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Pull(Protocol):
    """What adds to the generator's gradients in front of its optimizer."""

    def add_gradient(self, strength: float) -> None:
        """Add its gradient, times a coefficient."""
        ...


def _adam(interval: int) -> Optimizer:
    """The authors' Adam, 0.002 and (0, 0.99), with StyleGAN2's correction for a penalty every ``interval`` steps."""
    ratio = interval / (interval + 1)
    return partial(torch.optim.Adam, lr=0.002 * ratio, betas=(0.0, 0.99**ratio))


_GENERATOR_ADAM, _DISCRIMINATOR_ADAM = _adam(4), _adam(16)


@dataclass(frozen=True, slots=True)
class GANSettings:
    """How the GAN is trained; take what it was pretrained with. Defaults: the authors' code, for StyleGAN2.

    Args:
        generator_optimizer: from parameters to an optimizer; default Adam of rate 0.002 times 4/5, betas
            (0, 0.99^(4/5)).
        discriminator_optimizer: the same; default with 16/17.
        r1: coefficient of the penalty ``r1 / 2 |grad_x D(x)|^2`` on real samples; default 10.
        r1_every: it is computed every so many steps, then times this number; default 16. It enters the loss of that
            step, where the authors' code takes a step of its own.
        ema_decay: share of the averaged generator that stays at a step; default 0.5^(32 / 10000).
        generator_penalty: what the generator's loss has beside, such as StyleGAN2's path length: from generator and
            progress to a scalar, or to None at steps without it. Default none.

    Raises:
        ValueError: ``r1``, ``r1_every`` or ``ema_decay`` is out of range.

    Examples:
        >>> GANSettings(r1=1.0).r1_every
        16
    """

    generator_optimizer: Optimizer = _GENERATOR_ADAM
    discriminator_optimizer: Optimizer = _DISCRIMINATOR_ADAM
    r1: float = 10.0
    r1_every: int = 16
    ema_decay: float = 0.5 ** (32 / 10_000)
    generator_penalty: Callable[[nn.Module, Progress], Tensor | None] | None = None

    def __post_init__(self) -> None:
        check_fields(self, r1=at_least(0.0), r1_every=count(1), ema_decay=share())


class Steps:
    """So many batches of a data set in memory, as a source of one pass: orders follow one another, batches span them.

    Args:
        samples: (N, ...); N may be smaller than a batch.
        steps: number of batches.
        batch_size: samples in each of them.
        seed: of the orders.

    Examples:
        >>> source = Steps(torch.arange(3.0), steps=3, batch_size=2, seed=0)
        >>> drawn = torch.cat([batch.inputs for batch in source.batches(0)])
        >>> sorted(drawn[:3].tolist()), sorted(drawn[3:].tolist())
        ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])
    """

    @allowed(steps=count(1), batch_size=count(1))
    def __init__(self, samples: Tensor, *, steps: int, batch_size: int, seed: int) -> None:
        if not len(samples):
            raise ValueError("there is no sample to train on")
        self.samples = samples
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        """Number of batches."""
        return self.steps

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches from number ``start`` on; see :class:`~regularized.training.data.Source`."""
        del epoch  # it is one pass
        size, orders = len(self.samples), dict[int, Tensor]()
        for number in range(start, self.steps):
            place, end, rows = number * self.batch_size, (number + 1) * self.batch_size, list[Tensor]()
            while place < end:
                turn, first = divmod(place, size)
                if turn not in orders:
                    orders = {turn: epoch_order(size, seed=self.seed, epoch=turn)}
                rows.append(orders[turn][first : first + end - place])
                place += len(rows[-1])
            yield Batch(self.samples[torch.cat(rows)[part_of(self.batch_size, rank, world)].to(self.samples.device)])

    def identity(self) -> dict[str, Any]:
        """By which a training that goes on makes sure that it has the same data."""
        plain = {"kind": type(self).__name__, "batch_size": self.batch_size, "seed": self.seed}
        return plain | {"samples": fingerprint(self.samples)}


class GAN:
    """A generator and a discriminator that train against each other, with an averaged copy of the generator.

    Args:
        generator: from latents (B, ...) to samples (B, ...).
        discriminator: from samples to scores, before any sigmoid; its own network.
        latents: width of the generator's normal latents, or what draws so many of them.
        settings: how it is trained; default :class:`GANSettings`.
        seed: of all that is drawn.

    Attributes:
        ema: the averaged generator, which is the one to use.

    Raises:
        ValueError: networks share memory, or one of them has no trainable parameter.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> gan = GAN(nn.Linear(1, 1), nn.Linear(1, 1), latents=1)
        >>> losses = gan.fit(torch.randn(50, 1), steps=20)
        >>> losses.shape, gan.sample(3).shape
        (torch.Size([2]), torch.Size([3, 1]))
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        latents: Latents,
        settings: GANSettings | None = None,
        seed: int = 0,
    ) -> None:
        check_apart(generator, discriminator, names=("generator", "discriminator"))
        for net in (generator, discriminator):
            trainable(net)
        self.generator = generator
        self.discriminator = discriminator
        self.settings = GANSettings() if settings is None else settings
        self.seed = seed
        self.epochs = Epochs(seed)
        self.draw = latent_sampler(latents, generator)
        self.ema: EMA
        self.optimizers: Optimizers
        self.begin()

    def begin(self) -> None:
        """Forget what optimizers and average remember: the average is the generator, as it is now."""
        chosen = self.settings
        self.generator.train()
        self.discriminator.train()
        self.ema = EMA(self.generator, decay=chosen.ema_decay)
        self.optimizers = Optimizers(
            [
                chosen.generator_optimizer(trainable(self.generator).values()),
                chosen.discriminator_optimizer(trainable(self.discriminator).values()),
            ],
            names=("generator", "discriminator"),
            remedy="lower the learning rates, or the coefficient of a penalty",
        )

    def training_step(
        self, batch: Batch, *, progress: Progress, pull: Pull | None = None, strength: float = 0.0
    ) -> Tensor:
        """One step of the discriminator, then one of the generator.

        Args:
            batch: real samples are its inputs.
            progress: position in the training.
            pull: adds to the generator's gradients; default nothing does.
            strength: its coefficient; with 0 the step is the plain one, bit for bit.

        Returns:
            (2,) losses of generator and discriminator, detached; without what the pull stands for.
        """
        critic, real = self.discriminator, batch.inputs
        penalised = self.settings.r1 > 0.0 and progress.step % self.settings.r1_every == 0
        if penalised:
            real = real.detach().requires_grad_()
        with torch.no_grad():
            fake = self.generator(self.draw(len(real)))
        real_scores = critic(real)
        critic_loss = discriminator_loss(real_scores, critic(fake))
        whole = critic_loss
        if penalised:
            whole = whole + 0.5 * self.settings.r1 * self.settings.r1_every * gradient_penalty(real_scores, real)
        self.optimizers.minimise(whole, 1, progress=progress)

        with constant_parameters(critic):
            loss = generator_loss(critic(self.generator(self.draw(len(real)))))
        penalty = self.settings.generator_penalty
        extra = None if penalty is None else penalty(self.generator, progress)
        whole = loss if extra is None else loss + extra
        self.optimizers[0].zero_grad()
        whole.backward()
        if pull is not None and strength:
            pull.add_gradient(strength)
        self.optimizers.step(0, progress=progress, loss=whole)
        self.ema.update(self.generator)
        return torch.stack([loss.detach(), critic_loss.detach()])

    @allowed(steps=count(1), batch_size=count(1))
    def fit(self, samples: Tensor, *, steps: int, batch_size: int = 16) -> Tensor:
        """Train for so many further steps.

        Args:
            samples: (N, ...) real ones.
            steps: of both networks.
            batch_size: default 16.

        Returns:
            (2,) mean losses of generator and discriminator.
        """
        source = Steps(samples, steps=steps, batch_size=batch_size, seed=self.seed)
        done = self.epochs.done

        def step(batch: Batch, *, progress: Progress) -> Tensor:
            return self.training_step(batch, progress=Progress(progress.step - done * steps, steps))

        ((losses,),) = self.epochs.run([Part(source, step)], until=done + 1)
        return losses

    def sample(self, number: int, *, seed: int = 0) -> Tensor:
        """Samples of the averaged generator.

        Args:
            number: how many.
            seed: of their latents; the global generators are left alone.
        """
        return sample(self.ema.module, self.draw, number, seed=seed)

    def state_dict(self) -> dict[str, Any]:
        """All that training changes."""
        return state_of(self, "generator", "discriminator", "ema", "optimizers", "epochs")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`, of a GAN that was built with the same settings."""
        restore(self, state, "generator", "discriminator", "ema", "optimizers", "epochs")
