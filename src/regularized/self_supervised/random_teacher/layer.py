"""The projection head of DINO: a perceptron, a bottleneck of unit length, and very many outputs.

    z = W normalise(A gelu-mlp(x) + a)

Shapes: B samples, E features of the encoder, K of the bottleneck, C outputs.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, count

__all__ = ["BottleneckHead", "EncoderWithHead"]


class BottleneckHead(nn.Module):
    """The head on an encoder while it is trained without labels; thrown away afterwards.

    Args:
        in_features: E, width of the encoder's output.
        hidden: widths of the perceptron, a GELU after each; default (2048, 2048) (the official configuration).
        bottleneck: K; default 256 (official). The feature is divided by its length, at least 1e-12.
        out_features: C, at least 2; default 65536 (official). The last matrix has no bias.
        weight_norm: divide each row of the last matrix by its length; default False. The official configuration asks
            for it, but its layer computes the normalised matrix and then uses the other one, so the trained results
            had none.
        generator: draws the weights, truncated normal of deviation 0.02, on the CPU; biases are zero. None is the
            global one.

    Raises:
        ValueError: a width is not positive, or ``out_features`` < 2.

    Examples:
        >>> head = BottleneckHead(8, hidden=(16,), bottleneck=4, out_features=32)
        >>> head(torch.randn(5, 8)).shape, head.features(torch.randn(5, 8)).norm(dim=1).round().tolist()
        (torch.Size([5, 32]), [1.0, 1.0, 1.0, 1.0, 1.0])
    """

    @allowed(out_features=count(2, "a softmax over one output is always 1"))
    def __init__(
        self,
        in_features: int,
        *,
        hidden: Sequence[int] = (2048, 2048),
        bottleneck: int = 256,
        out_features: int = 65536,
        weight_norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden, bottleneck]
        if min(widths) < 1:
            raise ValueError(
                f"widths must be positive, got in_features={in_features}, hidden={tuple(hidden)}, "
                f"bottleneck={bottleneck}"
            )
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp: nn.Sequential = nn.Sequential(*layers)
        self.bottleneck: nn.Linear = nn.Linear(widths[-2], bottleneck)
        self.outputs: nn.Linear = nn.Linear(bottleneck, out_features, bias=False)
        self.weight_norm = weight_norm
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew: truncated normal, deviation 0.02, cut at +-2; biases zero."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                drawn = torch.empty(part.weight.shape)  # on the CPU: one stream, whatever the device
                nn.init.trunc_normal_(drawn, std=0.02, generator=generator)
                with torch.no_grad():
                    part.weight.copy_(drawn)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    @property
    def weight(self) -> Tensor:
        """(C, K) the last matrix, as it is used."""
        matrix = self.outputs.weight
        return F.normalize(matrix, dim=1, eps=1e-12) if self.weight_norm else matrix

    def features(self, x: Tensor) -> Tensor:
        """(B, E) to the bottleneck's (B, K) of unit length."""
        return F.normalize(self.bottleneck(self.mlp(x)), dim=-1, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(B, E) to raw outputs (B, C)."""
        return F.linear(self.features(x), self.weight)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"weight_norm={self.weight_norm}"


class EncoderWithHead(nn.Module):
    """An encoder with its projection head. After the training take ``encoder`` and drop the rest.

    Args:
        encoder: any module to (B, E).
        head: the head; E is its ``in_features``.

    Raises:
        TypeError: ``head`` is not a :class:`BottleneckHead`.

    Examples:
        >>> net = EncoderWithHead(nn.Flatten(), BottleneckHead(8, hidden=(16,), bottleneck=4, out_features=32))
        >>> x = torch.randn(5, 2, 4)
        >>> torch.equal(net(x), F.linear(net.features(x), net.weight))
        True
    """

    def __init__(self, encoder: nn.Module, head: BottleneckHead) -> None:
        super().__init__()
        if not isinstance(head, BottleneckHead):
            raise TypeError(
                f"head must be a BottleneckHead, got {type(head).__name__}; any other network of your own can be "
                "student or teacher as it is, without this class"
            )
        self.encoder = encoder
        self.head = head

    @property
    def weight(self) -> Tensor:
        """(C, K) the last matrix of the head."""
        return self.head.weight

    def features(self, x: Any) -> Tensor:
        """Inputs to the bottleneck's (B, K)."""
        return self.head.features(self.encoder(x))

    def forward(self, x: Any) -> Tensor:
        """Inputs to raw outputs (B, C)."""
        out: Tensor = self.head(self.encoder(x))
        return out
