"""Policy-gradient noise mask: a small network learns where to hide the image while the classifier is pre-trained.

For image classifiers that are pre-trained on a mix of modalities, where plain noise augmentation hurts. A policy looks
at each image and gives Beta distributions on a coarse grid; a mask drawn from them is enlarged, blurred and multiplied
with the image. The policy learns by the score-function gradient (REINFORCE) of the classifier's loss. Afterwards it is
thrown away and the classifier is fine-tuned without masks.

    Yavuz, Yang, "Policy Gradient-Driven Noise Mask", 2024, arXiv 2406.14568. Official code:
    github.com/convergedmachine/Policy-Gradient-Driven-Noise-Mask at ece96ae (read from a mirror; no licence file).

==========  =====================  ====================================================================
paper       here                   meaning
==========  =====================  ====================================================================
A, B        ``base_alpha, _beta``  (1, D) running log concentrations, D = grid^2
a, b        ``alpha, beta``        (B, D) log concentrations of each image: decay A + (1 - decay) head
m           ``cells``              (B, D) mask on the grid, drawn from Beta(exp a, exp b), a constant
q           ``log_density``        (B,) log sum over the cells of the density of the drawn mask
==========  =====================  ====================================================================

Paper and code differ: the abstract speaks of additive noise, the code multiplies; we follow the code. Its loss is the
*product* of the batch's mean cross-entropy with the mean q, so q also scales the classifier's gradient (log D at
first) and turns its sign where q < 0. That is the default, for parity; ``coupled=False`` and ``credit="sample"`` are
the cures.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.training.data import as_source
from regularized.training.procedure import Epochs, Optimizers, Part, restore, state_of
from regularized.training.progress import Coefficient, Progress, as_schedule
from regularized.training.randomness import mix as mix_seeds
from regularized.training.step import Batch

__all__ = [
    "BetaMaskPolicy",
    "MaskedInput",
    "NoiseMask",
    "NoiseMaskPretraining",
    "beta_log_density",
    "gaussian_blur",
    "noise_mask_objective",
]

# Shapes: B images, C channels, S side of the image, G side of the grid, D = G * G cells.

Credit: TypeAlias = Literal["batch", "sample"]

_STATE = ("classifier", "noise_mask", "optimizers", "epochs")

_LARGEST_LOG = 10.0  # concentrations beyond e^10 overflow the density in float32; the official code has no bound


def beta_log_density(cells: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Log density of Beta(exp alpha, exp beta) at each cell, differentiable in alpha and beta.

    Args:
        cells: (B, D) values in (0, 1), constant.
        alpha: (B, D) logarithm of the first concentration.
        beta: (B, D) logarithm of the second one.

    Returns:
        (B, D).

    Examples:
        >>> beta_log_density(torch.tensor([[0.2, 0.9]]), torch.zeros(1, 2), torch.zeros(1, 2))  # uniform
        tensor([[0., 0.]])
    """
    one, two = alpha.exp(), beta.exp()
    normaliser = torch.lgamma(one + two) - torch.lgamma(one) - torch.lgamma(two)
    return (one - 1) * cells.log() + (two - 1) * torch.log1p(-cells) + normaliser


