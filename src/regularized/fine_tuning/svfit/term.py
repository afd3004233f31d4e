"""SVFit as a term of our loop and of its adapters to other trainers."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from regularized.fine_tuning.svfit.layer import Decay, Rank, check_svfit_settings, default_rank
from regularized.fine_tuning.svfit.model import inject_svfit, merge_svfit, svfit_layers, svfit_param_groups
from regularized.training.terms import Term

__all__ = ["SVFit"]


class SVFit(Term):
    """SVFit in the loop: injected before the optimizer is built, merged at the end, no loss of its own.

    Args:
        rank: see :class:`~regularized.fine_tuning.svfit.SingularValueShift`.
        energy: see :func:`~regularized.fine_tuning.svfit.svfit_rank`.
        nuclear: see :func:`~regularized.fine_tuning.svfit.svfit_rank`.
        target_modules: see :func:`~regularized.fine_tuning.svfit.inject_svfit`.
        also_train: see :func:`~regularized.fine_tuning.svfit.inject_svfit`.
        decay: see :class:`~regularized.fine_tuning.svfit.SingularValueShift`.
        lr: learning rate of the singular values, see
            :func:`~regularized.fine_tuning.svfit.svfit_param_groups`; default that of the optimizer.

    Raises:
        ValueError: as :func:`~regularized.fine_tuning.svfit.inject_svfit`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> term = SVFit(rank="full", target_modules=["0"], also_train=["2"], lr=3e-2)
        >>> term.attach(model)
        >>> term.merge(model)
    """

    sharding = "forward"

    contributes = False

    def __init__(
        self,
        *,
        rank: Rank | None = None,
        energy: float | None = None,
        nuclear: float | None = None,
        target_modules: Sequence[str] | None = None,
        also_train: Sequence[str] = (),
        decay: Decay = "shift",
        lr: float | None = None,
    ) -> None:
        super().__init__()
        rank = default_rank(rank, energy, nuclear)
        check_svfit_settings(rank, energy=energy, nuclear=nuclear, decay=decay)
        self.settings: dict[str, Any] = {
            "rank": rank,
            "energy": energy,
            "nuclear": nuclear,
            "target_modules": target_modules,
            "also_train": also_train,
            "decay": decay,
        }
        self.lr = lr

    def attach(self, model: nn.Module) -> None:
        """Adapt the model; one that is adapted already stays as it is."""
        if next(svfit_layers(model), None) is None:
            inject_svfit(model, **self.settings)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The singular values, without weight decay."""
        return svfit_param_groups(model, lr=self.lr)

    def merge(self, model: nn.Module) -> None:
        """Leave a plain model."""
        merge_svfit(model)
