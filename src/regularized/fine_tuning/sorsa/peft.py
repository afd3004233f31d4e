"""SORSA on PEFT: for models of transformers and whatever else PEFT adapts.

The mathematics is in :mod:`regularized.fine_tuning.sorsa.layer`, what all such adapters share in
:mod:`regularized.fine_tuning.peft_host`. Needs the extra: ``pip install "regularized[peft]"``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from regularized.fine_tuning import peft_host
from regularized.fine_tuning.peft_layer import FactorConfig, FactorLayer, Factors
from regularized.fine_tuning.sorsa.layer import SingularFactors
from regularized.mechanisms.svd import SVD

try:
    from peft import PeftModel
except ModuleNotFoundError as _error:
    raise ImportError(f'SORSA on PEFT needs {_error.name}: pip install "regularized[peft]"') from _error

__all__ = ["SorsaConfig", "SorsaLayer", "inject", "load"]


class SorsaLayer(FactorLayer, SingularFactors):
    """A layer of PEFT with trained singular triplets; the base weight is the residual."""

    trainable = ("sorsa_left", "sorsa_values", "sorsa_right")
    frozen = ("sorsa_left_0", "sorsa_values_0", "sorsa_right_0")  # what the base weight has lost

    def start(self, svd: SVD, scale: float) -> dict[str, Tensor]:
        """The leading triplets, twice: to be trained, and as a record of the start."""
        names = (*self.trainable, *self.frozen)
        return {name: part.clone() for name, part in zip(names, (*svd, *svd), strict=True)}

    def now(self, adapter: str) -> Factors:
        """``c (left * values) right``."""
        return self._factors(self.trainable, adapter)

    def taken(self, adapter: str) -> Factors:
        """The same of step 0."""
        return self._factors(self.frozen, adapter)

    def _factors(self, names: tuple[str, ...], adapter: str) -> Factors:
        left, values, right = (getattr(self, name)[adapter] for name in names)
        return Factors(left, self.scaling[adapter] * values, right)

    def singular_factors(self) -> Iterator[Tensor]:
        """``left`` and ``right`` of the active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.r:
                left, _, right = (getattr(self, name)[adapter] for name in self.trainable)
                yield left
                yield right

    @property
    def is_merged(self) -> bool:
        """Whether an adapter is merged into the base weight."""
        return bool(self.merged)


@dataclass
class SorsaConfig(FactorConfig):
    """PEFT's settings for SORSA, see :class:`~regularized.fine_tuning.peft_layer.FactorConfig`.

    Examples:
        >>> SorsaConfig(r=16, target_modules=["q_proj"]).technique
        'sorsa'
    """

    technique: str = "sorsa"
    layer_class = SorsaLayer


def inject(
    model: nn.Module,
    target_modules: Iterable[str] | str | None = None,
    *,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    niter: int | None = None,
    task_type: str | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Put a SORSA adapter into a model, in place; everything else is frozen. Build the optimizer afterwards.

    Train with :class:`~regularized.fine_tuning.sorsa.OrthonormalPenalty` in your own loop, with
    :class:`~regularized.fine_tuning.sorsa.huggingface.SorsaCallback` in transformers' ``Trainer``, or with
    :class:`~regularized.fine_tuning.sorsa.Sorsa` in ours.

    Args:
        model: any module with ``nn.Linear``, ``nn.Conv2d`` or transformers' ``Conv1D`` in it.
        target_modules: names of modules or ends of names, a pattern, or ``"all-linear"``, as PEFT takes them; default
            PEFT's choice for the architecture. The authors take all projections of attention and feed-forward.
        r: rank; 128 in the authors' runs with 7 B models.
        alpha: scale c = alpha / r of the factors; default None is c = 1 (official default).
        dropout: on the input of the factors; default 0 (official default).
        niter: power iterations of a randomised decomposition; default None decomposes exactly.
        task_type: PEFT's, for example ``"CAUSAL_LM"``.
        adapter_name: default ``"default"``.

    Raises:
        ValueError: as :func:`regularized.fine_tuning.peft_host.inject`.
        TypeError: as there.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapted, x = inject(model, ["0"], r=2), torch.randn(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapted.save_pretrained(folder)
        ...     again = load(adapted.unload(), folder)
        >>> again(x).shape
        torch.Size([3, 2])
    """
    targets = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    config = SorsaConfig(
        r=r,
        alpha=alpha,
        niter=niter,
        lora_dropout=dropout,
        target_modules=targets,
        task_type=task_type,
    )
    return peft_host.inject(model, config, adapter_name=adapter_name)


def load(model: nn.Module, folder: str | Path, *, adapter_name: str = "default", trainable: bool = False) -> PeftModel:
    """Load a SORSA adapter onto the untouched base model, see :func:`regularized.fine_tuning.peft_host.load`."""
    return peft_host.load(model, folder, SorsaConfig, adapter_name=adapter_name, trainable=trainable)
