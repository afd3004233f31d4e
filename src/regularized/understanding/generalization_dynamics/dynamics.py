"""Will this model overtrain, when should it stop, how much weight decay is best: what theory says of linear models.

Madhu S. Advani, Andrew M. Saxe: High-dimensional dynamics of generalization error in neural networks, 2017, arXiv
1710.03667; Neural Networks 132, 2020, with Haim Sompolinsky. There is no official code: the formulas were derived anew,
and checked against quadrature, matrix exponentials and simulation.

A teacher ``y = x w* + e`` gives P samples with N inputs of variance 1/N; a student starts at random weights and follows
the gradient of ``(1/2) ||y - X w||² + (gamma/2) ||w||²``. Each eigenvalue ``l`` of ``X^T X`` learns at its own speed:

    paper             here              shape, range
    alpha = P/N       alpha             > 0, samples per parameter
    rho(l)            Spectrum          eigenvalues of X^T X with their masses, and the mass at zero
    sigma_w²          signal            >= 0, variance of an entry of the teacher
    sigma_e²          noise             >= 0, variance of the noise on a target
    sigma_0²          start             >= 0, variance of an entry of the student's initial weights
    gamma             weight_decay      >= 0, in units of the *summed* loss
    t                 t                 time of the flow: learning rate x steps, for the summed loss
    E_g, E_t          test_error, train_error    mean squared error; E_g includes the noise that nobody can predict

For the exact course of a given data set instead of an ensemble see
:class:`~regularized.understanding.generalization_dynamics.GradientFlow`.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import above, allowed, at_least, between, count

__all__ = ["LinearDynamics", "Optimum", "Spectrum", "steps_for"]

Times: TypeAlias = float | Tensor
Loss: TypeAlias = Literal["sum", "mean", "mse"]

_BLOCK = 4_000_000  # entries of a (times, eigenvalues) table: 32 MB in float64
_SETTLED = 40.0  # exp(-40) is below the rounding of float64


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of ``X^T X`` with the share of the N weight directions that each stands for.

    Args:
        eigenvalues: (K,) float64, positive.
        masses: (K,) float64; together with ``zero`` they sum to 1.
        zero: share of directions that the data never reach: the frozen subspace.
        mean_inverse: mean of 1/l over the positive ones (mass included); ``inf`` where it diverges. None: their sum.

    Raises:
        ValueError: shapes differ, or an eigenvalue is not positive.

    Examples:
        >>> spectrum = Spectrum.marchenko_pastur(0.5)
        >>> round(spectrum.zero, 6), round(float((spectrum.masses * spectrum.eigenvalues).sum()), 6)
        (0.5, 0.5)
    """

    eigenvalues: Tensor
    masses: Tensor
    zero: float = 0.0
    mean_inverse: float | None = None

    def __post_init__(self) -> None:
        if self.eigenvalues.ndim != 1 or self.eigenvalues.shape != self.masses.shape:
            raise ValueError(
                f"eigenvalues and masses must be (K,), got {tuple(self.eigenvalues.shape)} and "
                f"{tuple(self.masses.shape)}"
            )
        if not bool((self.eigenvalues > 0).all()):
            raise ValueError("eigenvalues must be positive and finite; what is zero belongs into `zero`")

    @classmethod
    @allowed(alpha=above(0.0), nodes=count(1))
    def marchenko_pastur(cls, alpha: float, *, nodes: int = 4000) -> "Spectrum":
        """The limit for Gaussian inputs: ``rho(l) = sqrt((l+ - l)(l - l-)) / (2 pi l)`` between ``(1 ± sqrt(alpha))²``.

        With ``l = l- + 2 half cos²(theta/2)`` the root becomes ``half sin(theta)``, and the midpoint rule converges
        exponentially. Its error on the pole 1/l is put at zero, where the integrands have the same limit: so the result
        stays exact however near alpha is to 1.

        Args:
            alpha: samples per parameter, > 0.
            nodes: points of the midpoint rule; about 20 sqrt(t) are needed for times up to t.
        """
        theta = math.pi * (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
        half = 2.0 * math.sqrt(alpha)
        eigenvalues = (1.0 - math.sqrt(alpha)) ** 2 + 2.0 * half * torch.cos(theta / 2).square()
        masses = (half * torch.sin(theta)).square() / (2.0 * nodes * eigenvalues)
        inverse = math.inf if alpha == 1.0 else min(alpha, 1.0) / abs(1.0 - alpha)
        return cls(eigenvalues, masses, 1.0 - float(masses.sum()), inverse)

    @classmethod
    def of(cls, features: Tensor, *, tolerance: float = 1e-10) -> "Spectrum":
        """The spectrum of a data set: features (P, N) of any distribution, each direction with mass 1/N.

        Args:
            features: (P, N), scaled as the theory has it (mean squared length 1).
            tolerance: eigenvalues below this share of the largest one count as zero.
        """
        if features.ndim != 2 or not features.numel():
            raise ValueError(f"features must be (samples, parameters), got {tuple(features.shape)}")
        values = torch.linalg.svdvals(features.double()).square().cpu()  # what follows is small, on any machine
        values = values[values > tolerance * values.max()]
        parameters = features.shape[1]
        masses = torch.full_like(values, 1.0 / parameters)
        return cls(values, masses, 1.0 - len(values) / parameters)

    @property
    def rank(self) -> float:
        """Share of directions that learn."""
        return 1.0 - self.zero

    def inverse(self) -> float:
        """Mean of 1/l over the directions that learn."""
        return float((self.masses / self.eigenvalues).sum()) if self.mean_inverse is None else self.mean_inverse


@dataclass(frozen=True, slots=True)
class Optimum:
    """Where an error is smallest.

    Args:
        at: the time or the weight decay; ``inf`` where the error falls for ever.
        error: the test error there.
    """

    at: float
    error: float


class LinearDynamics:
    """Training and test error of linear regression by gradient flow, over time, in closed form.

    Curves take milliseconds: one (times, eigenvalues) table of exponentials. It describes plain gradient descent with a
    small learning rate on a linear model, or on fixed features; with momentum m time runs about 1/(1 - m) times as
    fast. *Not* for predicting a deep network under Adam in numbers.

    Args:
        alpha: samples per parameter, > 0.
        signal: variance of the teacher's entries; default 1.
        noise: variance of the noise on the targets; default 0.
        start: variance of the initial weights; default 0.
        weight_decay: gamma, in units of the summed loss; default 0.
        spectrum: default Marchenko-Pastur, fine enough for the times asked for.

    Raises:
        ValueError: alpha is not positive, a variance or the weight decay is negative or not finite, or a time is
            negative or nan.

    Examples:
        >>> dynamics = LinearDynamics(0.9, noise=0.25)
        >>> stop, late = dynamics.optimal_stopping(), dynamics.late_test_error()
        >>> round(stop.at, 2), round(stop.error, 3), round(late, 3), round(dynamics.optimal_weight_decay().error, 3)
        (2.46, 0.69, 2.6, 0.681)
    """

    @allowed(
        alpha=above(0.0),
        signal=at_least(0.0),
        noise=at_least(0.0),
        start=at_least(0.0),
        weight_decay=at_least(0.0),
    )
    def __init__(
        self,
        alpha: float,
        *,
        signal: float = 1.0,
        noise: float = 0.0,
        start: float = 0.0,
        weight_decay: float = 0.0,
        spectrum: Spectrum | None = None,
    ) -> None:
        self.alpha = alpha
        self.signal = signal
        self.noise = noise
        self.start = start
        self.weight_decay = weight_decay
        self._given = spectrum

    @classmethod
    def from_features(
        cls, features: Tensor, targets: Tensor, *, noise: float | None = None, weight_decay: float = 0.0
    ) -> "LinearDynamics":
        """What theory predicts for a linear layer on these features, with their own spectrum in place of the Gaussian.

        The features are scaled to mean squared length 1, as the theory has it; ``feature_scale`` of the result is the
        mean squared length that they had, and :meth:`steps_for` takes account of it. The student starts at zero, and
        the teacher is taken to be isotropic, which real data are not: read the test curve as a forecast of its shape.
        Training curve and held-out error of the very data set:
        :class:`~regularized.understanding.generalization_dynamics.GradientFlow`.

        Args:
            features: (P, N), for example the inputs of a layer.
            targets: (P,) or (P, C); the variances are means over the C outputs.
            noise: variance of the noise on the targets. None estimates it from the residual of the least-squares fit,
                ``residual * P / (P - N)``, which needs more samples than parameters.
            weight_decay: gamma for the scaled features.

        Raises:
            ValueError: shapes do not fit, nothing but zeros, or the noise is not given and cannot be estimated.
        """
        if features.ndim != 2 or targets.ndim not in (1, 2) or len(targets) != len(features):
            raise ValueError(
                f"features must be (P, N) and targets (P,) or (P, C), got {tuple(features.shape)} and "
                f"{tuple(targets.shape)}"
            )
        x, y = features.detach().double(), targets.detach().double().reshape(len(targets), -1)
        samples, parameters = x.shape
        scale = float(x.square().sum(dim=1).mean())
        if not (math.isfinite(scale) and scale > 0.0):
            raise ValueError(f"features must be finite and not all zero, their mean squared length is {scale}")
        mean = float(x.mean(dim=0).square().sum()) / scale
        if mean > 0.5:
            warnings.warn(
                f"{mean:.0%} of the features' squared length is their mean: one large eigenvalue will dominate. "
                "Subtract the mean first",
                stacklevel=2,
            )
        if noise is None:
            if samples <= parameters:
                raise ValueError(
                    f"with {samples} samples of {parameters} features the noise cannot be estimated (the fit leaves no "
                    "residual); give noise="
                )
            residual = y - x @ torch.linalg.lstsq(x, y).solution
            noise = float(residual.square().mean()) * samples / (samples - parameters)
        dynamics = cls(
            samples / parameters,
            signal=max(0.0, float(y.square().mean()) - noise),
            noise=noise,
            weight_decay=weight_decay,
            spectrum=Spectrum.of(x / math.sqrt(scale)),
        )
        dynamics.feature_scale = scale
        return dynamics

    feature_scale: float = 1.0
    """Mean squared length of the features before they were scaled to 1."""

    def spectrum(self, horizon: float = 1e4) -> Spectrum:
        """The given spectrum, or Marchenko-Pastur fine enough for times up to ``horizon``."""
        if self._given is not None:
            return self._given
        slowest = (1.0 - math.sqrt(self.alpha)) ** 2 + self.weight_decay
        seen = min(horizon, _SETTLED / slowest) if slowest else horizon
        return Spectrum.marchenko_pastur(self.alpha, nodes=max(400, math.ceil(20.0 * math.sqrt(min(seen, 1e9)))))

    def test_error(self, t: Times) -> Tensor:
        """Expected squared error on a fresh sample, noise included: ``E_g(t)``.

        Args:
            t: times >= 0, a number or a tensor of any shape; ``inf`` is allowed.

        Returns:
            Tensor of the shape of ``t``, float64.
        """
        gamma, zero_start = self.weight_decay, self.start

        def modes(spectrum: Spectrum, time: Tensor) -> Tensor:
            lam, d, learned, noise = self._factors(spectrum, time)
            per_mode = zero_start * d.square() + self.signal * (1.0 - lam * learned).square() + self.noise * noise
            # Directions that the data never reach keep the teacher's part, and the start as far as it does not decay.
            frozen = zero_start * torch.exp(-2.0 * gamma * time) + self.signal
            return per_mode @ spectrum.masses + spectrum.zero * frozen

        errors = self.noise + self._over_time(t, modes)
        if self.weight_decay == 0.0 and bool((endless := torch.as_tensor(t).isinf()).any()):
            errors = torch.where(endless, self.late_test_error(), errors)  # the mean of 1/l may diverge
        return errors

    def train_error(self, t: Times) -> Tensor:
        """Mean squared error on the training samples: ``E_t(t)``; shapes as in :meth:`test_error`."""
        rank = min(1.0, self.alpha) if self._given is None else self._given.rank

        def modes(spectrum: Spectrum, time: Tensor) -> Tensor:
            lam, d, learned, _ = self._factors(spectrum, time)
            left = 1.0 - lam * learned
            per_mode = lam * (self.start * d.square() + self.signal * left.square()) + self.noise * left.square()
            # What the quadrature lacks lies at eigenvalues near zero, where nothing of the noise is fitted.
            lacking = (rank - float(spectrum.masses.sum())) * self.noise
            # Residual components beyond the rank are noise that no weights can fit.
            return (per_mode @ spectrum.masses + lacking + (self.alpha - rank) * self.noise) / self.alpha

        return self._over_time(t, modes)

    def _factors(self, spectrum: Spectrum, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per time and mode: l, d = exp(-(l + gamma) t), (1 - d)/(l + gamma), l ((1 - d)/(l + gamma))²."""
        lam = spectrum.eigenvalues
        rate = lam + self.weight_decay
        exponent = rate * time[:, None]
        # -expm1 keeps (1 - d) exact for slow modes, where 1 - exp would cancel.
        learned = -torch.expm1(-exponent) / rate
        return lam, torch.exp(-exponent), learned, lam * learned.square()

    def _over_time(self, t: Times, modes: Callable[[Spectrum, Tensor], Tensor]) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float64)
        if bool((times.isnan() | (times < 0)).any()):
            raise ValueError("times must be >= 0 and not nan")
        flat = times.reshape(-1)
        finite = flat[flat.isfinite()]
        spectrum = self.spectrum(float(finite.max()) if len(finite) else 1.0)
        rows = max(1, _BLOCK // len(spectrum.eigenvalues))
        # Times beyond all rates stand for infinity, since inf * 0 is nan.
        settled = _SETTLED / max(float(spectrum.eigenvalues.min()) + self.weight_decay, 1e-300)
        clipped = torch.where(flat.isfinite(), flat, max(settled, 1e300))
        return torch.cat([modes(spectrum, part) for part in clipped.split(rows)]).reshape(times.shape)

    def late_test_error(self) -> float:
        """Limit of the test error for long training; ``inf`` without weight decay at alpha = 1 with noise."""
        if self.weight_decay == 0.0:
            spectrum = self.spectrum()
            frozen = spectrum.zero if self._given is not None else max(0.0, 1.0 - self.alpha)
            fitted = self.noise * spectrum.inverse() if self.noise else 0.0
            return self.noise + frozen * (self.signal + self.start) + fitted
        return float(self.test_error(math.inf))

    def optimal_stopping(self, *, earliest: float = 1e-2, latest: float = 1e4) -> Optimum:
        """The time of the smallest test error: a scan on a logarithmic grid, then golden-section search.

        Args:
            earliest: start of the scan; default 0.01.
            latest: end of the scan; default 10,000.

        Returns:
            Time and error. ``at`` is ``inf`` where the error still falls at the end of the scan, or is as good there as
            anywhere before: then there is nothing to stop for.
        """
        grid = torch.logspace(math.log10(earliest), math.log10(latest), 801, dtype=torch.float64)
        errors = self.test_error(grid)
        late = self.late_test_error()
        best = int(errors.argmin())
        if late <= float(errors[best]) * (1.0 + 1e-12):
            return Optimum(math.inf, late)
        low, high = (math.log(float(grid[min(max(i, 0), 800)])) for i in (best - 1, best + 1))
        at = math.exp(_golden_section(lambda s: float(self.test_error(math.exp(s))), low, high))
        return Optimum(at, float(self.test_error(at)))

    def optimal_weight_decay(self) -> Optimum:
        """The weight decay of the smallest late test error: noise / signal, exact for an isotropic teacher."""
        if self.signal == 0.0:
            raise ValueError("without signal the best weight decay is infinite")
        at = self.noise / self.signal
        best = LinearDynamics(
            self.alpha,
            signal=self.signal,
            noise=self.noise,
            # With any weight decay the start is forgotten in the end.
            start=0.0 if at else self.start,
            weight_decay=at,
            spectrum=self._given,
        )
        return Optimum(at, best.late_test_error())

    def steps_for(self, t: float, *, lr: float, samples: int, loss: Loss = "mse", momentum: float = 0.0) -> float:
        """Steps of full-batch gradient descent that take as long as time ``t``, feature scale included.

        See :func:`steps_for`.
        """
        return steps_for(t, lr=lr, samples=samples, loss=loss, momentum=momentum) / self.feature_scale


@allowed(lr=above(0.0), momentum=between(0.0, 1.0, "[)"))
def steps_for(t: float, *, lr: float, samples: int, loss: Loss = "mse", momentum: float = 0.0) -> float:
    """Steps of full-batch gradient descent that take as long as time ``t`` of the flow.

    Only for plain gradient descent; with momentum about. Steps on mini-batches, or of Adam, are no such time.

    Args:
        t: time, in units of the theory.
        lr: learning rate, > 0.
        samples: training samples P.
        loss: ``"sum"``: half the sum of squared errors; ``"mean"``: half their mean; ``"mse"`` (default): their mean,
            as ``torch.nn.functional.mse_loss`` with one output has it.
        momentum: of the optimizer, in [0, 1); default 0.

    Raises:
        ValueError: an argument is outside its range.

    Examples:
        >>> round(steps_for(2.43, lr=0.1, samples=300))
        3645
    """
    scale = {"sum": 1.0, "mean": 1.0 / samples, "mse": 2.0 / samples}
    if loss not in scale:
        raise ValueError(f"loss must be one of {sorted(scale)}, got {loss!r}")
    return t * (1.0 - momentum) / (lr * scale[loss])


def _golden_section(error: Callable[[float], float], low: float, high: float, *, rounds: int = 60) -> float:
    """Where a function with one minimum between ``low`` and ``high`` has it."""
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = error(a), error(b)
    for _ in range(rounds):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = error(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = error(b)
    return (low + high) / 2.0
