"""Adapters that are factors of a weight, as layers of PEFT's LoRA: what a technique defines, and what follows from it.

A technique subclasses :class:`FactorLayer`, which says how the factors start and what they add, and
:class:`FactorConfig`, which carries its settings. How they are used is in
:mod:`regularized.fine_tuning.peft_host`. Needs the extra: ``pip install "regularized[peft]"``.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import count, positive
from regularized.mechanisms.sealed_files import check_seal, read_settings, write_settings
from regularized.mechanisms.svd import SVD, thin_svd, weight_like, weight_matrix

try:
    from peft import LoraConfig
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ModuleNotFoundError as _error:
    if _error.name not in ("peft", "transformers"):
        raise
    raise ImportError(f'adapters on PEFT need {_error.name}: pip install "regularized[peft]"') from _error

__all__ = ["FREE_SETTINGS", "WEIGHTS", "FactorConfig", "FactorLayer", "Factors"]

# Shapes: o outputs, i inputs (of a convolution: channels x kernel), r rank.

WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
FREE_SETTINGS = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "task_type")
"""What may be changed in a file by hand: where the base model is, and what PEFT notes on the way."""


class Factors(NamedTuple):
    """A low-rank matrix (o, i), ``left @ diag(middle) @ right``; a scale is inside ``middle``.

    Attributes:
        left: (o, r).
        middle: (r,).
        right: (r, i).
    """

    left: Tensor
    middle: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The matrix itself."""
        return (self.left * self.middle) @ self.right


@dataclass
class FactorConfig(LoraConfig):
    """Settings of an adapter of factors; a technique adds its own fields, which are saved with the adapter.

    Args:
        alpha: scale c = alpha / r of the factors; default None is c = 1.
        niter: power iterations of a randomised decomposition; default None decomposes exactly.
        technique: whose adapter it is; set by the technique.

    The other arguments are PEFT's (``r``, ``target_modules``, ``lora_dropout``, ``rank_pattern``, ``modules_to_save``,
    ``task_type`` ...). Its variants (DoRA, rsLoRA, a bias in the adapter, ...) are refused, and so is ``lora_alpha``:
    a factor on the matrices of a LoRA, which there are none of here.
    """

    alpha: float | None = None
    niter: int | None = None
    technique: str = ""
    lora_alpha: Any = None

    layer_class: ClassVar[type["FactorLayer"]]

    def __post_init__(self) -> None:
        count(1)("r", self.r)
        positive().or_none("a scale of 1")("alpha", self.alpha)
        refused = [
            name
            for name in ("use_dora", "use_rslora", "lora_bias", "use_qalora", "megatron_config", "target_parameters")
            if getattr(self, name, None)
        ]
        if refused:
            raise ValueError(f"{', '.join(refused)} cannot be had in an adapter of factors; leave it at its default")
        if self.lora_alpha is not None:  # PEFT's add_weighted_adapter sets it, too
            raise ValueError(
                f"lora_alpha={self.lora_alpha} cannot be had in an adapter of factors, give alpha for its scale; and "
                "PEFT's add_weighted_adapter, which sets it, cannot combine such adapters: export_lora(model, folder, "
                "adapter_name={'one': 0.7, 'two': 0.3}) writes their weighted sum as a LoRA, exactly"
            )
        super().__post_init__()  # type: ignore[no-untyped-call]
        # Whatever PEFT means comes to the layer, which refuses what it cannot split: nothing becomes a stock LoRA.
        self._register_custom_module({nn.Module: self.layer_class})

    def scale(self, rank: int) -> float:
        """The factor c in front of the product."""
        return 1.0 if self.alpha is None else self.alpha / rank

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The settings that ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: there is no adapter in the folder.
            ValueError: it is an adapter of another technique, or damaged.
        """
        path = Path(folder) / _CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; give the folder that save_pretrained wrote the adapter to")
        saved = read_settings(path)
        own = {field.name: field.default for field in dataclasses.fields(cls)}
        if saved.get("technique") != own["technique"]:
            raise ValueError(
                f"{folder} holds an adapter of {saved.get('technique') or 'stock PEFT'!r}, not of {own['technique']!r}"
            )
        check_seal(saved, Path(folder) / WEIGHTS, free=FREE_SETTINGS)
        kept = {n: value for n, value in saved.items() if n in own and n not in ("runtime_config", "peft_type")}
        # The factors come from the file, not from a decomposition.
        kept |= {"init_lora_weights": False, "lora_alpha": None}
        try:
            return cls(**kept)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds settings that cannot be: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dictionary, for the file."""
        # Stock PEFT divides by lora_alpha before it finds out that nothing in the file is its own.
        return {**super().to_dict(), "lora_alpha": self.r}  # type: ignore[no-untyped-call]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the settings, sealed with the weights beside them, which PEFT's ``save_pretrained`` writes before."""
        super().save_pretrained(save_directory, **kwargs)
        path, weights, card = (Path(save_directory) / name for name in (_CONFIG, WEIGHTS, "README.md"))
        # Stock PEFT would build a LoRA, find none of its matrices in the file, and leave the base model as it is, with
        # a warning. It looks this word up, and its KeyError then says what to do.
        settings = {**read_settings(path), "peft_type": self.how_to_load()}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        if weights.is_file():
            write_settings(path, settings, weights, free=FREE_SETTINGS)
        if card.is_file():
            self._complete_card(card)

    def how_to_load(self) -> str:
        """What to do with the folder, in a sentence."""
        module = type(self).__module__
        return (
            f"an adapter of {self.technique.upper()}, no LoRA, and stock PEFT cannot read it: use {module}.load(model, "
            "folder), or have its owner write a LoRA by regularized.fine_tuning.peft_host.export_lora(model, folder)"
        )

    def _complete_card(self, card: Path) -> None:
        """PEFT's model card says that PEFT loads it."""
        text = card.read_text(encoding="utf-8").replace("library_name: peft", "library_name: regularized")
        head, fence, rest = text.partition("---\n\n")  # the end of the front matter
        said = f"> This is {self.how_to_load()}.\n"
        if fence and said not in text:
            card.write_text(f"{head}{fence}{said}\n{rest}", encoding="utf-8")


