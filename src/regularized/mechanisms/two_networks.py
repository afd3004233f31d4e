"""What procedures of two networks share: they must really be two, and they predict together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["check_distinct", "evaluating", "mean_logits"]


def check_distinct(networks: Sequence[nn.Module], *, remedy: str) -> None:
    """Refuse networks that are one and the same object, or share parameters.

    Two networks help one another because they err differently; one that looks at itself confirms its own mistakes.

    Args:
        networks: the networks.
        remedy: what the user has to do instead, the end of the message.

    Raises:
        ValueError: they are not distinct; shared parameters are named.

    Examples:
        >>> check_distinct([nn.Linear(2, 2), nn.Linear(2, 2)], remedy="build another one")
    """
    owners: dict[int, tuple[int, str]] = {}
    for number, network in enumerate(networks):
        if any(network is other for other in networks[:number]):
            raise ValueError(f"the two networks are the same network twice; {remedy}")
        for name, parameter in network.named_parameters():
            other, same = owners.setdefault(id(parameter), (number, name))
            if other != number:
                raise ValueError(
                    f"the two networks share parameters: {same!r} of one is {name!r} of the other; {remedy}"
                )


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the mode that it had, frozen ones included.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
        >>> with evaluating(model):
        ...     assert not model[1].training
        >>> model[0].training, model[1].training
        (False, True)
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def mean_logits(networks: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """Mean of the networks' outputs in evaluation mode, without gradient; the modes are put back.

    Args:
        networks: one or more, each called as ``network(inputs)``.
        inputs: (B, ...).

    Returns:
        (B, C).

    Examples:
        >>> a, b = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> x = torch.ones(4, 2)
        >>> torch.allclose(mean_logits([a, b], x), (a(x) + b(x)) / 2)
        True
    """
    with evaluating(*networks):
        return torch.stack([network(inputs) for network in networks]).mean(dim=0)
