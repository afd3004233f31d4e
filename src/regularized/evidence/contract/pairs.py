"""Two techniques in one loss: their gradients add up, and neither touches what the other remembers."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regularized.training.objective import Objective
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

__all__ = ["check_pair"]


class _Stepped(NamedTuple):
    objective: Objective
    gradients: Mapping[str, Tensor]


def check_pair(
    model: Callable[[], nn.Module], terms: Callable[[Collection[int]], Mapping[str, nn.Module]], batch: Batch
) -> None:
    """Run one step of plain training, of each technique, and of both.

    Terms are summed, and so the gradient of both is that of the first and of the second, less that of the plain task,
    which both of these hold. It is compared in the parameters that all four have: surgery may bring others.

    Args:
        model: builds the plain model; a seed is set before each call.
        terms: ``terms(members)`` builds the terms of a loss, by names: those of the members (0, 1, both, or none) and
            the plain task.
        batch: a batch that both can use.

    Raises:
        AssertionError: gradients are not the sum; or a term remembers something else than it does alone, or in the same
            memory as the other's.

    Examples:
        >>> from regularized.training.terms import CrossEntropy, Ridge
        >>> batch = Batch(torch.randn(6, 3), torch.arange(6) % 2)
        >>> penalties = [{"weight": Ridge(["weight"], weight=0.1)}, {"bias": Ridge(["bias"], weight=0.1)}]
        >>> check_pair(
        ...     lambda: nn.Linear(3, 2),
        ...     lambda members: {"task": CrossEntropy()} | {k: v for i in members for k, v in penalties[i].items()},
        ...     batch,
        ... )
    """
    plain, first, second, both = (_step(model, terms(members), batch) for members in ((), (0,), (1,), (0, 1)))
    names = set(plain.gradients) & set(first.gradients) & set(second.gradients) & set(both.gradients)
    assert names, "no parameter is trained with and without the two"
    for name in sorted(names):
        expected = first.gradients[name] + second.gradients[name] - plain.gradients[name]
        scale = max(float(expected.abs().max()), 1e-3)
        apart = float((both.gradients[name] - expected).abs().max()) / scale
        assert apart < 1e-4, f"the gradient of {name} is not the sum of the two: {apart:.2g} of its largest entry apart"
    alone = {**_remembered(first.objective), **_remembered(second.objective)}
    for name, state in _remembered(both.objective).items():
        for key, value in state.items():
            assert _same(value, alone[name][key]), f"{key} of term {name!r} is not what it is alone"
    _check_apart(both.objective)


def _step(model: Callable[[], nn.Module], terms: Mapping[str, nn.Module], batch: Batch) -> _Stepped:
    torch.manual_seed(0)
    net = model()
    objective = Objective(terms)
    for attach in objective.moments("attach"):
        attach(net)
    for moment in ("reset", "epoch_start"):
        for call in objective.moments(moment):
            call() if moment == "reset" else call(Progress(0, 2))
    torch.manual_seed(1)
    step = Step(net, batch, Progress(0, 2))
    objective.loss(step, objective.counts([batch])).backward()
    for before in objective.moments("before_step"):
        before(step)
    return _Stepped(objective, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})


def _remembered(objective: Objective) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value for key, value in term.state_dict().items() if isinstance(value, Tensor)}
        for name, term in objective.terms.items()
    }


def _same(value: Tensor, other: Tensor) -> bool:
    """Equal up to rounding: a change of the weights' form, which computes the same, may round otherwise."""
    if not value.is_floating_point():
        return torch.equal(value, other)
    return value.shape == other.shape and torch.allclose(value, other, rtol=1e-4, atol=1e-6, equal_nan=True)


def _check_apart(objective: Objective) -> None:
    """No tensor of one term's state is another's."""
    owners: dict[int, str] = {}
    for name, term in objective.terms.items():
        for tensor in (*term.parameters(), *term.buffers()):
            if tensor.numel():
                owner = owners.setdefault(tensor.data_ptr(), name)
                assert owner == name, f"terms {owner!r} and {name!r} remember in the same memory"
