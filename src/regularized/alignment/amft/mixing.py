"""The mixture of two losses and its gradient, whoever decides on the weight."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from regularized.alignment.amft.meta_gradient import Grads
from regularized.training.progress import Progress

__all__ = ["Mixer", "Moved", "gradients_of", "mixture", "set_gradient", "weighted"]


class Moved(NamedTuple):
    """What a step did to mu: 0-d tensors on the device, in float64 but the loss.

    Attributes:
        mu: the weight that the step was made with.
        meta: what the meta-gradient added to it, ``eta_mu g_mu``; 0 on steps without one.
        entropy: what entropy added, ``eta_H (H* - H)``. Where its sum from one meta step to the next is far larger than
            ``meta``, entropy alone drives mu.
        loss: the mixed loss, detached.
    """

    mu: Tensor
    meta: Tensor
    entropy: Tensor
    loss: Tensor


class Mixer(Protocol):
    """What mixes two losses and leaves the gradient of the mixture in ``.grad``."""

    @property
    def uses_entropy(self) -> bool:
        """Whether the entropy of the policy decides on the weight, and a target has to be set."""
        ...

    def needs(self, progress: Progress) -> tuple[bool, bool]:
        """Whether the step at a position needs the first loss, and the second one."""
        ...

    def set_target_entropy(self, entropy: Tensor | float) -> None:
        """Take note of the entropy after the warm-up."""
        ...

    def backward(
        self,
        *,
        sft: Tensor | None,
        rl: Tensor | None,
        params: Iterable[Tensor],
        entropy: Tensor | float | None = None,
        val_loss: Callable[[], Tensor] | None = None,
        lr: float | None = None,
        progress: Progress | None = None,
    ) -> Moved:
        """See :meth:`~regularized.alignment.amft.MetaWeightController.backward`."""
        ...


def weighted(sft: Tensor | None, rl: Tensor | None, mu: Tensor, *, imitate: bool, explore: bool) -> Tensor:
    """``(1 - mu) rl + mu sft``. A loss that can have no weight takes no part: 0 times infinity is not 0.

    Args:
        sft: scalar with its graph.
        rl: scalar with its graph.
        mu: scalar.
        imitate: whether ``sft`` takes part.
        explore: whether ``rl`` does.

    Raises:
        ValueError: a loss that takes part is missing, or has no graph.

    Examples:
        >>> one = torch.ones((), requires_grad=True)
        >>> weighted(one, 3.0 * one, torch.tensor(0.25), imitate=True, explore=True).item()
        2.5
    """
    for name, loss, needed in (("sft", sft, imitate), ("rl", rl, explore)):
        if needed and (loss is None or not loss.requires_grad):
            raise ValueError(_NO_GRADIENT.format(name))
    if sft is None or not imitate:
        assert rl is not None
        return rl
    if rl is None or not explore:
        return sft
    mu = mu.to(sft.dtype)
    return (1.0 - mu) * rl + mu * sft


def set_gradient(loss: Tensor, params: Sequence[Tensor]) -> None:
    """Put the gradient of a loss into ``.grad`` of these parameters, and of no others.

    Args:
        loss: scalar with its graph.
        params: what it is differentiated by; where it does not reach one, that gets None.
    """
    for p in params:
        p.grad = None
    torch.autograd.backward(loss, inputs=params)


def gradients_of(name: str, loss: Tensor, params: Sequence[Tensor], *, retain_graph: bool = False) -> Grads:
    """Gradients, None where a loss does not reach a parameter.

    Args:
        name: of the loss, for the message.
        loss: scalar with its graph.
        params: what it is differentiated by.
        retain_graph: keep the graph for another loss that shares it.

    Raises:
        ValueError: the loss reaches none of them.
    """
    if not loss.requires_grad:
        raise ValueError(_NO_GRADIENT.format(name))
    grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError(_NO_GRADIENT.format(name))
    return grads


def mixture(g_sft: Grads, g_rl: Grads, mu: Tensor) -> list[Tensor | None]:
    """``(1 - mu) g_rl + mu g_sft``, parameter by parameter; None is 0, and None where both are.

    Examples:
        >>> mixture([torch.tensor(1.0), None], [torch.tensor(3.0), None], torch.tensor(0.25))
        [tensor(2.5000), None]
    """
    mixed: list[Tensor | None] = []
    for sft, rl in zip(g_sft, g_rl, strict=True):
        parts = [weight.to(g.dtype) * g for weight, g in ((1.0 - mu, rl), (mu, sft)) if g is not None]
        mixed.append(sum(parts[1:], parts[0]) if parts else None)
    return mixed


_NO_GRADIENT = "{0} has no gradient with respect to any of the parameters; was it detached, or are params others?"
