"""SVFit on PEFT: for models of transformers and whatever else PEFT adapts, with its files and its ``Trainer`` support.

The mathematics is in :mod:`regularized.fine_tuning.svfit.layer`, what all such adapters share in
:mod:`regularized.fine_tuning.peft_host`. Needs the extra: ``pip install "regularized[peft]"``.

``save_pretrained`` writes one number for each direction; what it takes to find the same directions again stands in
``adapter_config.json``, see :mod:`regularized.fine_tuning.svfit.identity`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from regularized.fine_tuning import peft_host
from regularized.fine_tuning.peft_layer import FactorConfig, FactorLayer, Factors
from regularized.fine_tuning.svfit.identity import (
    basis_witness,
    check_basis,
    check_weight,
    relative_gap,
    weight_fingerprint,
)
from regularized.fine_tuning.svfit.layer import (
    Decay,
    Rank,
    SingularValues,
    check_adaptable,
    check_svfit_settings,
    svfit_rank,
)
from regularized.fine_tuning.svfit.product import shifted_forward
from regularized.mechanisms.svd import SVD, thin_svd, weight_matrix

try:
    from peft import PeftModel
except ModuleNotFoundError as _error:
    raise ImportError(f'SVFit on PEFT needs {_error.name}: pip install "regularized[peft]"') from _error

__all__ = ["HostedSVFit", "SVFitConfig", "inject", "load"]

_BASIS = ("svfit_left", "svfit_values", "svfit_right")


class HostedSVFit(FactorLayer, SingularValues):
    """A layer of PEFT whose singular values are trained; the base weight stays as it is."""

    trainable = ("svfit_trained",)
    frozen = _BASIS
    known = ("decays",)

    svfit_trained: nn.ParameterDict
    svfit_left: Any  # buffers by adapter
    svfit_values: Any
    svfit_right: Any
    decays: dict[str, Decay]

    def choose_rank(self, values: Tensor, config: FactorConfig) -> int:
        """By number, by share of information, or all."""
        c = cast("SVFitConfig", config)
        rank = svfit_rank(values, c.rank, energy=c.energy, nuclear=c.nuclear)
        self._gap = relative_gap(values, rank)
        return rank

    def start(self, svd: SVD, scale: float) -> dict[str, Tensor]:
        """No change: the shift is 0."""
        basis = dict(zip(_BASIS, (part.clone() for part in svd), strict=True))
        return {"svfit_trained": torch.zeros_like(svd.values), **basis}

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, r: int, lora_alpha: float = 1.0, *, config: FactorConfig, **settings: Any
    ) -> None:
        """Add an adapter to this layer; at loading, find its directions again and make sure that they are the same."""
        name = self.name
        check_adaptable(self.get_base_layer(), name)
        super().update_layer(adapter_name, r, lora_alpha, config=config, **settings)
        assert isinstance(config, SVFitConfig)
        self.decays[adapter_name] = config.decay
        if config.init_lora_weights:
            self._identify(adapter_name, config, name)
        else:
            self._recognise(adapter_name, config, name)
        if not config.store_basis:
            for key in _BASIS:  # in the state of the module no longer, and so not in the file
                held = getattr(self, key)
                held.register_buffer(adapter_name, held[adapter_name], persistent=False)

    def _identify(self, adapter: str, config: "SVFitConfig", name: str) -> None:
        """Write into the settings which weight and directions these are."""
        left, values, right = (getattr(self, key)[adapter] for key in _BASIS)
        if config.decay == "sigma":
            self.svfit_trained[adapter].data.copy_(values)
        fingerprint = weight_fingerprint(weight_matrix(self.get_base_layer()))
        if config.directions.get(name, {}).get("fingerprint", fingerprint) != fingerprint:
            raise ValueError(
                f"these settings have been used for another model, in which layer {name!r} has another weight, and are "
                "what its file will say; make a new SVFitConfig"
            )
        config.directions[name] = {
            "fingerprint": fingerprint,
            "gap": min(self._gap, 1.0),
            "witness": basis_witness(left, right).tolist(),
        }

    def _recognise(self, adapter: str, config: "SVFitConfig", name: str) -> None:
        """The same weight? Then decompose it again, unless the file holds the basis. The same directions?"""
        weight = weight_matrix(self.get_base_layer()).detach()
        known = config.directions.get(name)
        if known is None:
            raise ValueError(f"the settings of this adapter do not know layer {name!r}; it was made for another model")
        check_weight(known["fingerprint"], weight, name=name)
        if not config.store_basis:
            rank = self.r[adapter]
            svd = thin_svd(weight, rank=rank, niter=config.niter, name=f"layer {name!r}")
            witness = torch.tensor(known["witness"], dtype=torch.float64)
            check_basis(witness, svd.left, svd.right, gap=known["gap"], name=name)
            for key, part in zip(_BASIS, svd, strict=True):
                getattr(self, key)[adapter] = part

    def shift(self, adapter: str) -> Tensor:
        """(r,) what an adapter adds to the singular values."""
        trained = cast(Tensor, self.svfit_trained[adapter])
        return trained - self.svfit_values[adapter] if self.decays[adapter] == "sigma" else trained

    def now(self, adapter: str) -> Factors:
        """``U diag(shift) V^T``."""
        return Factors(self.svfit_left[adapter], self.shift(adapter), self.svfit_right[adapter])

    def trained_values(self) -> Iterator[tuple[nn.Parameter, Decay]]:
        """The parameters of the active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.r:
                yield cast(nn.Parameter, self.svfit_trained[adapter]), self.decays[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One adapter alone takes the cheaper of the two forms of the product; else what the host does."""
        on = [adapter for adapter in self.active_adapters if adapter in self.r]
        off = self.disable_adapters or self.merged or args or kwargs
        if off or len(on) != 1 or isinstance(self.lora_dropout[on[0]], nn.Dropout):
            return super().forward(x, *args, **kwargs)
        return shifted_forward(self.get_base_layer(), x, *self.now(on[0]))


@dataclass
class SVFitConfig(FactorConfig):
    """PEFT's settings for SVFit, see :class:`~regularized.fine_tuning.peft_layer.FactorConfig`.

    Args:
        r: number of directions, or ``"full"``, the default.
        energy: see :func:`~regularized.fine_tuning.svfit.svfit_rank`, instead of ``r``.
        nuclear: see :func:`~regularized.fine_tuning.svfit.svfit_rank`, instead of ``r``.
        decay: see :class:`~regularized.fine_tuning.svfit.SingularValueShift`.
        store_basis: save the singular vectors too; default False.
        rank: ``r`` as it was asked for; filled in here.
        directions: which weights and directions these are; filled in at injection.

    Raises:
        ValueError: a setting is out of its range.

    Examples:
        >>> SVFitConfig(r="full", target_modules=["q_proj"]).technique
        'svfit'
    """

    r: Any = "full"
    energy: float | None = None
    nuclear: float | None = None
    decay: Decay = "shift"
    store_basis: bool = False
    rank: Any = None
    directions: dict[str, Any] = field(default_factory=dict)
    technique: str = "svfit"

    layer_class = HostedSVFit

    def __post_init__(self) -> None:
        by_share = self.energy is not None or self.nuclear is not None
        if self.rank is None and not (by_share and self.r in ("full", 1)):
            self.rank = self.r
        check_svfit_settings(self.rank, energy=self.energy, nuclear=self.nuclear, decay=self.decay)
        self.r = self.rank if isinstance(self.rank, int) else 1  # PEFT wants a number; each layer chooses its own
        super().__post_init__()


def inject(
    model: nn.Module,
    target_modules: Iterable[str] | str | None = None,
    *,
    r: Rank | None = None,
    energy: float | None = None,
    nuclear: float | None = None,
    decay: Decay = "shift",
    store_basis: bool = False,
    adapter_name: str = "default",
    **peft: Any,
) -> PeftModel:
    """Put an SVFit adapter into a model, in place; everything else is frozen. Build the optimizer afterwards.

    Args:
        model: any module with ``nn.Linear``, ``nn.Conv2d`` or transformers' ``Conv1D`` in it.
        target_modules: names of modules or ends of names, a pattern, or ``"all-linear"``, as PEFT takes them; default
            PEFT's choice for the architecture. The paper's count of parameters fits query and value projections.
        r: number of directions, or ``"full"``, the default.
        energy: see :func:`~regularized.fine_tuning.svfit.svfit_rank`, instead of ``r``.
        nuclear: see :func:`~regularized.fine_tuning.svfit.svfit_rank`, instead of ``r``.
        decay: see :class:`~regularized.fine_tuning.svfit.SingularValueShift`.
        store_basis: save the singular vectors too, ``r (o + i)`` numbers a layer: loading then decomposes nothing.
            Needed where singular values at the cut are nearly equal; default False.
        adapter_name: default ``"default"``.
        peft: further settings of PEFT, for example ``task_type`` and ``modules_to_save`` (a head to be trained whole).

    Raises:
        ValueError: a setting is out of its range, a layer has a forward pass of its own, or as
            :func:`regularized.fine_tuning.peft_host.inject`.
        TypeError: as there.

    Examples:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapted, x = inject(model, ["0"], r=4), torch.randn(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapted.save_pretrained(folder)
        ...     again = load(adapted.unload(), folder)
        >>> again(x).shape
        torch.Size([3, 2])
    """
    targets = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    config = SVFitConfig(
        r="full" if r is None else r,
        energy=energy,
        nuclear=nuclear,
        decay=decay,
        store_basis=store_basis,
        target_modules=targets,
        **peft,
    )
    return peft_host.inject(model, config, adapter_name=adapter_name)


def load(model: nn.Module, folder: str | Path, *, adapter_name: str = "default", trainable: bool = False) -> PeftModel:
    """Load an SVFit adapter onto the untouched base model, see :func:`regularized.fine_tuning.peft_host.load`.

    Unless the file holds the basis, each adapted weight is decomposed again.

    Raises:
        ValueError: a weight is not the one of the training, its directions cannot be found again, or as there.
    """
    return peft_host.load(model, folder, SVFitConfig, adapter_name=adapter_name, trainable=trainable)
