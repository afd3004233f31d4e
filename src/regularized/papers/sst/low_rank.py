"""What SST is compared with: LoRA on frozen random weights, and ReLoRA*, which folds it in and begins anew."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.optimizer_state import forget
from regularized.mechanisms.surgery import match_modules

__all__ = ["LowRankUpdate", "add_updates", "restart_every"]


class LowRankUpdate(nn.Module):
    """A frozen linear layer and a trained product of two thin matrices beside it, which is zero at the start.

    Args:
        linear: its weight is frozen; its bias is trained, as by SST.
        rank: of the product.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = linear.bias
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.empty(linear.out_features, rank))
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """A product of zero, as LoRA begins with: one matrix as a linear layer has it, the other of zeros."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    @torch.no_grad()
    def fold(self) -> None:
        """Add the product to the weight, and begin anew."""
        self.weight.add_(self.up @ self.down)
        self.begin()

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        return F.linear(x, self.weight, self.bias) + (x @ self.down.T) @ self.up.T

    def merged(self) -> Tensor:
        """The whole weight, (o, i)."""
        return self.weight + self.up @ self.down


def add_updates(model: nn.Module, rank: int, targets: Iterable[str]) -> list[LowRankUpdate]:
    """Put an update beside each linear layer below the targets."""
    updates = []
    for above in match_modules(model, targets):
        for name, linear in list(model.get_submodule(above).named_modules(prefix=above)):
            if isinstance(linear, nn.Linear):
                owner, _, attribute = name.rpartition(".")
                updates.append(LowRankUpdate(linear, rank))
                setattr(model.get_submodule(owner), attribute, updates[-1])
    return updates


def restart_every(steps: int, optimizer: torch.optim.Optimizer, updates: list[LowRankUpdate], *, warm_up: int) -> None:
    """ReLoRA*: after so many steps fold the products in, forget their moments, and let the rate rise again.

    The asterisk is the SST paper's: all moments are forgotten (ReLoRA keeps 1 %), and there is no full-rank warm start.

    Args:
        steps: from one restart to the next.
        optimizer: whoever calls it sets the rates of its groups before each step.
        updates: the layers.
        warm_up: steps over which the rates rise after a restart.
    """
    done = 0

    def before(one: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if done % steps < warm_up:
            for group in one.param_groups:
                group["lr"] *= (done % steps + 1) / warm_up

    def after(one: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        nonlocal done
        done += 1
        if done % steps == 0:
            for update in updates:
                update.fold()
            forget(one, [p for update in updates for p in (update.down, update.up)])

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
