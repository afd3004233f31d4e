"""SORSA as a term of our loop and of its adapters to other trainers."""

from collections.abc import Iterable

from torch import Tensor, nn

from regularized.fine_tuning.sorsa.layer import SingularFactors, inject_sorsa, merge_sorsa
from regularized.fine_tuning.sorsa.penalty import OrthonormalPenalty, check_gamma
from regularized.training.progress import Coefficient, as_schedule
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["Sorsa"]


class Sorsa(Term):
    """SORSA in the loop: injected before the optimizer is built, penalised after each clipping, merged at the end.

    Args:
        r: rank.
        lr: peak learning rate of the optimizer.
        gamma: strength of the penalty, a number >= 0 or a schedule; default 4e-4, see
            :class:`~regularized.fine_tuning.sorsa.OrthonormalPenalty`.
        target_modules: as in :func:`~regularized.fine_tuning.sorsa.inject_sorsa`. A model that has SORSA layers
            already, plain ones or PEFT's, is left as it is.
        alpha: as in :func:`~regularized.fine_tuning.sorsa.inject_sorsa`.
        dropout: as there.

    Raises:
        ValueError: a setting is out of range, here or when the model is attached.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> term = Sorsa(r=2, lr=1e-3)
        >>> term.attach(model)
        >>> term.merge(model)
    """

    sharding = "gradients"

    contributes = False

    def __init__(
        self,
        *,
        r: int,
        lr: float,
        gamma: Coefficient = 4e-4,
        target_modules: Iterable[str] | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        as_schedule(gamma, name="gamma")
        if not callable(gamma):
            check_gamma(gamma, lr)
        self.r = r
        self.lr = lr
        self.gamma = gamma
        self.target_modules: tuple[str, ...] | None = None if target_modules is None else tuple(target_modules)
        self.alpha = alpha
        self.dropout = dropout
        self._penalty: OrthonormalPenalty | None = None
        self._injected = False

    def attach(self, model: nn.Module) -> None:
        """Inject, unless the model has its SORSA layers already."""
        if not any(isinstance(module, SingularFactors) for module in model.modules()):
            inject_sorsa(model, r=self.r, target_modules=self.target_modules, alpha=self.alpha, dropout=self.dropout)
            self._injected = True
        self._penalty = OrthonormalPenalty(model, gamma=0.0, lr=self.lr)

    def before_step(self, step: Step) -> None:
        """Add the penalty's gradient."""
        if self._penalty is None:
            raise RuntimeError("Sorsa was not attached; call attach(model) before the optimizer is built")
        self._penalty.add_gradient(gamma=as_schedule(self.gamma, name="gamma")(step.progress))

    def merge(self, model: nn.Module) -> None:
        """Leave a plain model; layers that were there before :meth:`attach` stay."""
        if self._injected:
            merge_sorsa(model)

    def forward(self, step: Step) -> Tensor:
        """Nothing is added to the loss."""
        return step.logits.new_zeros(())
