"""Certified training as a term of our loop and of its adapters to other trainers."""

from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, at_least, between
from regularized.robustness.certified_training.interval import Scale, check_scales
from regularized.robustness.certified_training.loss import CertifiedLoss, GrowingRadius, Radius, as_radius
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["CertifiedTraining"]


class CertifiedTraining(Term):
    """The loss of certified training; it takes the place of the cross-entropy instead of being added to it.

    The radius follows the loop's position, so nothing has to be saved. The penalties are ratios of means over a batch,
    as batch normalisation is: accumulated, or in several processes, they are the mean over the parts. Draw the weights
    by :func:`~regularized.robustness.certified_training.interval_init_` before, and clip gradients (10, the paper's).

    Args:
        radius: as in :class:`~regularized.robustness.certified_training.CertifiedLoss`, and so the others.
        std: see there.
        data_range: see there.
        penalty: see there; default 0.5.
        tolerance: see there; default 0.5.

    Raises:
        ValueError: as there; at the first step: the term was not attached.

    Examples:
        >>> from regularized.training import Batch, Progress
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> term = CertifiedTraining(radius=0.1)
        >>> term.attach(model)
        >>> import torch
        >>> batch = Batch(torch.rand(5, 4), torch.randint(3, (5,)))
        >>> term(Step(model, batch, Progress(0, 1))).shape
        torch.Size([])
    """

    unsharded = (
        "its bounds read weights beside the forward pass, and shards sum their gradients in that one's backward pass"
    )

    @allowed(penalty=at_least(0.0, "0 switches the penalties off"), tolerance=between(0.0, 1.0, "(]"))
    def __init__(
        self,
        *,
        radius: Radius,
        std: Scale = 1.0,
        data_range: tuple[Scale, Scale] | None = None,
        penalty: float = 0.5,
        tolerance: float = 0.5,
    ) -> None:
        super().__init__()
        self.radius: GrowingRadius = as_radius(radius)
        check_scales(self.radius.largest, std, data_range)
        self.std, self.data_range = std, data_range
        self.penalty = penalty
        self.tolerance = tolerance
        self._loss: tuple[CertifiedLoss, ...] = ()  # in a tuple: the network is no part of the term's state

    def attach(self, model: nn.Module) -> None:
        """Trace the network, and set the hooks that note its batch statistics."""
        if self._loss and self._loss[0].model is model:
            return
        self.merge(model)
        loss = CertifiedLoss(
            model,
            radius=self.radius,
            std=self.std,
            data_range=self.data_range,
            penalty=self.penalty,
            tolerance=self.tolerance,
        )
        self._loss = (loss,)

    def forward(self, step: Step) -> Tensor:
        """Sum of the loss over the samples."""
        if not self._loss:
            raise RuntimeError("CertifiedTraining was not attached; call attach(model) before the first step")
        loss, inputs = self._loss[0], step.inputs
        loss.to(inputs.device).train(self.training)
        radius = self.radius(step.progress) if self.training else self.radius.largest
        return loss.summed(step.log_probabilities, inputs, step.targets, radius=radius)

    def merge(self, model: nn.Module) -> None:
        """Take the hooks off the network."""
        for loss in self._loss:
            loss.bounds.remove()
        self._loss = ()