def gaussian_blur(images: Tensor, kernel: int, sigma: float) -> Tensor:
    """Separable Gaussian blur with reflected borders; the weights sum to 1, so a constant stays one.

    Args:
        images: (B, C, S, S).
        kernel: width of the kernel, odd; 1 changes nothing. ``kernel // 2`` must be below S.
        sigma: standard deviation in pixels.

    Returns:
        (B, C, S, S).

    Examples:
        >>> torch.allclose(gaussian_blur(torch.full((1, 1, 5, 5), 0.3), 3, 1.0), torch.tensor(0.3))
        True
    """
    if kernel == 1:
        return images
    half = kernel // 2
    at = torch.arange(-half, half + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (at / sigma) ** 2)
    weights = weights / weights.sum()
    channels = images.shape[1]
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    rows = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def noise_mask_objective(
    losses: Tensor, log_density: Tensor, *, credit: Credit = "batch", coupled: bool = True
) -> Tensor:
    """What classifier and policy minimise together: the loss times the log density of the masks that led to it.

    Args:
        losses: (B,) loss of each image with ``credit="sample"``; a scalar mean, or (B,), with ``"batch"``.
        log_density: (B,) q of each mask.
        credit: ``"batch"`` (official code): each policy gets the mean loss of the batch; ``"sample"``: its own image's.
        coupled: True (official code): the product, so q scales the classifier's gradient, too. False: the classifier
            gets the plain gradient, the policy the same as before.

    Returns:
        Scalar.

    Raises:
        ValueError: ``credit`` is neither, or losses of each image are missing for ``"sample"``.

    Examples:
        >>> noise_mask_objective(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]))
        tensor(6.)
        >>> noise_mask_objective(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]), credit="sample")
        tensor(7.)
    """
    if credit not in ("batch", "sample"):
        raise ValueError(f"credit must be 'batch' or 'sample', got {credit!r}")
    if credit == "sample" and losses.shape != log_density.shape:
        raise ValueError(
            f"credit='sample' needs one loss an image, shape {tuple(log_density.shape)}, got {tuple(losses.shape)}; "
            'give F.cross_entropy(..., reduction="none")'
        )
    if credit == "batch" and losses.shape not in (torch.Size([]), log_density.shape):
        raise ValueError(
            f"credit='batch' takes the mean loss, or one loss an image of shape {tuple(log_density.shape)}; got "
            f"{tuple(losses.shape)}"
        )
    if credit == "batch":
        losses, log_density = losses.mean(), log_density.mean()
    if coupled:
        return (losses * log_density).mean()
    return (losses + losses.detach() * log_density).mean()


