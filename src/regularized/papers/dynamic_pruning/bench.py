"""Cost of a training step beside a plain one, and of inference that leaves filters out beside the dense network."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from regularized.compression.dynamic_pruning.sparse import sparse_inference
from regularized.compression.dynamic_pruning.term import DynamicPruning, dynamic_layers, pruning_param_groups
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, device, image_net, placed, stepper

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)


def vgg(width: int) -> nn.Sequential:
    """VGG-16 with batch normalisation for images of 32 x 32; its width is 64."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        for _ in range(depth):
            filters = width * min(2**stage, 8)
            layers += [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


def _training(build: Callable[[], nn.Module], size: int, learned: bool) -> tuple[StepFunction, StepFunction]:
    x, y = batch((size, 3, 32, 32))
    plain, pruned = placed(build), placed(build)
    pruning = DynamicPruning(pruned, mass=0.9)
    pruning.begin_epoch(int(learned), 2)  # the second half of the training is without the mask loss
    optimizer = torch.optim.SGD(pruning_param_groups(pruned, lr=1e-3, weight_decay=5e-4), momentum=0.9)

    def loss() -> Tensor:
        return F.cross_entropy(pruned(x), y) + pruning.mask_loss()

    return classifier_step(plain, x, y, SGD), stepper(loss, optimizer)


def _keep(network: nn.Module, share: float) -> None:
    """Predictors that want a share of each layer's filters, whatever they see; asking them costs what it costs."""
    draws = torch.Generator().manual_seed(0)
    for layer in dynamic_layers(network).values():
        linear = layer.predictor.get_submodule("linear")
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.mul_(1e-3)
            order = torch.randperm(linear.out_features, generator=draws).to(linear.bias.device)
            linear.bias.copy_(torch.where(order < round(share * linear.out_features), 20.0, -20.0))


def _inference(width: int, share: float, size: int = 1) -> tuple[StepFunction, StepFunction]:
    """The dense network, batch normalisation folded into its weights, and the sparse one."""
    x, _ = batch((size, 3, 32, 32))
    pruned = placed(vgg, width).eval()
    dense = fuse(pruned).requires_grad_(False)
    DynamicPruning(pruned, mass=0.9)
    _keep(pruned, share)
    sparse = sparse_inference(pruned)

    def call(network: nn.Module) -> None:
        with torch.inference_mode():
            network(x)

    return partial(call, dense), partial(call, sparse)


def _bytes(width: int) -> tuple[float, float]:
    """Weights and statistics of the dense network, and with predictors beside them: nothing gets smaller."""
    pruned = placed(vgg, width)
    before = sum(tensor.nbytes for tensor in pruned.state_dict().values())
    DynamicPruning(pruned, mass=0.9)
    return float(before), float(sum(tensor.nbytes for tensor in pruned.state_dict().values()))


def _beside_a_small_one(width: int, share: float) -> tuple[StepFunction, StepFunction]:
    """A network that was built with as many filters as the sparse one keeps: static pruning at its best."""
    small = fuse(placed(vgg, round(width * share)).eval()).requires_grad_(False).to(device())
    x, _ = batch((1, 3, 32, 32))
    _, sparse = _inference(width, share)

    def call() -> None:
        with torch.inference_mode():
            small(x)

    return call, sparse


def workloads() -> list[Workload]:
    """Training in both halves; inference from where it pays to where it does not."""
    training = [
        Workload("training, ResNet-18 width 16, 3x32x32, B 64", partial(_training, image_net, 64, False)),
        Workload("training, VGG-16 width 16, 3x32x32, B 64", partial(_training, partial(vgg, 16), 64, False)),
        Workload(
            "training, VGG-16 width 16, 3x32x32, B 64, predictors learned",
            partial(_training, partial(vgg, 16), 64, True),
            note="second half of the training: no targets, no mask loss",
            floor=1.05,
        ),
    ]
    inference = [
        Workload(
            f"inference, VGG-16 width {width}, 1 image, {share:.0%} of the filters on",
            partial(_inference, width, share),
            note="beside the dense network with folded batch normalisation; the floor is the share of the arithmetic",
            floor=round(share**2, 2),
            kept=partial(_bytes, width) if share == shares[0] else None,
        )
        for width, shares in ((16, (0.2, 0.5, 0.8)), (64, (0.2, 0.35, 0.5, 0.65, 0.8)))
        for share in shares
    ]
    return [
        *training,
        *inference,
        Workload(
            "inference, VGG-16 width 64, 16 images, 35% of the filters on",
            partial(_inference, 64, 0.35, 16),
            note="each image has filters of its own and is computed by itself",
            floor=0.12,
        ),
        Workload(
            "inference, VGG-16 width 64, 1 image, 50% of the filters on, beside a network of half the width",
            partial(_beside_a_small_one, 64, 0.5),
            note="competitor: a statically pruned network with as many filters, which gathers nothing",
            floor=1.0,
        ),
    ]
