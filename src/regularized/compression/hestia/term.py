"""Hestia as a term of our loop and of its adapters to other trainers."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from regularized.compression.hestia.layer import Annealer, anneal_weights, annealed_weights, freeze_weights
from regularized.compression.hestia.quantizer import Codebook, StraightThrough
from regularized.compression.hestia.schedule import Annealing
from regularized.training.progress import Progress
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["Hestia"]


class Hestia(Term):
    """Low-bit weights in the loop: annealed before the optimizer is built, hard at the last step, no loss of its own.

    Args:
        annealing: the schedule; default :class:`~regularized.compression.hestia.Annealing`.
        factors: factor of each layer on its temperature, from the traces of the model in full precision
            (:func:`~regularized.compression.hestia.hessian_traces`, then
            :func:`~regularized.compression.hestia.temperature_factors`); default none: softmax annealing without the
            Hessian.
        codebook: levels; default ternary.
        group_size: weights that share a scale; default 128, as in :func:`~regularized.compression.hestia.anneal`.
        straight_through: as there.
        include: types of layers; default linear.
        exclude: names of submodules to leave out, such as ``"lm_head"``.

    Raises:
        ValueError: as :func:`~regularized.compression.hestia.anneal_weights`, when the model is attached; a layer has
            no factor; or, when training begins, the number of steps is not known.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> term = Hestia(group_size=-1)
        >>> term.attach(model)
        >>> term.merge(model)
    """

    sharding = "forward"
    contributes = False

    def __init__(
        self,
        *,
        annealing: Annealing | None = None,
        factors: Mapping[str, float] | None = None,
        codebook: Codebook = "ternary",
        group_size: int = 128,
        straight_through: StraightThrough = "identity",
        include: tuple[type[nn.Module], ...] = (nn.Linear,),
        exclude: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.annealing = annealing
        self.factors: dict[str, float] | None = None if factors is None else dict(factors)
        self.codebook: Codebook = codebook
        self.group_size = group_size
        self.straight_through: StraightThrough = straight_through
        self.include, self.exclude = include, tuple(exclude)
        self._model: tuple[nn.Module, ...] = ()  # in a tuple: not a submodule
        self._annealer: Annealer | None = None

    def attach(self, model: nn.Module) -> None:
        """Anneal the layers; a model that already has annealed ones is left as it is."""
        if not annealed_weights(model):
            anneal_weights(
                model,
                codebook=self.codebook,
                group_size=self.group_size,
                straight_through=self.straight_through,
                include=self.include,
                exclude=self.exclude,
            )
        self._model = (model,)
        self._annealer = None

    def epoch_start(self, progress: Progress) -> None:
        """The point of the schedule where the epoch begins."""
        self._move(progress.step, progress.total_steps)

    def after_step(self, step: Step) -> None:
        """The point of the next step, or the end."""
        self._move(step.progress.step + 1, step.progress.total_steps)

    def _move(self, step: int, total_steps: int) -> None:
        if not self._model:
            raise RuntimeError("Hestia was not attached; call attach(model) before the optimizer is built")
        if total_steps < 1:
            raise ValueError("the number of optimizer steps is not known, and annealing needs it; say how many epochs")
        if self._annealer is None or self._annealer.total_steps != total_steps:
            self._annealer = Annealer(
                self._model[0], total_steps=total_steps, annealing=self.annealing, factors=self.factors
            )
        self._annealer.step(min(step, total_steps))

    def merge(self, model: nn.Module) -> None:
        """Leave a plain model with hard weights."""
        freeze_weights(model, warn=self._annealer is not None)

    def forward(self, step: Step) -> Tensor:
        """Nothing is added to the loss."""
        return step.logits.new_zeros(())
