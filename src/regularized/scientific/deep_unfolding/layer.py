"""Sparse recovery in a few learned iterations: ISTA and IHT as networks whose only parameters are step sizes.

Koshi Nagahisa, Ryo Hayakawa, Youji Iiguni: Comparison between Supervised and Unsupervised Learning in Deep Unfolded
Sparse Signal Recovery, 2025, arXiv 2509.01331. There is no official code.

Signals are seen as ``y = A x + v``. Every layer is a gradient step on the misfit and a threshold that follows from its
size:

    paper                 here                     shape, range
    A                     matrix                   (M, N), usually M < N
    lambda                penalty                  > 0
    gamma_k               steps[k]                 > 0, one number a layer; start 1 / L, L = largest eigenvalue of A^T A
    ISTA, soft threshold  soft_threshold           sign(r) max(|r| - lambda gamma, 0)
    IHT, hard threshold   hard_threshold           r where |r| > sqrt(2 lambda gamma), else 0
    F1, F0                SparseObjective          1/2 ||y - A x||² + lambda ||x||_1, or lambda times the non-zeros

Trained on true signals (supervised) the layers recover better than the converged algorithm, but leave its objective
behind; trained on the objective itself, which needs no signals, they reach its optimum in a fraction of the iterations.
The data term has the factor 1/2; without it the thresholds would differ.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import above, allowed, count
from regularized.scientific.deep_unfolding.loss import check_problem

__all__ = ["Unfolded", "UnfoldedIHT", "UnfoldedISTA", "hard_threshold", "soft_threshold"]


def soft_threshold(r: Tensor, theta: Tensor | float) -> Tensor:
    """Proximal map of ``theta ||x||_1``: shrinks towards 0 by ``theta``.

    Args:
        r: any shape.
        theta: threshold >= 0, a number or broadcastable to ``r``. Its gradient is ``-sign(r)`` where ``|r| > theta``.

    Examples:
        >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([-1.,  0.,  2.])
    """
    # Equal to sign(r) max(|r| - theta, 0), gradients included, in two operations instead of five.
    bound = torch.as_tensor(theta, dtype=r.dtype, device=r.device)
    return r - torch.clamp(r, -bound, bound)


def hard_threshold(r: Tensor, theta: Tensor | float) -> Tensor:
    """Proximal map of ``(theta² / 2) ||x||_0``: keeps what is larger than ``theta``.

    The jump has no derivative, so ``theta`` gets no gradient: step sizes learn through the gradient step alone.

    Args:
        r: any shape.
        theta: threshold >= 0.

    Examples:
        >>> hard_threshold(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([-2.,  0.,  3.])
    """
    return torch.where(r.abs() <= theta, 0.0, r)  # asked this way round, nan stays nan


class Unfolded(nn.Module):
    """Iterations of a proximal gradient method as layers, each with a step size of its own.

    ``x <- prox(x - gamma_k gradient(x, y), gamma_k)``, from ``x = 0``.

    Args:
        gradient: ``gradient(x, y)``, of the smooth part; an ``nn.Module`` where it has tensors that must move along.
        prox: ``prox(r, gamma)``, the proximal map of the other part with step ``gamma``.
        signal: N, entries of a signal.
        layers: number of layers T, >= 1.
        step: the step size that every layer starts with, > 0.

    Attributes:
        steps: (T,) the step sizes: they are the model. Keep them positive with :meth:`clamp_steps_`. Large and small
            ones alternate after training, so that layers in between overshoot: do not clip them to 2/L.

    Raises:
        ValueError: ``layers`` or ``step`` is not positive, or a loaded step size is not.

    Examples:
        >>> ridge = Unfolded(lambda x, y: x - y, lambda r, gamma: r / (1 + gamma), signal=2, layers=50, step=0.5)
        >>> ridge(torch.tensor([[2.0, 4.0]])).detach()
        tensor([[1., 2.]])
    """

    @allowed(layers=count(1), step=above(0.0))
    def __init__(
        self,
        gradient: Callable[[Tensor, Tensor], Tensor],
        prox: Callable[[Tensor, Tensor], Tensor],
        *,
        signal: int,
        layers: int,
        step: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gradient = gradient
        self.prox = prox
        self.signal = signal
        self.steps: nn.Parameter = nn.Parameter(torch.full((layers,), step, dtype=dtype))
        self.register_load_state_dict_post_hook(_check_steps)  # type: ignore[no-untyped-call]

    def forward(
        self, y: Tensor, *, depth: int | None = None, all_layers: bool = False, frozen_layers: int = 0
    ) -> Tensor:
        """Recover signals from measurements.

        Args:
            y: (B, M).
            depth: layers to use; default all.
            all_layers: return the output of every layer, (depth, B, N).
            frozen_layers: the first so many layers run without gradient.

        Returns:
            (B, N), or (depth, B, N).
        """
        depth = len(self.steps) if depth is None else depth
        if not 1 <= depth <= len(self.steps):
            raise ValueError(f"depth must be in 1 ... {len(self.steps)}, got {depth}")
        x = y.new_zeros(*y.shape[:-1], self.signal)
        outputs = []
        for k in range(depth):
            with torch.set_grad_enabled(torch.is_grad_enabled() and k >= frozen_layers):
                x = self.layer(x, y, k)
            outputs.append(x)
        return torch.stack(outputs) if all_layers else x

    def layer(self, x: Tensor, y: Tensor, k: int) -> Tensor:
        """One layer: gradient step, then proximal map."""
        gamma = self.steps[k]
        return self.prox(x - gamma * self.gradient(x, y), gamma)

    @torch.no_grad()
    def clamp_steps_(self, minimum: float = 1e-4) -> None:
        """Keep the step sizes positive, after an update."""
        self.steps.clamp_(min=minimum)

    @torch.no_grad()
    def iterate(self, y: Tensor, iterations: int, *, step: float | None = None) -> Tensor:
        """The plain algorithm: the same iteration with one step size for all, default that of the start (1 / L)."""
        gamma = torch.as_tensor(self._first_step if step is None else step, dtype=y.dtype, device=y.device)
        x = y.new_zeros(*y.shape[:-1], self.signal)
        for _ in range(iterations):
            x = self.prox(x - gamma * self.gradient(x, y), gamma)
        return x

    @property
    def _first_step(self) -> float:
        raise ValueError("give iterate() a step; only UnfoldedISTA and UnfoldedIHT know theirs")


class _Misfit(nn.Module):
    """Gradient of ``1/2 ||y - A x||²``."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.detach().clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ self.matrix.T - y) @ self.matrix


class _UnfoldedSparse(Unfolded):
    """What ISTA and IHT share: the misfit's gradient, 1 / L, and thresholds that follow from the steps or are free."""

    gradient: _Misfit

    def __init__(self, matrix: Tensor, penalty: float, *, layers: int, tie_threshold: bool = True) -> None:
        check_problem(matrix, penalty)
        self.penalty = penalty
        largest = float(torch.linalg.matrix_norm(matrix.double(), 2)) ** 2
        # The gradient is a module, so nn.Module's own machinery must be ready before it is set.
        super().__init__(
            _Misfit(matrix),
            self._prox,
            signal=matrix.shape[1],
            layers=layers,
            step=1.0 / largest,
            dtype=matrix.dtype,
        )
        self.lipschitz = largest
        self.thresholds: nn.Parameter | None = None
        if not tie_threshold:
            self.thresholds = nn.Parameter(self._theta(self.steps.detach()).clone())

    def forward(
        self, y: Tensor, *, depth: int | None = None, all_layers: bool = False, frozen_layers: int = 0
    ) -> Tensor:
        """As in :class:`Unfolded`; measurements are (B, M), a signal a row."""
        rows = self.gradient.matrix.shape[0]
        if y.shape[-1] != rows:
            raise ValueError(
                f"y must be (B, {rows}) for a matrix of shape {tuple(self.gradient.matrix.shape)}, got "
                f"{tuple(y.shape)}; one measurement vector a row"
            )
        return super().forward(y, depth=depth, all_layers=all_layers, frozen_layers=frozen_layers)

    def layer(self, x: Tensor, y: Tensor, k: int) -> Tensor:
        """One layer: gradient step, then threshold."""
        gamma = self.steps[k]
        r = x - gamma * self.gradient(x, y)
        return self._threshold(r, self._theta(gamma) if self.thresholds is None else self.thresholds[k])

    def _prox(self, r: Tensor, gamma: Tensor) -> Tensor:
        return self._threshold(r, self._theta(gamma))

    def _theta(self, gamma: Tensor) -> Tensor:
        raise NotImplementedError

    def _threshold(self, r: Tensor, theta: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def _first_step(self) -> float:
        return 1.0 / self.lipschitz


class UnfoldedISTA(_UnfoldedSparse):
    """ISTA with learned step sizes, for the l1 penalty: ``x <- soft(x - gamma_k A^T (A x - y), lambda gamma_k)``.

    Untrained it *is* ISTA with step 1 / L. A forward pass costs what T iterations of ISTA cost; training adds nothing
    but the backward pass. The trained model is T numbers.

    Use it where the same matrix is used many times. *Not* where the matrix changes from signal to signal, or where a
    thousandth of the objective decides: converge there.

    Args:
        matrix: A, (M, N), real.
        penalty: lambda, > 0.
        layers: T; the literature has 10 to 30.
        tie_threshold: the threshold is lambda times the step, as in the paper (default); False learns one threshold a
            layer beside the step, as LISTA does.

    Raises:
        ValueError: the matrix is not two-dimensional, complex or not finite, the penalty is not positive, or
            measurements have another length than M.

    Examples:
        >>> net = UnfoldedISTA(torch.eye(3), 0.5, layers=2)
        >>> net(torch.tensor([[2.0, -1.0, 0.2]])).detach()
        tensor([[ 1.5000, -0.5000,  0.0000]])
    """

    def _theta(self, gamma: Tensor) -> Tensor:
        return self.penalty * gamma

    def _threshold(self, r: Tensor, theta: Tensor) -> Tensor:
        return soft_threshold(r, theta)


class UnfoldedIHT(_UnfoldedSparse):
    """Iterative hard thresholding with learned step sizes, for the l0 penalty: threshold ``sqrt(2 lambda gamma_k)``.

    The problem is not convex: learned steps find other, usually better minima than the plain iteration.

    Args:
        matrix: as in :class:`UnfoldedISTA`.
        penalty: as there.
        layers: as there.
        tie_threshold: as there; but a free threshold gets no gradient from a jump, so False is refused.

    Raises:
        ValueError: as there, and for ``tie_threshold=False``.

    Examples:
        >>> net = UnfoldedIHT(torch.eye(3), 0.5, layers=2)
        >>> net(torch.tensor([[2.0, -1.5, 0.2]])).detach()
        tensor([[ 2.0000, -1.5000,  0.0000]])
    """

    def __init__(self, matrix: Tensor, penalty: float, *, layers: int, tie_threshold: bool = True) -> None:
        if not tie_threshold:
            raise ValueError(
                "tie_threshold=False learns nothing here: a hard threshold's jump has no gradient. Use UnfoldedISTA"
            )
        super().__init__(matrix, penalty, layers=layers)

    def _theta(self, gamma: Tensor) -> Tensor:
        return (2.0 * self.penalty * gamma).sqrt()

    def _threshold(self, r: Tensor, theta: Tensor) -> Tensor:
        return hard_threshold(r, theta)


def _check_steps(module: nn.Module, _keys: object) -> None:
    steps = module.steps
    if isinstance(steps, Tensor) and not bool((steps > 0).all()):
        raise ValueError(f"step sizes must be positive, got {steps.tolist()}")
