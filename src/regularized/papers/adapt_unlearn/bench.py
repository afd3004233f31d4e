"""Cost of an unlearning step beside a plain GAN step of the same networks, and beside the authors' way of repelling."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, device, placed
from regularized.evidence.models import mlp
from regularized.training.progress import Progress
from regularized.training.step import Batch
from regularized.unlearning.adapt_unlearn.gan import GAN, GANSettings, Pull
from regularized.unlearning.adapt_unlearn.term import Repulsion

_REFERENCES = 5


def dcgan(width: int = 64) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of images of 32 x 32 pixels, 3.6 million weights together at width 64."""
    made: list[nn.Module] = [nn.ConvTranspose2d(100, 4 * width, 4), nn.BatchNorm2d(4 * width), nn.ReLU()]
    for ins, outs in ((4 * width, 2 * width), (2 * width, width)):
        made += [nn.ConvTranspose2d(ins, outs, 4, stride=2, padding=1), nn.BatchNorm2d(outs), nn.ReLU()]
    made += [nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1), nn.Tanh()]
    judged: list[nn.Module] = []
    for ins, outs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        judged += [nn.Conv2d(ins, outs, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    generator = nn.Sequential(nn.Unflatten(1, (100, 1, 1)), *made)
    return generator, nn.Sequential(*judged, nn.Flatten(), nn.Linear(4 * width * 16, 1))


def perceptrons() -> tuple[nn.Module, nn.Module]:
    """A step of a few milliseconds: the worst case for what is added."""
    return mlp([100, 256, 256, 784]), mlp([784, 256, 1])


class AsPublished:
    """Operations of the authors' code: each step builds every reference anew, from its file."""

    def __init__(self, generator: nn.Module, folder: Path) -> None:
        self.generator = generator
        self.files = [folder / f"{k}.pt" for k in range(_REFERENCES)]
        for file in self.files:
            torch.save(placed(lambda: dcgan()[0], seed=9).state_dict(), file)

    def add_gradient(self, strength: float) -> None:
        """Mean squared differences, tensor by tensor, through autograd."""
        found: dict[str, Tensor] = {}
        for file in self.files:
            other = dcgan()[0].to(device())
            other.load_state_dict(torch.load(file, weights_only=True))
            for (name, p), (_, q) in zip(self.generator.named_parameters(), other.named_parameters(), strict=True):
                found[name] = found.get(name, 0.0) + F.mse_loss(q, p)
        value = torch.stack(list(found.values())).sum() / len(found) / 2.0 * len(self.files)
        (strength * 100.0 * torch.exp(-value)).backward()


def _step(pair: tuple[nn.Module, nn.Module], shape: tuple[int, ...], pull: Pull | None) -> StepFunction:
    generator, discriminator = pair
    gan = GAN(generator, discriminator, latents=100, settings=GANSettings())
    real = Batch(batch(shape)[0])
    counted = [0]

    def step() -> None:
        gan.training_step(real, progress=Progress(counted[0], 10**9), pull=pull, strength=1.0)
        counted[0] += 1

    return step


def _pair(perceptron: bool) -> tuple[nn.Module, nn.Module]:
    whole = placed(lambda: nn.ModuleList(perceptrons() if perceptron else dcgan()))
    assert isinstance(whole, nn.ModuleList)
    return whole[0], whole[1]


def _repelled(generator: nn.Module, perceptron: bool) -> Repulsion:
    references = [placed(lambda: (perceptrons() if perceptron else dcgan())[0], seed=k) for k in range(1, 6)]
    repulsion = Repulsion(references)
    repulsion.attach(generator)
    return repulsion


def _build(perceptron: bool, shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    pair = _pair(perceptron)
    return _step(_pair(perceptron), shape, None), _step(pair, shape, _repelled(pair[0], perceptron))


def _published(shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    one, other = _pair(False), _pair(False)
    kept = tempfile.TemporaryDirectory()
    published = _step(one, shape, AsPublished(one[0], Path(kept.name)))

    def step() -> None:
        assert kept  # the files live as long as the step
        published()

    return step, _step(other, shape, _repelled(other[0], False))


def workloads() -> list[Workload]:
    """Five references, whose number does not matter here, since they collapse into one."""
    images = (16, 3, 32, 32)
    return [
        Workload("DCGAN 32x32, B16, 5 references", partial(_build, False, images)),
        Workload("MLP GAN of 28x28, B64, 5 references", partial(_build, True, (64, 784))),
        Workload(
            "DCGAN 32x32, B16, 5 references, beside the authors' way",
            partial(_published, images),
            "the authors' operations, each reference built and loaded at each step, count as 1",
            floor=0.5,
        ),
    ]