class BetaMaskPolicy(nn.Module):
    """Gives the log concentrations of the mask for each image.

    Two heads (linear, batch norm, ReLU, twice, then linear) on the pooled features of a small network, averaged with a
    running state that all images share.

    Args:
        backbone: maps images to features (B, features); the authors use a ResNet-10t.
        features: width of the features; 512 there.
        grid: side G of the mask's grid; default 64 (official code), for images of 224 pixels.
        decay: share of the running state in the concentrations of an image; default 0.9 (official code).
        momentum: share of the running state that stays at each update; default 0.99 (official code).
        twice: update the heads' batch statistics twice a step, as the official code does by running the heads twice;
            default False.
        seed: of the starting state, uniform in [0, 1).

    Attributes:
        base_alpha: (1, D) buffer, running log of the first concentration.
        base_beta: (1, D) buffer, running log of the second one.

    Raises:
        ValueError: a setting is outside its range.

    Examples:
        >>> policy = BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), features=8, grid=4)
        >>> alpha, beta = policy(torch.randn(5, 1, 8, 8))
        >>> alpha.shape
        torch.Size([5, 16])
    """

    base_alpha: Tensor
    base_beta: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        features: int = 512,
        grid: int = 64,
        decay: float = 0.9,
        momentum: float = 0.99,
        twice: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, number in (("features", features), ("grid", grid)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        for name, share in (("decay", decay), ("momentum", momentum)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        self.backbone = backbone
        self.grid = grid
        self.decay = decay
        self.momentum = momentum
        cells = grid * grid
        self.alpha_head = _head(features, cells)
        self.beta_head = _head(features, cells)
        if twice:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d):
                    # Twice the same batch with momentum p moves the statistics as once with 1 - (1 - p)^2.
                    module.momentum = 1 - (1 - (module.momentum or 0.0)) ** 2
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("base_alpha", torch.rand(1, cells, generator=generator))
        self.register_buffer("base_beta", torch.rand(1, cells, generator=generator))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Log concentrations (B, D) of both kinds; in training mode the running state moves afterwards.

        Raises:
            ValueError: a batch of one image in training mode, which batch normalisation cannot take.
        """
        if self.training and len(images) < 2:
            raise ValueError(
                "BetaMaskPolicy needs at least 2 images in a training batch, since its heads normalise over the batch; "
                f"got {len(images)}. Drop the last incomplete batch"
            )
        features = self.backbone(images)
        heads = self.alpha_head(features), self.beta_head(features)
        alpha = torch.lerp(heads[0], self.base_alpha.to(heads[0].dtype), self.decay)
        beta = torch.lerp(heads[1], self.base_beta.to(heads[1].dtype), self.decay)
        if self.training:
            with torch.no_grad():
                for base, head in zip((self.base_alpha, self.base_beta), heads, strict=True):
                    base.lerp_(head.mean(dim=0, keepdim=True).to(base.dtype), 1 - self.momentum)
        return alpha, beta


class MaskedInput(NamedTuple):
    """Images under their masks.

    Attributes:
        images: (B, C, S, S) image times mask.
        log_density: (B,) q, log of the summed density of the drawn cells; differentiable in the policy.
        mask: (B, 1, S, S) what the images were multiplied with.
        cells: (B, D) the mask on its grid, as drawn.
    """

    images: Tensor
    log_density: Tensor
    mask: Tensor
    cells: Tensor


class NoiseMask(nn.Module):
    """Draw a mask from the policy, enlarge it, blur it, and multiply.

    Masks are drawn in training mode only. In evaluation mode the images come back as they are, unless
    ``mask_in_evaluation``: then one mask drawn from the running state is laid on the whole batch, as in the official
    evaluation between the phases.

    Args:
        policy: a :class:`BetaMaskPolicy`, or a module of the same form.
        kernel: width of the blur, odd; default 13 (official code). 1 does not blur.
        sigma: standard deviation of the blur in pixels; default 6 (official code).
        mask_in_evaluation: default False.

    Raises:
        ValueError: an even kernel, a sigma that is not positive; at the first batch, a grid larger than the image or a
            kernel too wide for it.

    Warns:
        UserWarning: a log concentration is beyond +-10 and is clamped. Looked at on the CPU only, without a sync.

    Examples:
        >>> policy = BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), features=8, grid=4)
        >>> out = NoiseMask(policy, kernel=3, sigma=1.0)(torch.ones(5, 1, 8, 8))
        >>> out.images.shape, out.log_density.shape, bool((out.images < 1).all())
        (torch.Size([5, 1, 8, 8]), torch.Size([5]), True)
    """

    def __init__(
        self, policy: BetaMaskPolicy, *, kernel: int = 13, sigma: float = 6.0, mask_in_evaluation: bool = False
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {kernel}; try {kernel + 1}")
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma must be positive, in pixels, got {sigma}")
        self.policy = policy
        self.kernel = kernel
        self.sigma = sigma
        self.mask_in_evaluation = mask_in_evaluation

    def forward(self, images: Tensor, *, cells: Tensor | None = None) -> MaskedInput:
        """Mask a batch.

        Args:
            images: (B, C, S, S).
            cells: (B, D) a mask to use instead of a drawn one, in (0, 1).

        Returns:
            The masked images with the log density of their masks.
        """
        self._check(images)
        if not self.training and cells is None:
            return self._evaluate(images)
        alpha, beta = self.policy(images)
        alpha, beta = _bounded(alpha), _bounded(beta)
        if cells is None:
            with torch.no_grad():  # REINFORCE: no gradient flows through the mask itself
                cells = _draw(alpha.exp(), beta.exp())
        log_density = torch.logsumexp(beta_log_density(cells, alpha, beta), dim=1)
        mask = self.enlarge(cells, images.shape[-1])
        return MaskedInput(images * mask, log_density, mask, cells)

    def enlarge(self, cells: Tensor, side: int) -> Tensor:
        """(B, D) cells to (B, 1, side, side): nearest neighbours, then blur."""
        grid = self.policy.grid
        mask = cells.view(-1, 1, grid, grid)
        if grid != side:
            mask = F.interpolate(mask, size=(side, side))
        return gaussian_blur(mask, self.kernel, self.sigma)

    def _evaluate(self, images: Tensor) -> MaskedInput:
        none = images.new_zeros(len(images))
        if not self.mask_in_evaluation:
            ones = images.new_ones(len(images), 1, *images.shape[-2:])
            return MaskedInput(images, none, ones, images.new_ones(len(images), self.policy.grid**2))
        cells = _draw(self.policy.base_alpha.exp(), self.policy.base_beta.exp()).to(images.dtype)
        mask = self.enlarge(cells, images.shape[-1])
        return MaskedInput(images * mask, none, mask.expand(len(images), -1, -1, -1), cells.expand(len(images), -1))

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
            raise ValueError(f"NoiseMask needs square images of shape (B, C, S, S), got {tuple(images.shape)}")
        side = images.shape[-1]
        if self.policy.grid > side:
            raise ValueError(
                f"the grid of {self.policy.grid} is larger than the image of {side} pixels; use grid <= {side}"
            )
        if self.kernel // 2 >= side:
            raise ValueError(
                f"a kernel of {self.kernel} cannot be reflected at the border of an image of {side} pixels; use at "
                f"most {2 * side - 1}"
            )


class NoiseMaskPretraining:
    """Phase 1: classifier and policy trained together, two optimizers on one backward pass.

    Phase 2 is ordinary training of ``pretraining.classifier``, which holds nothing of the policy.

    Args:
        classifier: the network that is wanted.
        noise_mask: the policy with its mask; shares no parameter with the classifier.
        optimizer: factory for the classifier's optimizer; the authors: ``partial(torch.optim.SGD, lr=0.1,
            momentum=0.9, weight_decay=1e-4)``.
        policy_optimizer: factory for the policy's; the authors: the same with a tenth of the learning rate.
        schedule: factor on the classifier's learning rate, a number or a function of
            :class:`~regularized.training.progress.Progress`; the authors: ``piecewise({1/3: 0.1, 2/3: 0.01})``.
        policy_schedule: factor on the policy's; the authors: ``cosine()``.
        loss: ``loss(logits, targets) -> (B,)``; default cross-entropy.
        credit: see :func:`noise_mask_objective`; default ``"batch"`` (official code).
        coupled: see :func:`noise_mask_objective`; default True (official code).
        seed: of data order and draws; default 0.

    Attributes:
        classifier: the network.
        noise_mask: the policy.
        optimizers: those of classifier and policy, see :class:`~regularized.training.procedure.Optimizers`.

    Raises:
        ValueError: policy and classifier share parameters.

    Warns:
        UserWarning: q was negative on average over an epoch, so that the classifier climbed its loss.

    Examples:
        >>> from functools import partial
        >>> policy = BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), features=8, grid=4)
        >>> pretraining = NoiseMaskPretraining(
        ...     nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        ...     NoiseMask(policy, kernel=3, sigma=1.0),
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ...     policy_optimizer=partial(torch.optim.SGD, lr=0.01),
        ... )
        >>> batches = [(torch.rand(6, 1, 8, 8), torch.randint(3, (6,))) for _ in range(2)]
        >>> records = pretraining.fit(batches, epochs=1)
        >>> sorted(records[0])
        ['log_density', 'loss']
    """

    def __init__(
        self,
        classifier: nn.Module,
        noise_mask: NoiseMask,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        policy_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        schedule: Coefficient = 1.0,
        policy_schedule: Coefficient = 1.0,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        credit: Credit = "batch",
        coupled: bool = True,
        seed: int = 0,
    ) -> None:
        shared = {id(p) for p in classifier.parameters()} & {id(p) for p in noise_mask.parameters()}
        if shared:
            raise ValueError(
                f"policy and classifier share {len(shared)} parameter(s), so both optimizers would move them; give the "
                "policy a backbone of its own"
            )
        if credit not in ("batch", "sample"):
            raise ValueError(f"credit must be 'batch' or 'sample', got {credit!r}")
        self.classifier = classifier
        self.noise_mask = noise_mask
        self.optimizers = Optimizers(
            [optimizer(list(classifier.parameters())), policy_optimizer(list(noise_mask.parameters()))],
            schedule=(as_schedule(schedule, name="schedule"), as_schedule(policy_schedule, name="policy_schedule")),
            names=("the classifier", "the policy"),
            remedy="lower the learning rates, or use coupled=False",
        )
        self.loss = _cross_entropy if loss is None else loss
        self.credit: Credit = credit
        self.coupled = coupled
        self.seed = seed
        self.epochs = Epochs(seed)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.epochs.done

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.optimizers.steps[0]

    def training_step(self, batch: Any, *, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """One step of both optimizers.

        Args:
            batch: (x, y), see :meth:`regularized.training.step.Batch.of`.
            progress: position in the training, for the schedules; default: the steps done, of unknown total.

        Returns:
            Mean loss of the classifier and mean q, detached, on the device.
        """
        device = next(self.classifier.parameters()).device
        sorted_batch = Batch.of(batch).map(lambda t: t.to(device, non_blocking=True))
        if sorted_batch.targets is None:
            raise ValueError("NoiseMaskPretraining needs labels in each batch: yield (x, y)")
        progress = Progress(self.steps, 0) if progress is None else progress
        for module in (self.classifier, self.noise_mask):
            if not module.training:
                module.train()
        masked = self.noise_mask(sorted_batch.inputs)
        losses = self.loss(self.classifier(masked.images), sorted_batch.targets)
        objective = noise_mask_objective(losses, masked.log_density, credit=self.credit, coupled=self.coupled)
        self.optimizers.minimise(objective, progress=progress)
        return losses.detach().mean(), masked.log_density.detach().mean()

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        after_epoch: Callable[["NoiseMaskPretraining"], object] | None = None,
        after_step: Callable[["NoiseMaskPretraining"], object] | None = None,
    ) -> list[dict[str, float]]:
        """Train until ``epochs`` epochs are done in all.

        Restored by :meth:`load_state_dict` it goes on where it stopped, and ends bit for bit (CPU) as if it had never
        been interrupted, also in the middle of an epoch.

        Args:
            data: what :func:`~regularized.training.data.as_source` takes; a batch has at least two images.
            epochs: epochs in all.
            after_epoch: called with this object after each epoch.
            after_step: called with this object after each step, for saving within long epochs.

        Returns:
            For each epoch of this call the mean ``loss`` and the mean ``log_density``.

        Raises:
            NonFiniteLoss: a loss or gradient is not finite, a ``FloatingPointError``; the weights are those before it.
        """
        part = Part(as_source(data, seed=mix_seeds(self.seed, 0)), self._averaged_step, stream=(1,))
        moment = None if after_step is None else partial(after_step, self)
        records = []
        for [mean] in self.epochs.run([part], until=epochs, after_step=moment):
            self.optimizers.settle()
            loss, log_density = mean.tolist()
            if log_density < 0 and self.coupled:
                warnings.warn(
                    f"the mean log density was {log_density:.3g} in epoch {self.epoch - 1}: with coupled=True a "
                    "negative one turns the classifier's gradient round. Use coupled=False, or a larger grid",
                    stacklevel=2,
                )
            records.append({"loss": loss, "log_density": log_density})
            if after_epoch is not None:
                after_epoch(self)
        return records

    def _averaged_step(self, batch: Batch, *, progress: Progress) -> Tensor:
        return torch.stack(self.training_step(batch, progress=progress))

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on: both networks, the running state in the policy, both optimizers, the counters.

        Plain dictionaries and lists of tensors, numbers and strings: ``torch.load(..., weights_only=True)`` reads it.

        Raises:
            NonFiniteLoss: the last step, or a weight, is not finite.
            RuntimeError: a step was left half-way.
        """
        return state_of(self, *_STATE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, of a procedure built with the same settings.

        Raises:
            ValueError: parts of the state are missing, unknown, or of another procedure; nothing is changed then.
        """
        restore(self, state, *_STATE)


def _head(features: int, cells: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, features),
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, features),
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, cells),
    )


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _draw(one: Tensor, two: Tensor) -> Tensor:
    cells = torch.distributions.Beta(one, two, validate_args=False).sample()
    tiny = torch.finfo(cells.dtype).eps  # at exactly 0 or 1 a density can be infinite
    return cells.clamp_(tiny, 1 - tiny)


def _bounded(logs: Tensor) -> Tensor:
    if not logs.is_cuda and bool((logs.detach().abs() > _LARGEST_LOG).any()):
        warnings.warn(
            f"log concentrations reach {float(logs.detach().abs().max()):.3g} and are clamped to +-{_LARGEST_LOG:g}, "
            "where no gradient flows; lower the policy's learning rate",
            stacklevel=4,
        )
    return logs.clamp(-_LARGEST_LOG, _LARGEST_LOG)
