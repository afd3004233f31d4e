"""The noise that was added, and what a network says about it: three kinds of prediction, one estimate.

:mod:`regularized.unlearning.score_forgetting.loss` has the symbols.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed, between, count

__all__ = ["NoiseSchedule", "Prediction"]

Prediction: TypeAlias = Literal["eps", "x0", "v"]
"""What a network predicts: the noise e, the clean sample x_0, or v = sqrt(a_t) e - sqrt(1 - a_t) x_0."""

PREDICTIONS = Choice("eps", "x0", "v", meaning="what the network predicts", remedy="see how the teacher was trained")


class NoiseSchedule:
    """How much signal is left at each step of a variance-preserving diffusion.

    It is kept in float64 and cast to what it meets: 1 - a_t is a difference of numbers close to one.

    Args:
        alphas_cumprod: (T,) a_t, falling, each in (0, 1); ``scheduler.alphas_cumprod`` of the diffusers library, or
            what :meth:`linear` gives.

    Attributes:
        alphas_cumprod: (T,) float64.

    Raises:
        ValueError: it is no falling sequence in (0, 1).

    Examples:
        >>> schedule = NoiseSchedule.linear()
        >>> len(schedule), round(float(schedule.alphas_cumprod[440].sqrt()), 6)
        (1000, 0.371093)
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        a = alphas_cumprod.detach().to("cpu", torch.float64)
        if a.ndim != 1 or len(a) < 2 or not bool(((a > 0) & (a < 1)).all()) or not bool((a.diff() < 0).all()):
            raise ValueError(
                "alphas_cumprod must be (T,), falling, and inside (0, 1): the products of 1 - beta, not the betas; got "
                f"shape {tuple(alphas_cumprod.shape)}{f' from {a.min():g} to {a.max():g}' if a.numel() else ''}"
            )
        self.alphas_cumprod: Tensor = a
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    @allowed(num_steps=count(2), beta_start=between(0.0, 1.0, "()"), beta_end=between(0.0, 1.0, "()"))
    def linear(cls, num_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
        """Betas on a line, as in DDPM.

        Args:
            num_steps: T, default 1000.
            beta_start: of the first step, default 1e-4.
            beta_end: of the last one, default 0.02 (all three: DDPM, and the authors).
        """
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
        return cls((1.0 - betas).cumprod(dim=0))

    def __len__(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), in the dtype of x and so shaped that they multiply it.

        Args:
            t: (B,) steps, whole numbers.
            x: (B, ...).
        """
        key = (x.device, x.dtype)
        if key not in self._tables:
            a = self.alphas_cumprod
            self._tables[key] = torch.stack([a.sqrt(), (1.0 - a).sqrt()]).to(x.dtype).to(x.device)
        signal, noise = self._tables[key][:, t].view(2, -1, *[1] * (x.ndim - 1))
        return signal, noise

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of a clean sample (B, ...), noise of its shape, and steps (B,)."""
        signal, level = self.levels(t, x0)
        return signal * x0 + level * noise

    def denoised(self, x_t: Tensor, output: Tensor, t: Tensor, prediction: Prediction = "eps") -> Tensor:
        """The clean sample as a network sees it.

        Args:
            x_t: (B, ...), what the network saw.
            output: of the same shape, what it said.
            t: (B,) steps.
            prediction: what it predicts; default the noise.

        Examples:
            >>> schedule, t = NoiseSchedule.linear(), torch.tensor([440])
            >>> x0, e = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
            >>> round(float(schedule.denoised(schedule.add_noise(x0, e, t), e, t)), 4)
            2.0
        """
        if prediction == "x0":
            return output
        signal, level = self.levels(t, x_t)
        return signal * x_t - level * output if prediction == "v" else (x_t - level * output) / signal

    def noise_in(self, x_t: Tensor, output: Tensor, t: Tensor, prediction: Prediction = "eps") -> Tensor:
        """The noise as a network sees it; arguments as for :meth:`denoised`."""
        if prediction == "eps":
            return output
        signal, level = self.levels(t, x_t)
        return level * x_t + signal * output if prediction == "v" else (x_t - signal * output) / level
