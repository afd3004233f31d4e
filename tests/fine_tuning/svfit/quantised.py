"""A quantised layer, for the tests."""

import torch
from torch import Tensor, nn


class Int8Linear(nn.Linear):
    """A quantised layer as other libraries make them: an integer weight, and a forward pass of its own."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features)
        self.scale = float(layer.weight.detach().abs().max()) / 127
        codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def dequantised(self):
        """(o, i) float32."""
        return self.weight.float() * self.scale

    def forward(self, x: Tensor):
        """(..., i) to (..., o)."""
        return nn.functional.linear(x, self.dequantised(), self.bias)
