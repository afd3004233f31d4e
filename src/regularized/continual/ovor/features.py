"""What a frozen network hands to its head, computed once and kept."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from regularized.training.step import Batch, call_model

__all__ = ["extract_features"]


@torch.no_grad()
def extract_features(model: nn.Module, batches: Iterable[Batch], *, head: str = "head") -> tuple[Tensor, Tensor]:
    """Features in front of the head, and the labels, of a pass over some data.

    The network is asked in evaluation mode; its mode is as before afterwards.

    Args:
        model: any classifier whose head is a module that is called once, with features (B, d).
        batches: with targets.
        head: dotted name of the head; default ``"head"``.

    Returns:
        (n, d) features and (n,) labels, on the model's device and without a graph.

    Raises:
        AttributeError: there is no such module.
        ValueError: the head was not called with (B, d), or there is no batch, or one without targets.

    Examples:
        >>> from collections import OrderedDict
        >>> model = nn.Sequential(OrderedDict(body=nn.Flatten(), head=nn.Linear(4, 2)))
        >>> features, labels = extract_features(model, [Batch(torch.ones(3, 2, 2), torch.tensor([0, 1, 0]))])
        >>> features.shape, labels.tolist()
        (torch.Size([3, 4]), [0, 1, 0])
    """
    parts: list[Tensor] = []
    labels: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        parts.append(inputs[0])

    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    handle = model.get_submodule(head).register_forward_pre_hook(keep)
    model.eval()
    try:
        for number, batch in enumerate(batches, start=1):
            batch = batch.map(lambda tensor: tensor.to(device))
            call_model(model, batch.inputs)
            if len(parts) != number or parts[-1].ndim != 2 or batch.targets is None:
                got = [tuple(part.shape) for part in parts[number - 1 :]]
                raise ValueError(
                    f"head {head!r} must be called once for each batch with features (B, d), and a batch must have "
                    f"targets; got {got} and {'no ' if batch.targets is None else ''}targets: name the last layer"
                )
            labels.append(batch.targets)
    finally:
        handle.remove()
        for module, mode in training.items():
            module.training = mode
    if not parts:
        raise ValueError("there are no features: the data gave no batch")
    return torch.cat(parts), torch.cat(labels)
