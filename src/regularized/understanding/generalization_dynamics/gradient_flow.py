"""The exact course of full-batch gradient descent on a linear layer: weights and errors at any time, without training.

What :mod:`~regularized.understanding.generalization_dynamics.dynamics` says of the average data set, here for the one
at hand: one singular value decomposition of the features gives the whole path of ``dw/dt = X^T (y - X w) - gamma w``
(Advani and Saxe 2017). Features may be anything: pixels, random features, the inputs of a network's last layer.
"""

import math

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, at_least
from regularized.understanding.generalization_dynamics.dynamics import Optimum, Times

__all__ = ["GradientFlow"]


class GradientFlow:
    """Linear regression by gradient flow on given data, solved exactly.

    Costs one decomposition of the (P, N) features, then a matrix product for each time. In float64 throughout.

    Args:
        features: (P, N).
        targets: (P,) or (P, C), for example one-hot labels.
        initial: (N,) or (N, C), weights at t = 0; default zeros.
        weight_decay: gamma >= 0, in units of half the *summed* squared error; default 0.

    Attributes:
        eigenvalues: (min(P, N),) of ``X^T X``, in falling order.

    Raises:
        ValueError: shapes do not fit, something is not finite, or the weight decay is negative.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> flow = GradientFlow(x, torch.tensor([1.0, 2.0]))
        >>> flow.weights(torch.tensor([0.0, 1e3])).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """

    @allowed(weight_decay=at_least(0.0))
    def __init__(
        self, features: Tensor, targets: Tensor, *, initial: Tensor | None = None, weight_decay: float = 0.0
    ) -> None:
        if features.ndim != 2 or targets.ndim not in (1, 2) or len(targets) != len(features):
            raise ValueError(
                f"features must be (P, N) and targets (P,) or (P, C), got {tuple(features.shape)} and "
                f"{tuple(targets.shape)}"
            )
        x, y = features.detach().double(), targets.detach().double()
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1)
        shape = (x.shape[1], y.shape[1])
        w = torch.zeros(shape, dtype=x.dtype, device=x.device)
        if initial is not None:
            expected = (shape[0],) if self._flat else shape
            if tuple(initial.shape) != expected:
                raise ValueError(f"initial must be {expected}, got {tuple(initial.shape)}")
            w = initial.detach().double().reshape(shape)
        if not all(bool(tensor.isfinite().all()) for tensor in (x, y, w)):
            raise ValueError("features, targets and initial weights must be finite")
        self.features = x
        self.targets = y
        self.initial = w
        self.weight_decay = weight_decay
        left, singular, self._modes = torch.linalg.svd(x, full_matrices=False)
        self.eigenvalues: Tensor = singular.square()
        self._pull = singular[:, None] * (left.T @ y)  # X^T y in the modes
        self._start = self._modes @ w
        self._frozen = w - self._modes.T @ self._start

    def weights(self, t: Times) -> Tensor:
        """Weights at times ``t`` >= 0, ``inf`` included: (N[, C]) for a number, (T, N[, C]) for a (T,) tensor.

        Mode i goes ``w_i(0) d + (X^T y)_i (1 - d) / (l + gamma)`` with ``d = exp(-(l + gamma) t)``.
        """
        moved, frozen = self._in_modes(t)
        return self._shaped(self._modes.T @ moved + frozen, t)

    def predict(self, features: Tensor, t: Times) -> Tensor:
        """Outputs for (M, N) features at times ``t``: (M[, C]) for a number, (T, M[, C]) for a (T,) tensor."""
        moved, frozen = self._in_modes(t)
        x = features.detach().to(self.features)
        # Through the modes, of which there are at most P: no (T, N, C) table of weights.
        return self._shaped((x @ self._modes.T) @ moved + x @ frozen, t)

    def _in_modes(self, t: Times) -> tuple[Tensor, Tensor]:
        """Weights as coefficients of the modes, (T, K, C), and the part that no sample reaches, (T, N, C)."""
        times = torch.as_tensor(t, dtype=torch.float64, device=self.features.device)
        if times.ndim > 1 or bool((times.isnan() | (times < 0)).any()):
            raise ValueError("times must be a number or a (T,) tensor, >= 0 and not nan")
        rate = self.eigenvalues + self.weight_decay
        finite = times.reshape(-1, 1).clamp(max=1e300)
        exponent = rate * finite
        # A mode without any rate goes its way (X^T y)_i t, which is 0 for it: no division by zero.
        gain = torch.where(rate > 0, -torch.expm1(-exponent) / rate.clamp(min=1e-300), finite)
        moved = torch.exp(-exponent)[:, :, None] * self._start + gain[:, :, None] * self._pull
        decay = torch.exp(-self.weight_decay * finite)[:, :, None] if self.weight_decay else 1.0
        return moved, decay * self._frozen

    def _shaped(self, table: Tensor, t: Times) -> Tensor:
        """(T, ..., C) as the caller has it: without outputs for (P,) targets, without times for a number."""
        table = table[..., 0] if self._flat else table
        return table[0] if torch.as_tensor(t).ndim == 0 else table

    def train_error(self, t: Times) -> Tensor:
        """Mean squared error on the training data (mean over samples and outputs) at times ``t``."""
        return self.test_error(self.features, self.targets[:, 0] if self._flat else self.targets, t)

    def test_error(self, features: Tensor, targets: Tensor, t: Times) -> Tensor:
        """Mean squared error on other data (mean over samples and outputs) at times ``t``."""
        outputs = self.predict(features, t)
        squared = (outputs - targets.to(outputs)).square()
        return squared.mean(dim=tuple(range(torch.as_tensor(t).ndim, squared.ndim)))

    def population_error(self, teacher: Tensor, t: Times, *, noise: float = 0.0) -> Tensor:
        """Expected error on a fresh input with entries of variance 1/N: ``noise + ||w(t) - teacher||² / N``.

        Args:
            teacher: weights that made the targets, of the shape of one set of weights.
            t: times.
            noise: variance of the noise on a target.
        """
        apart = (self.weights(t) - teacher.to(self.features)).square()
        parts = tuple(range(torch.as_tensor(t).ndim, apart.ndim))
        return noise + apart.sum(dim=parts) / (self.features.shape[1] * (1 if self._flat else self.targets.shape[1]))

    def optimal_stopping(
        self, features: Tensor, targets: Tensor, *, earliest: float = 1e-2, latest: float = 1e6, points: int = 400
    ) -> Optimum:
        """The time of the smallest error on held-out data, on a logarithmic grid from ``earliest`` to ``latest``."""
        grid = torch.logspace(math.log10(earliest), math.log10(latest), points, dtype=torch.float64)
        errors = torch.cat([self.test_error(features, targets, part) for part in grid.split(25)])
        best = int(errors.argmin())
        return Optimum(float(grid[best]), float(errors[best]))
