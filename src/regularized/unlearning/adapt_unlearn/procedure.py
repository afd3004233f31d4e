"""First adapt, then unlearn: K short trainings on what must go, and one that keeps away from where they went."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, at_least, between, count
from regularized.training.procedure import Epochs, Part
from regularized.training.progress import Progress, as_schedule
from regularized.training.randomness import mix, preserved, seed_all
from regularized.training.state import restore, state_of
from regularized.training.step import Batch
from regularized.unlearning.adapt_unlearn.feedback import Feedback, Latents, Oracle, collect_feedback
from regularized.unlearning.adapt_unlearn.fisher import generator_fisher
from regularized.unlearning.adapt_unlearn.gan import GAN, GANSettings, Steps
from regularized.unlearning.adapt_unlearn.term import ElasticAnchor, Repulsion

__all__ = ["AdaptThenUnlearn", "adapt_then_unlearn"]

_NAMES = ("gan", "start", "repulsion", "hold", "begun", "epochs")


class AdaptThenUnlearn:
    """The whole procedure, in ``adaptations + 1`` stages; no real data is needed.

    Stages 0 to K - 1 adapt the pretrained GAN to a part of the negatives each, with the generator held by its Fisher
    information. The last stage trains the pretrained GAN on the positives, with the generator repelled from the
    averaged generators of the stages before. After each stage ``gan.ema`` is what came out of it.

    Args:
        generator: pretrained; trained in place.
        discriminator: the one that it was trained against; trained in place.
        feedback: samples of the generator, sorted; see
            :func:`~regularized.unlearning.adapt_unlearn.feedback.collect_feedback`.
        latents: width of the generator's normal latents, or what draws so many of them.
        anchor: lambda, the strength of the hold while adapting; see
            :class:`~regularized.unlearning.adapt_unlearn.term.ElasticAnchor`. Raise it until adapted generators still
            look well, and make mostly negatives.
        repulsion: default ``Repulsion()``: exponential, of distances relative to the start, weight 1.
        adaptations: K; default 5 (the authors' script for MNIST).
        adapt_steps: of each adaptation; default 2000 (the same).
        unlearn_steps: of the last stage; default 1000 (the same).
        batch_size: default 16 (the authors').
        subset: share of the negatives that each adaptation gets, drawn for it; default 0.6 (ours).
        fisher_samples: latents for the Fisher information; default 32 (the authors').
        held: whether a parameter's name is held while adapting; default all. The authors hold StyleGAN2's convolutions.
        settings: how the GAN is trained; take what it was pretrained with.
        seed: of all that is drawn.

    Raises:
        ValueError: an argument is outside its range; networks share memory or are frozen.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> generator, discriminator = nn.Linear(2, 1), nn.Linear(1, 1)
        >>> feedback = collect_feedback(generator, lambda x: x[:, 0] > 0.5, latents=2, samples=200)
        >>> work = AdaptThenUnlearn(
        ...     generator, discriminator, feedback, latents=2, anchor=1.0, adaptations=2, adapt_steps=5, unlearn_steps=5
        ... )
        >>> work.fit().shape, work.stage, work.repulsion.num_references
        (torch.Size([3, 2]), 3, 2)
    """

    @allowed(
        anchor=at_least(0.0, remedy="0 does not hold at all"),
        adaptations=count(1),
        adapt_steps=count(1),
        unlearn_steps=count(1),
        batch_size=count(1),
        subset=between(0.0, 1.0, "(]"),
        fisher_samples=count(1),
    )
    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        feedback: Feedback,
        *,
        latents: Latents,
        anchor: float,
        repulsion: Repulsion | None = None,
        adaptations: int = 5,
        adapt_steps: int = 2000,
        unlearn_steps: int = 1000,
        batch_size: int = 16,
        subset: float = 0.6,
        fisher_samples: int = 32,
        held: Callable[[str], bool] | None = None,
        settings: GANSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.gan = GAN(generator, discriminator, latents=latents, settings=settings, seed=seed)
        self.feedback = feedback
        self.repulsion = Repulsion() if repulsion is None else repulsion
        self.adaptations = adaptations
        self.steps = (adapt_steps, unlearn_steps)
        self.batch_size = batch_size
        self.subset = subset
        self.seed = seed
        self.epochs = Epochs(seed)
        self.begun: int = 0  # stages
        self.start = {name: copy.deepcopy(net.state_dict()) for name, net in self._networks().items()}
        with preserved():
            seed_all(mix(seed, 1))
            fisher = generator_fisher(generator, discriminator, self.gan.draw(fisher_samples), which=held)
        self.hold = ElasticAnchor(fisher, weight=anchor)
        self.hold.attach(generator)
        self.repulsion.attach(generator)

    def _networks(self) -> dict[str, nn.Module]:
        return {"generator": self.gan.generator, "discriminator": self.gan.discriminator}

    @property
    def stage(self) -> int:
        """Stages done."""
        return self.epochs.done

    @property
    def stages(self) -> int:
        """Stages in all."""
        return self.adaptations + 1

    def fit(
        self, *, until: int | None = None, after_step: Callable[["AdaptThenUnlearn"], object] | None = None
    ) -> Tensor:
        """Go through the stages that are left.

        Args:
            until: stages in all by the end of this call; default all of them.
            after_step: called after each step with the procedure; where it raises, the next call goes on behind that
                step. So a guard can stop unlearning once samples get worse.

        Returns:
            (stages of this call, 2) mean losses of generator and discriminator.

        Raises:
            NonFiniteLoss: a loss or a gradient is not finite.
        """
        until = self.stages if until is None else until
        losses = [self._run(after_step) for _ in range(self.stage, min(until, self.stages))]
        return torch.stack(losses) if losses else torch.empty(0, 2)

    def _run(self, after_step: Callable[["AdaptThenUnlearn"], object] | None) -> Tensor:
        """The next stage, or the rest of it."""
        stage = self.stage
        adapting = stage < self.adaptations
        if self.begun == stage:
            self._begin(adapting)
            self.begun = stage + 1
        samples = self._subset(stage) if adapting else self.feedback.positives
        steps = self.steps[0 if adapting else 1]
        pull: ElasticAnchor | Repulsion = self.hold if adapting else self.repulsion
        strength = as_schedule(pull.weight, name="weight")
        source = Steps(samples, steps=steps, batch_size=self.batch_size, seed=mix(self.seed, stage))

        def step(batch: Batch, *, progress: Progress) -> Tensor:
            own = Progress(progress.step - stage * steps, steps)
            return self.gan.training_step(batch, progress=own, pull=pull, strength=strength(own))

        hook = None if after_step is None else lambda: after_step(self)
        ((losses,),) = self.epochs.run([Part(source, step)], until=stage + 1, after_step=hook)
        if adapting:
            self.repulsion.add_reference(self.gan.ema.module)
        return losses

    def _begin(self, adapting: bool) -> None:
        """Back to the pretrained networks."""
        for name, net in self._networks().items():
            net.load_state_dict(self.start[name])
        self.gan.begin()
        if not adapting:
            self.repulsion.start()

    def _subset(self, stage: int) -> Tensor:
        negatives = self.feedback.negatives
        order = torch.randperm(len(negatives), generator=torch.Generator().manual_seed(mix(self.seed, stage, 2)))
        return negatives[order[: max(1, round(self.subset * len(negatives)))].to(negatives.device)]

    def state_dict(self) -> dict[str, Any]:
        """All that the stages so far have changed, and the pretrained networks; without the feedback."""
        return state_of(self, *_NAMES)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`, of a procedure built with the same settings and feedback."""
        restore(self, state, *_NAMES)


def adapt_then_unlearn(
    generator: nn.Module, discriminator: nn.Module, oracle: Oracle, *, latents: Latents, anchor: float, **options: Any
) -> nn.Module:
    """All of it in one call: feedback, adaptations, unlearning.

    Args:
        generator: pretrained; trained in place.
        discriminator: the one that it was trained against; trained in place.
        oracle: says of generated samples which must go.
        latents: width of the generator's normal latents, or what draws so many of them.
        anchor: lambda, see :class:`AdaptThenUnlearn`.
        **options: ``samples`` of :func:`~regularized.unlearning.adapt_unlearn.feedback.collect_feedback`; all others
            are those of :class:`AdaptThenUnlearn`.

    Returns:
        The averaged generator, in evaluation mode.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> clean = adapt_then_unlearn(
        ...     nn.Linear(2, 1), nn.Linear(1, 1), lambda x: x[:, 0] > 0.5, latents=2, anchor=1.0,
        ...     samples=200, adaptations=1, adapt_steps=5, unlearn_steps=5,
        ... )
        >>> clean(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    samples, seed = options.pop("samples", 5000), options.get("seed", 0)
    feedback = collect_feedback(generator, oracle, latents=latents, samples=samples, seed=seed)
    procedure = AdaptThenUnlearn(generator, discriminator, feedback, latents=latents, anchor=anchor, **options)
    procedure.fit()
    return procedure.gan.ema.module.eval()
