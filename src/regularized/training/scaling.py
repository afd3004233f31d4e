"""Half precision: the loss is scaled up before the backward pass, so that small gradients do not vanish in float16.

Where a scaled gradient overflows, the optimizer step is left out and the scale halved; after many steps without one it
is doubled. torch's ``GradScaler`` keeps the scale. This module adds what several processes need: whether a gradient
overflowed is exchanged, so that all leave out the same steps.
"""

from types import SimpleNamespace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularized.mechanisms.distributed import local_part, world_size

__all__ = ["LossScaler", "check_fp16"]


class LossScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose verdict is that of all processes.

    Args:
        device: type of the device, ``"cpu"`` or ``"cuda"``.

    Examples:
        >>> scaler, weight = LossScaler("cpu"), torch.ones(2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scaler.scale(weight.sum()).backward()
        >>> scaler.unscale(optimizer), weight.grad.tolist()
        (True, [1.0, 1.0])
        >>> scaler.scale(weight.sum() * 1e38).backward()  # times 65536
        >>> scaler.unscale(optimizer), scaler.get_scale()
        (False, 32768.0)
    """

    def __init__(self, device: str) -> None:
        super().__init__(device)

    def unscale(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide the gradients by the scale, and take the next one.

        Makes the host wait for the device.

        Returns:
            Whether all gradients are finite, in all processes: otherwise this step must be left out.
        """
        self.unscale_(optimizer)
        found = self._found_inf_per_device(optimizer)
        if not found:  # no gradient at all
            self._per_optimizer_states.clear()
            return True
        fine = not any(bool(value.item()) for value in found.values())
        self.update()
        return fine

    def start_at(self, scale: float) -> None:
        """Choose the first scale, before any step; it is 65536 otherwise.

        Examples:
            >>> scaler = LossScaler("cpu")
            >>> scaler.start_at(256.0)
            >>> scaler.get_scale()
            256.0
        """
        self.load_state_dict({**self.state_dict(), "scale": scale})

    @property
    def is_spent(self) -> bool:
        """Whether the scale is below 1: then it was not the scale that made the gradients overflow."""
        return self.get_scale() < 1.0

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # One fused operation takes no mixture of sharded and whole gradients: each process looks at what it holds.
        held = [local_part(p.detach()) for p in trained]
        for part, p in zip(held, trained, strict=True):
            part.grad = local_part(cast(Tensor, p.grad))
        shards = cast(torch.optim.Optimizer, SimpleNamespace(param_groups=[{"params": held}]))
        found = super()._unscale_grads_(shards, inv_scale, found_inf, allow_fp16)
        if world_size() > 1:
            # A process may have gradients where another one has none: all exchange the same, one number.
            any_found = torch.stack([found_inf.clone(), *(v.to(found_inf.device) for v in found.values())]).amax(0)
            dist.all_reduce(any_found, dist.ReduceOp.MAX)
            found = {device: any_found.to(device) for device in found or {found_inf.device: found_inf}}
        return found


def check_fp16(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what float16 with a scaled loss cannot train.

    Raises:
        ValueError: weights that are float16 themselves, or an optimizer that asks for its gradients itself.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> check_fp16(model, torch.optim.SGD(model.parameters(), lr=0.1))
    """
    if half := [name for name, p in model.named_parameters() if p.dtype == torch.float16]:
        raise ValueError(
            f'precision="fp16" keeps float32 weights and computes forward passes in float16, but {half[0]!r} is '
            "float16 itself, too coarse for updates; give model.float()"
        )
    if hasattr(optimizer, "backward"):
        raise ValueError(
            f"{type(optimizer).__name__} asks for gradients at several weights in a step, which a scaled loss would "
            'falsify; give precision="bf16", which needs no scale, or "no"'
        )
