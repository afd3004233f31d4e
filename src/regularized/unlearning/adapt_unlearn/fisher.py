"""How much each weight of a generator matters to its discriminator."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regularized.mechanisms.frozen import constant_parameters
from regularized.unlearning.adapt_unlearn.term import trainable

__all__ = ["generator_fisher"]


def generator_fisher(
    generator: nn.Module,
    discriminator: nn.Module,
    latents: Tensor,
    *,
    which: Callable[[str], bool] | None = None,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of a generator, with the discriminator's score in place of a log-likelihood.

    ``F_i`` is the mean over latents of ``(d D(G(z)) / d theta_i)^2``. Both networks are in evaluation mode meanwhile.
    One backward pass a latent, so that any generator will do; it is needed once.

    Args:
        generator: from latents to samples.
        discriminator: from samples to scores.
        latents: (n, ...); the authors' code has 32.
        which: whether a parameter's name is wanted; default all that are trainable. The authors' code leaves
            StyleGAN2's mapping network out: ``which=lambda name: "conv" in name``.

    Returns:
        For each name a tensor of the parameter's shape.

    Raises:
        ValueError: there is no latent, no such parameter, or no gradient reaches any of them.

    Examples:
        >>> generator, discriminator = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(discriminator.weight, 2.0)
        >>> generator_fisher(generator, discriminator, torch.tensor([[1.0], [3.0]]))["weight"].item()  # of 2^2 and 6^2
        20.0
    """
    wanted = {name: p for name, p in trainable(generator).items() if which is None or which(name)}
    if not wanted or not len(latents):
        raise ValueError(
            f"Fisher information needs at least one latent and one parameter, got {len(latents)} and {len(wanted)}"
        )
    modes = {part: part.training for net in (generator, discriminator) for part in net.modules()}
    generator.eval()
    discriminator.eval()
    sums = [torch.zeros_like(p).detach() for p in wanted.values()]
    try:
        with constant_parameters(discriminator):
            for latent in latents.split(1):
                score = discriminator(generator(latent)).sum()
                gradients = torch.autograd.grad(score, list(wanted.values()), materialize_grads=True)
                torch._foreach_addcmul_(sums, gradients, gradients, value=1.0 / len(latents))
    finally:
        for part, mode in modes.items():
            part.training = mode
    if not bool(torch.stack([value.any() for value in sums]).any()):
        raise ValueError(
            "the Fisher information is zero for every weight: the discriminator's scores do not depend on them. Is it "
            "saturated, or not the one that was trained with this generator?"
        )
    return dict(zip(wanted, sums, strict=True))