class FactorLayer(nn.Module, LoraLayer):
    """A layer of PEFT whose adapters are factors. A technique sets the two lists and defines three methods.

    Attributes:
        trainable: names of the trained tensors; each becomes a ``ParameterDict`` by adapter.
        frozen: names of the constant ones; each becomes a saved ``BufferDict`` by adapter.
        known: names of what else a layer knows of an adapter; each becomes a dictionary by adapter.
    """

    trainable: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[tuple[str, ...]] = ()

    base_layer: nn.Module

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: FactorConfig, r: int = 0, **settings: Any
    ) -> None:
        super().__init__()
        self.name: str = str(settings.get("target_name") or type(base_layer).__name__)
        weight_matrix(base_layer, f"layer {self.name!r}")  # refuses what cannot be split, before PEFT looks at it
        LoraLayer.__init__(self, base_layer)
        self.adapter_layer_names = self.trainable
        # In ``lora_A`` PEFT looks which adapters there are; it holds their names, no matrices.
        self.other_param_names = (*self.frozen, *self.known, "lora_A", "r", "lora_alpha", "scaling", "lora_dropout")
        for name in self.trainable:
            setattr(self, name, nn.ParameterDict())
        for name in self.frozen:
            setattr(self, name, BufferDict(persistent=True))
        for name in self.known:
            setattr(self, name, {})
        self.register_load_state_dict_post_hook(_take_again)  # type: ignore[no-untyped-call]
        self._active_adapter = adapter_name
        self._before_loading: dict[str, Factors | None] = {}
        self.inside_peft_model = False  # then the state of the inside alone is not that of the base model
        self.update_layer(adapter_name, r, config=config, **settings)

    # -- what a technique defines ---------------------------------------------------------------

    def choose_rank(self, values: Tensor, config: FactorConfig) -> int | None:
        """The rank of this layer by its singular values; None (default) is the configured one."""
        return None

    def start(self, svd: SVD, scale: float) -> dict[str, Tensor]:
        """The tensors of ``trainable`` and ``frozen`` at step 0.

        Args:
            svd: decomposition of the original weight, cut off at the rank. While loading it is all zeros, and the
                values come from the file.
            scale: c.
        """
        raise NotImplementedError

    def now(self, adapter: str) -> Factors:
        """What the adapter adds at present."""
        raise NotImplementedError

    def taken(self, adapter: str) -> Factors | None:
        """What it took out of the base weight at step 0; None leaves the base weight untouched."""
        return None

    # -- what PEFT calls ------------------------------------------------------------------------

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, r: int, lora_alpha: float = 1.0, *, config: FactorConfig, **settings: Any
    ) -> None:
        """Add an adapter to this layer.

        Raises:
            TypeError: the settings are those of another technique, or the weight is quantized.
            ValueError: the rank does not fit, the weight is not finite, or the adapter is already there.
        """
        name = repr(self.name)
        if not isinstance(config, FactorConfig) or not isinstance(self, config.layer_class):
            raise TypeError(
                f"layer {name} holds adapters of {type(self).__name__} and cannot take one of {type(config).__name__}; "
                "load each on a base model of its own"
            )
        if adapter_name in self.r:
            raise ValueError(f"layer {name} already has an adapter {adapter_name!r}; choose another name")
        svd = self._decompose(r, config, name)
        rank = len(svd.values)
        self.r[adapter_name] = rank
        self.lora_A[adapter_name] = nn.Module()
        self.scaling[adapter_name] = config.scale(rank)
        self.lora_alpha[adapter_name] = config.scale(rank) * rank
        drop = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout[adapter_name] = drop
        for key, tensor in self.start(svd, self.scaling[adapter_name]).items():
            getattr(self, key)[adapter_name] = nn.Parameter(tensor) if key in self.trainable else tensor
        if (taken := self.taken(adapter_name)) is not None:
            self._fold(taken, -1)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _decompose(self, r: int, config: FactorConfig, name: str) -> SVD:
        if not config.init_lora_weights:
            base = weight_matrix(self.get_base_layer(), name)
            o, i = base.shape
            zeros, dtype = base.new_zeros, torch.promote_types(base.dtype, torch.float32)
            return SVD(zeros(o, r, dtype=dtype), zeros(r, dtype=dtype), zeros(r, i, dtype=dtype))
        original = self.original_matrix()
        if r > min(original.shape):
            raise ValueError(
                f"r is {r}, but layer {name} has a weight of shape {tuple(original.shape)} and takes at most "
                f"{min(original.shape)}; lower r, or give this layer its own with rank_pattern"
            )
        needs_all = type(self).choose_rank is not FactorLayer.choose_rank
        svd = thin_svd(original, rank=None if needs_all else r, niter=config.niter, name=f"layer {name}")
        rank = self.choose_rank(svd.values, config) or r
        return SVD(*(t.contiguous() for t in (svd.left[:, :rank], svd.values[:rank], svd.right[:rank])))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer, and what each adapter that is not merged adds.

        Raises:
            RuntimeError: training while an adapter is merged.
            NotImplementedError: several adapters in one batch (``adapter_names``).
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise NotImplementedError("adapter_names: a batch of several adapters is not supported; use set_adapter")
        if self.merged:
            if self.disable_adapters:
                self.unmerge()
            elif self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"the adapter is merged ({', '.join(self.merged_adapters)}), so training would not reach it; call "
                    "unmerge_adapter() first, or eval() if this is no training"
                )
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.r:
            if adapter in self.merged_adapters:
                continue
            on = not self.disable_adapters and adapter in self.active_adapters
            factors = self.now(adapter) if on else self.taken(adapter)
            if factors is not None:
                inputs = self._cast_input_dtype(x, factors.right.dtype)
                result = self.add(result, self.lora_dropout[adapter](inputs) if on else inputs, factors)
        return result.to(dtype)

    def add(self, result: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """``result`` plus the factors applied to ``x``, by two thin products: never through the (o, i) matrix."""
        left, middle, right = factors
        base = self.get_base_layer()
        if isinstance(base, nn.Conv2d):
            kernel = right.reshape(-1, *base.weight.shape[1:])
            hidden = base._conv_forward(x, kernel, None) * middle[:, None, None]
            return result + F.conv2d(hidden, left[:, :, None, None])
        return result + F.linear(F.linear(x, right) * middle, left)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the base weight.

        Raises:
            ValueError: with ``safe_merge``, the merged weight would not be finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.r:
                factors = self.now(adapter)
                if safe_merge and not bool(torch.isfinite(factors.dense()).all()):
                    raise ValueError(f"adapter {adapter!r} holds values that are not finite and was not merged")
                self._fold(factors, 1)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged adapters out again; the weight comes back up to rounding in its own dtype."""
        while self.merged_adapters:
            self._fold(self.now(self.merged_adapters.pop()), -1)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain layer for the end: with the adapters, or as it was before."""
        if merge:
            self.merge(safe_merge, adapter_names)
        for adapter in self.r:
            self._give_back(adapter)
        return self.get_base_layer()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; what it took from the base weight is given back."""
        if adapter_name in self.r:
            self._give_back(adapter_name)
            for key in self.frozen:  # torch remembers names of buffers that are not saved; this makes it forget
                held = getattr(self, key)
                held.register_buffer(adapter_name, held[adapter_name])
        super().delete_adapter(adapter_name)

    def original_matrix(self) -> Tensor:
        """(o, i) the base weight with what the adapters took out of it, float32 at least; no adapter is merged."""
        base = weight_matrix(self.get_base_layer(), repr(self.name)).detach()
        # Adapters are never rounded to the base's bfloat16.
        original = base.to(torch.promote_types(base.dtype, torch.float32))
        for adapter in self.r:
            if (taken := self.taken(adapter)) is not None:
                original = original + taken.dense()
        return original

    def change(self, adapter: str) -> Factors:
        """What the adapter changes, ``now - taken``, as factors of rank r or 2 r."""
        now, taken = self.now(adapter), self.taken(adapter)
        if taken is None:
            return now
        return Factors(
            torch.cat([now.left, taken.left], dim=1),
            torch.cat([now.middle, -taken.middle]),
            torch.cat([now.right, taken.right]),
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter changes, in the layout of the base weight."""
        return weight_like(self.get_base_layer(), self.change(adapter).dense())

    def set_scale(self, adapter: str, scale: float) -> None:
        """Not possible: the factors are a part of the weight, and half of them is not half of the change."""
        raise NotImplementedError("an adapter that is a part of the weight cannot be scaled; export it as LoRA first")

    def scale_layer(self, scale: float) -> None:
        """Not possible, see :meth:`set_scale`."""
        if scale != 1:
            self.set_scale("", scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing to undo, see :meth:`set_scale`."""
        self.scale_layer(1 if scale is None else scale)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would also round the factors to the dtype of the base weight.
        target = device or cast(Tensor, self.get_base_layer().weight).device
        for key in (*self.trainable, *self.frozen):
            held = getattr(self, key)
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name] = held[adapter_name].to(target)

    # -- the base weight ------------------------------------------------------------------------

    @torch.no_grad()
    def _fold(self, factors: Factors, sign: int) -> None:
        base = self.get_base_layer()
        weight = cast(nn.Parameter, base.weight)
        change = weight_like(base, factors.dense()).to(weight.device)
        weight.data = (weight.data + sign * change).to(weight.dtype)  # summed in float32, rounded once

    def _give_back(self, adapter: str) -> None:
        taken = self.taken(adapter)
        if taken is not None and adapter not in self.merged_adapters:
            self._fold(taken, 1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        takes = any(self.taken(adapter) is not None for adapter in self.r)
        if self.inside_peft_model and takes and prefix == f"{self.name}.":
            raise RuntimeError(
                "the state of the inner model alone was asked for, but it is not that of the base model: layer "
                f"{self.name!r} lacks what its adapters have taken out of it. base_state_dict(model) of "
                "regularized.fine_tuning.peft_host gives the base model's, model.state_dict() that of the PeftModel"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Before new values arrive: remember what the present ones took from the base weight, to take anew."""
        self._before_loading = {}
        if f"{prefix}base_layer.weight" not in state_dict:  # otherwise the base weight comes with it
            for adapter in self.r:
                new = {key: state_dict.get(f"{prefix}{key}.{adapter}") for key in self.frozen}
                old = {key: getattr(self, key)[adapter] for key in self.frozen}
                if any(value is not None and not _same(value, old[key]) for key, value in new.items()):
                    if self.merged:
                        raise RuntimeError("an adapter is merged; call unmerge_adapter() before loading another one")
                    taken = self.taken(adapter)
                    self._before_loading[adapter] = taken and Factors(*(t.detach().clone() for t in taken))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _take_again(layer: nn.Module, _: Any) -> None:
    """After loading: give back what the old factors had taken, take what the new ones say."""
    assert isinstance(layer, FactorLayer)
    for adapter, before in layer._before_loading.items():
        if before is not None:
            layer._fold(before, 1)
        if (taken := layer.taken(adapter)) is not None:
            layer._fold(taken, -1)
    layer._before_loading = {}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and not b.is_meta and torch.equal(a.to(b.device, b.dtype), b)
