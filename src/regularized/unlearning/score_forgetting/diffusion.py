"""A class-conditional diffusion model: a network, what it predicts, and samples in many evaluations or in one.

:mod:`regularized.unlearning.score_forgetting.loss` has the symbols.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, between, count
from regularized.mechanisms.two_networks import evaluating
from regularized.unlearning.score_forgetting.loss import eps_matching_loss
from regularized.unlearning.score_forgetting.schedule import PREDICTIONS, NoiseSchedule, Prediction

__all__ = ["ConditionalDiffusion", "OneStepGenerator"]


class ConditionalDiffusion(nn.Module):
    """A network with all that must be known to read its answers.

    Args:
        network: called as ``network(x_t, t, labels)`` with x_t (B, ...), t (B,) steps as float32 and labels (B,); it is
            kept, not copied. Another convention needs a module of three lines around it.
        shape: of one sample, such as (3, 32, 32).
        num_classes: C; labels are 0 ... C - 1.
        schedule: default the linear one of DDPM, 1000 steps.
        prediction: what the network predicts: ``"eps"``, the noise (default), ``"x0"`` or ``"v"``.

    Attributes:
        network: the network.

    Raises:
        ValueError: fewer than one class, or an unknown ``prediction``.

    Examples:
        >>> class Net(nn.Module):  # knows that every sample is 3
        ...     def forward(self, x_t, t, labels):
        ...         return torch.full_like(x_t, 3.0)
        >>> diffusion = ConditionalDiffusion(Net(), shape=(1,), num_classes=2, prediction="x0")
        >>> diffusion.sample(torch.tensor([0, 1]), steps=10).tolist()
        [[3.0], [3.0]]
    """

    @allowed(num_classes=count(1), prediction=PREDICTIONS)
    def __init__(
        self,
        network: nn.Module,
        *,
        shape: Sequence[int],
        num_classes: int,
        schedule: NoiseSchedule | None = None,
        prediction: Prediction = "eps",
    ) -> None:
        super().__init__()
        self.network = network
        self.shape: tuple[int, ...] = tuple(shape)
        self.num_classes = num_classes
        self.schedule: NoiseSchedule = NoiseSchedule.linear() if schedule is None else schedule
        self.prediction: Prediction = prediction

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """What the network answers.

        Args:
            x_t: (B, ...).
            t: (B,) steps, whole numbers.
            labels: (B,).
        """
        output: Tensor = self.network(x_t, t.float(), labels)
        return output

    def denoised(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The clean sample as the network sees it; arguments as for :meth:`forward`."""
        return self.schedule.denoised(x_t, self(x_t, t, labels), t, self.prediction)

    def noise_in(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The noise as the network sees it; arguments as for :meth:`forward`."""
        return self.schedule.noise_in(x_t, self(x_t, t, labels), t, self.prediction)

    def loss(self, x0: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """What a teacher is trained with: the squared error of the noise at random steps.

        Args:
            x0: (B, ...) clean samples.
            labels: (B,).
            generator: of noise and steps; default torch's global one.

        Returns:
            (B,).
        """
        t = torch.randint(len(self.schedule), (len(x0),), generator=generator, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        return eps_matching_loss(self.noise_in(self.schedule.add_noise(x0, noise, t), t, labels), noise)

    @torch.no_grad()
    def sample(self, labels: Tensor, *, steps: int = 50, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples with many evaluations: DDIM without added noise, in evaluation mode.

        Args:
            labels: (B,), on the network's device.
            steps: evaluations, evenly spaced over the schedule; default 50.
            generator: of the noise; default torch's global one.

        Returns:
            (B, ...).

        Raises:
            ValueError: more steps than the schedule has.
        """
        between(1, len(self.schedule), meaning="the steps of the schedule", whole=True)("steps", steps)
        x = _noise(self.network, labels, self.shape, generator)
        times = torch.linspace(len(self.schedule) - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        with evaluating(self.network):
            for now, then in zip(times, [*times[1:], times[-1]]):
                t = torch.full((len(x),), now, device=x.device)
                output = self(x, t, labels)
                x0 = self.schedule.denoised(x, output, t, self.prediction)
                noise = self.schedule.noise_in(x, output, t, self.prediction)
                x = self.schedule.add_noise(x0, noise, torch.full_like(t, then))
        return x0


class OneStepGenerator(nn.Module):
    """A diffusion model that makes a sample of pure noise in one evaluation: its estimate of x_0 at one fixed step.

    The input is noise of the size that it has at step ``t_init``, with no signal in it. A network that was never
    distilled gives blurred means here.

    Args:
        diffusion: the model; it is kept, not copied.
        t_init: step that the network is told; default 440 of 1000 (the authors' CIFAR-10 and STL-10).

    Attributes:
        diffusion: the model.

    Raises:
        ValueError: ``t_init`` is no step of the schedule.

    Examples:
        >>> class Net(nn.Module):
        ...     def forward(self, x_t, t, labels):
        ...         return 0.0 * x_t
        >>> generator = OneStepGenerator(ConditionalDiffusion(Net(), shape=(2,), num_classes=1))
        >>> round(float(generator(torch.ones(1, 2), torch.tensor([0]))[0, 0]), 6)  # sqrt(1 / a - 1) of noise
        2.502326
    """

    def __init__(self, diffusion: ConditionalDiffusion, *, t_init: int = 440) -> None:
        super().__init__()
        between(0, len(diffusion.schedule) - 1, meaning="a step of the schedule", whole=True)("t_init", t_init)
        self.diffusion = diffusion
        self.t_init = t_init

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """x_0 of standard normal noise (B, ...) and labels (B,)."""
        t = torch.full((len(noise),), self.t_init, device=noise.device)
        return self.diffusion.denoised(self.noised_input(noise), t, labels)

    def noised_input(self, noise: Tensor) -> Tensor:
        """What the network sees: sqrt(1 - a) n."""
        t = torch.full((len(noise),), self.t_init, device=noise.device)
        return self.diffusion.schedule.levels(t, noise)[1] * noise

    @torch.no_grad()
    def sample(self, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw a sample for each label, in evaluation mode and without gradient.

        Args:
            labels: (B,), on the network's device.
            generator: of the noise; default torch's global one.

        Returns:
            (B, ...).
        """
        with evaluating(self.diffusion):
            samples: Tensor = self(_noise(self.diffusion, labels, self.diffusion.shape, generator), labels)
        return samples


def _noise(network: nn.Module, labels: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Standard normal noise in the dtype of the network's weights; drawn where its generator is."""
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.get_default_dtype())
    device = labels.device if generator is None else generator.device
    return torch.randn((len(labels), *shape), generator=generator, device=device, dtype=dtype).to(labels.device)
