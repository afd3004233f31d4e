"""The loss between networks: along the straight line between two, and on the plane through three.

Two networks that were trained from one checkpoint in different orders of the data are *linearly connected* if the error
does not rise on the way from one to the other. If they are, the checkpoint lies in one basin already (Frankle et al.
2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis").
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from regularized.mechanisms.ranges import allowed, count

__all__ = ["WeightPlane", "barrier", "errors_between", "mixed_weights"]


@torch.no_grad()
def mixed_weights(one: nn.Module, other: nn.Module, share: float, *, into: nn.Module) -> nn.Module:
    """Write ``(1 - share) one + share other`` into a third network: parameters and floating-point buffers.

    Args:
        one: network at share 0.
        other: network at share 1, of the same structure.
        share: any real number; beyond [0, 1] it extrapolates.
        into: network of the same structure that takes the result; other buffers are those of ``one``.

    Returns:
        ``into``.

    Raises:
        ValueError: the structures differ; the first differing tensor is named.

    Examples:
        >>> a, b, c = (nn.Linear(1, 1, bias=False) for _ in range(3))
        >>> a.weight.data, b.weight.data = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> mixed_weights(a, b, 0.25, into=c).weight.item()
        0.5
    """
    states = [network.state_dict() for network in (one, other, into)]
    for state in states[1:]:
        _check_alike(states[0], state)
    for name, target in states[2].items():
        start, end = states[0][name], states[1][name]
        target.copy_(start.lerp(end, share) if start.is_floating_point() else start)
    return into


@allowed(points=count(3, "both ends and one between them"))
def errors_between(
    one: nn.Module,
    other: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    points: int = 11,
    calibrate: Callable[[nn.Module], object] | None = None,
) -> Tensor:
    """The error at equally spaced points of the straight line between two networks, both ends included.

    Args:
        one: network at the start.
        other: network at the end, of the same structure.
        evaluate: the error (or loss) of a network, lower is better.
        points: at least 3; default 11.
        calibrate: called with the network at each point, the ends included, before it is evaluated. Mixed statistics
            of batch normalisation fit no network: with such layers give
            ``lambda model: torch.optim.swa_utils.update_bn(batches, model)``.

    Returns:
        (points,) float64 errors. Neither network is changed.

    Raises:
        ValueError: fewer than 3 points, or the structures differ.

    Examples:
        >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> a.weight.data, b.weight.data = torch.tensor([[-1.0]]), torch.tensor([[1.0]])
        >>> errors_between(a, b, lambda model: 1 - model.weight.item() ** 2, points=3).tolist()
        [0.0, 1.0, 0.0]
    """
    between = copy.deepcopy(one)
    errors = []
    for share in torch.linspace(0.0, 1.0, points, dtype=torch.float64).tolist():
        mixed_weights(one, other, share, into=between)
        if calibrate is not None:
            calibrate(between)
        errors.append(float(evaluate(between)))
    return torch.tensor(errors, dtype=torch.float64)


def barrier(errors: Tensor) -> float:
    """How far the error rises above the line between its two ends, at most; 0 or below is no barrier.

    Args:
        errors: (P,) from :func:`errors_between`.

    Returns:
        ``max_t E(t) - ((1 - t) E(0) + t E(1))`` over the points strictly between the ends. Frankle et al. subtract the
        mean of both ends; for ends of equal error, which is the case of interest, that is the same.

    Raises:
        ValueError: fewer than 3 points.

    Examples:
        >>> round(barrier(torch.tensor([0.1, 0.4, 0.3])), 4)
        0.2
    """
    if errors.ndim != 1 or len(errors) < 3:
        raise ValueError(f"barrier needs the errors at 3 points or more, shape (P,); got {tuple(errors.shape)}")
    straight = torch.linspace(0.0, 1.0, len(errors), dtype=torch.float64, device=errors.device)
    rise = errors.double() - torch.lerp(errors[:1].double(), errors[-1:].double(), straight)
    return float(rise[1:-1].max())


class WeightPlane:
    """The plane through three networks, with coordinates that keep distances: to draw a loss landscape.

    The first network is the origin, the second lies on the first axis, the third anywhere in the plane. Buffers are not
    part of it.

    Args:
        networks: three networks of one structure, no two of them equal and not on one line.

    Attributes:
        corners: (3, 2) float64 coordinates of the three networks.

    Raises:
        ValueError: not three, of different sizes, or on one line.

    Examples:
        >>> a, b, c = (nn.Linear(1, 2, bias=False) for _ in range(3))
        >>> a.weight.data, b.weight.data = torch.zeros(2, 1), torch.tensor([[3.0], [0.0]])
        >>> c.weight.data = torch.tensor([[1.0], [2.0]])
        >>> plane = WeightPlane([a, b, c])
        >>> plane.corners.tolist()
        [[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]]
        >>> plane.place(a, 1.0, 2.0).weight.flatten().tolist()
        [1.0, 2.0]
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        if len(networks) != 3:
            raise ValueError(f"a plane needs three networks, got {len(networks)}")
        vectors = [parameters_to_vector(network.parameters()).detach().double() for network in networks]
        if len({v.numel() for v in vectors}) != 1:
            raise ValueError(f"the networks must have one structure, got {[v.numel() for v in vectors]} parameters")
        self._origin = vectors[0]
        first, second = vectors[1] - vectors[0], vectors[2] - vectors[0]
        along = first / first.norm()
        across = second - (second @ along) * along
        if not bool(across.norm() > 1e-9 * second.norm()):
            raise ValueError("the three networks lie on one line (or two are equal) and give no plane")
        self._axes = torch.stack([along, across / across.norm()])
        self.corners: Tensor = torch.stack([self.coordinates(network) for network in networks]).cpu()

    def coordinates(self, network: nn.Module) -> Tensor:
        """(2,) float64 coordinates of a network, of its nearest point where it lies outside the plane."""
        vector = parameters_to_vector(network.parameters()).detach().double()
        return self._axes @ (vector - self._origin)

    @torch.no_grad()
    def place(self, network: nn.Module, first: float, second: float) -> nn.Module:
        """Write the parameters at a point of the plane into a network of the same structure, and return it."""
        point = self._origin + first * self._axes[0] + second * self._axes[1]
        like = next(network.parameters())
        vector_to_parameters(point.to(like), network.parameters())
        return network


def _check_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in ours.items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            found = tuple(theirs[name].shape) if name in theirs else "missing"
            raise ValueError(
                f"the networks must have one structure; {name!r} has shape {tuple(tensor.shape)} in one and is {found} "
                "in another"
            )
    if extra := [name for name in theirs if name not in ours]:
        raise ValueError(f"the networks must have one structure; {extra[0]!r} is in one of them only")
