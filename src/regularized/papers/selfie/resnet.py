"""ResNet-50 for images of 32 pixels, pre-activation as in the re-implementation, cut behind its third stage."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["resnet50_parts"]


class _Bottleneck(nn.Module):
    """Norm, ReLU and a convolution, three times; the shortcut leaves behind the first ReLU where shapes change."""

    def __init__(self, ins: int, width: int, stride: int) -> None:
        super().__init__()
        outs = 4 * width
        self.norms: nn.ModuleList = nn.ModuleList(nn.BatchNorm2d(n) for n in (ins, width, width))
        self.first: nn.Conv2d = nn.Conv2d(ins, width, 1, bias=False)
        self.second: nn.Conv2d = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.third: nn.Conv2d = nn.Conv2d(width, outs, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride > 1 or ins != outs:
            self.shortcut = nn.Conv2d(ins, outs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, ins, H, W) to (n, 4 width, H / stride, W / stride)."""
        active = F.relu(self.norms[0](x))
        beside = x if self.shortcut is None else self.shortcut(active)
        out = self.first(active)
        out = self.second(F.relu(self.norms[1](out)))
        out = self.third(F.relu(self.norms[2](out)))
        total: Tensor = out + beside
        return total


def resnet50_parts(classes: int) -> tuple[nn.Module, nn.Module]:
    """Stem and three stages, to 1,024 channels; and the fourth stage with the head.

    Examples:
        >>> import torch
        >>> trunk, rest = resnet50_parts(10)
        >>> features = trunk(torch.zeros(2, 3, 8, 8))
        >>> features.shape, rest(features).shape
        (torch.Size([2, 1024, 2, 2]), torch.Size([2, 10]))
    """
    ins = 64
    stages = []
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        blocks = []
        for number in range(depth):
            blocks.append(_Bottleneck(ins, width, stride if number == 0 else 1))
            ins = 4 * width
        stages.append(nn.Sequential(*blocks))
    trunk = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), *stages[:3])
    ending = [nn.BatchNorm2d(ins), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ins, classes)]
    return trunk, nn.Sequential(stages[3], *ending)
