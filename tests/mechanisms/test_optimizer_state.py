"""Optimizers found by what they train, and parameters that they forget."""

import gc

import pytest
import torch

from regularized.mechanisms.optimizer_state import bind_at_first_step, forget


class Owner:
    def __init__(self):
        self.waiting, self.bound, self.steps = [torch.nn.Parameter(torch.ones(2))], [], 0

    def awaited(self):
        return [] if self.bound else self.waiting

    def bind(self, optimizer):
        self.bound.append(optimizer)

    def before_optimizer(self, optimizer):
        self.steps += 1


def test_found_once_and_before_its_first_step():
    """Fails when another optimizer is taken, the right one twice, or only after its first step."""
    owner = Owner()
    handle = bind_at_first_step(owner)
    try:
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()
        assert not owner.bound
        optimizer = torch.optim.SGD(owner.waiting, lr=0.1)
        optimizer.step()
        optimizer.step()
        assert owner.bound == [optimizer]
        assert owner.steps == 1
    finally:
        handle.remove()


def test_the_owner_is_not_kept_alive():
    """Fails when waiting for an optimizer keeps a model in memory, or a dead owner breaks everybody's steps."""
    handle = bind_at_first_step(Owner())
    gc.collect()
    try:
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adadelta])
def test_forgotten_parameters_go_on_as_new_ones(kind):
    """Fails when a state survives, or that of another parameter does not; Adagrad makes its state when it is built."""
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = kind([first, second], lr=0.1, **options)

    def step(one):
        (first.square().sum() + second.square().sum()).backward()
        one.step()
        one.zero_grad()

    step(optimizer)
    kept = {name: torch.as_tensor(value).clone() for name, value in optimizer.state[second].items()}
    forget(optimizer, [first])
    assert all(torch.equal(kept[name], torch.as_tensor(value)) for name, value in optimizer.state[second].items())
    fresh = torch.nn.Parameter(first.detach().clone())
    step(optimizer)
    other = kind([fresh], lr=0.1, **options)
    fresh.square().sum().backward()
    other.step()
    torch.testing.assert_close(first, fresh)


def test_lbfgs_is_refused():
    """Fails when an optimizer whose history is over all parameters seems to forget one."""
    with pytest.raises(ValueError, match="LBFGS"):
        forget(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(1))]), [])
