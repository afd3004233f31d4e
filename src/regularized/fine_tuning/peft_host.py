"""PEFT as the host of adapters that are factors of a weight: ``W = rest + left diag(middle) right``.

PEFT's registry of methods is closed, but its LoRA takes layer classes of others
(``LoraConfig._register_custom_module``). A technique brings one, see :mod:`regularized.fine_tuning.peft_layer`; PEFT
does the rest: which modules are meant, names, several adapters, ``Trainer``, saving and loading, merging.

An adapter may take its start out of the base weight (``taken``), so that the layer first computes what it computed
before. Three rules follow, and hold for all techniques here:

- An adapter that is off (not active, disabled, unloaded, deleted) adds what it has taken: off is the original layer.
- The file of an adapter holds what was taken, so that it loads on the untouched base. Its settings hold a checksum of
  both, see :mod:`regularized.mechanisms.sealed_files`.
- What an adapter changes, ``now - taken``, is a low-rank matrix: :func:`export_lora` writes it as a standard LoRA for
  the untouched base, which stock PEFT loads.

Needs the extra: ``pip install "regularized[peft]"``.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from regularized.fine_tuning.peft_layer import WEIGHTS, FactorConfig, FactorLayer
from regularized.mechanisms.surgery import check_called, close_names, tied_parameters
from regularized.mechanisms.svd import weight_like, weight_matrix

try:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraModel
    from peft.utils.save_and_load import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D
except ModuleNotFoundError as _error:
    if _error.name not in ("peft", "transformers"):
        raise
    raise ImportError(f'adapters on PEFT need {_error.name}: pip install "regularized[peft]"') from _error

__all__ = ["base_state_dict", "export_lora", "factor_layers", "inject", "load"]

_PREFIX = "base_model.model."  # of the base model's names in PEFT's


def factor_layers(model: nn.Module) -> Iterator[tuple[str, FactorLayer]]:
    """The layers of a model that hold adapters of this kind, by name."""
    for name, module in model.named_modules():
        if isinstance(module, FactorLayer):
            yield name, module


def inject(model: nn.Module, config: FactorConfig, *, adapter_name: str = "default") -> PeftModel:
    """Put an adapter into a model, in place; everything else is frozen. Build the optimizer afterwards.

    Args:
        model: any module with ``nn.Linear``, ``nn.Conv2d`` or transformers' ``Conv1D`` in it.
        config: settings of the technique.
        adapter_name: default ``"default"``.

    Returns:
        PEFT's model around the same module: train it, ``save_pretrained``, ``merge_and_unload`` ...

    Raises:
        ValueError: nothing matches ``target_modules``; an adapter is there already; a matching layer shares its weight
            with another one, or its weight is read without calling it; or a layer refuses (rank, non-finite weight).
        TypeError: a matching module is of another kind (an embedding, attention as a whole ...), or quantized. The
            model is left as it was, unless PEFT chose the modules.
    """
    if isinstance(model, PeftModel) or any(True for _ in factor_layers(model)):
        raise ValueError(
            "the model already has an adapter; start from the plain model (merge_and_unload() or unload()), or add "
            "a second one with model.add_adapter(name, config)"
        )
    _check_targets(model, config)
    adapted = get_peft_model(model, config, adapter_name)
    # The ranks that layers chose for themselves belong to the settings, so that the file can be loaded.
    chosen = {_exactly(name): layer.r[adapter_name] for name, layer in factor_layers(adapted)}
    config.rank_pattern = {**(config.rank_pattern or {}), **{k: r for k, r in chosen.items() if r != config.r}}
    return _complete(adapted)


def _check_targets(model: nn.Module, config: FactorConfig) -> None:
    """Refuse modules that cannot be adapted while the model is as it was; PEFT would find out halfway through it.

    What PEFT chooses by itself (no ``target_modules``) the layers check, one by one.
    """
    if config.target_modules is None:
        return
    modules = {name: module for name, module in model.named_modules() if name}
    if config.target_modules == "all-linear":
        meant = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    else:
        meant = {n: m for n, m in modules.items() if LoraModel._check_target_module_exists(config, n)}
        if not meant:
            asked = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules)
            able = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d | Conv1D)]
            raise ValueError(f"no module matches target_modules={asked}; {close_names(asked, able)}")
        tied = {owner.rpartition(".")[0]: owners for owners in tied_parameters(model).values() for owner in owners}
        for name in (name for name in meant if name in tied):
            raise ValueError(
                f"layer {name!r} shares its weight ({', '.join(tied[name])}), which would change in both places; leave "
                "it out of target_modules"
            )
    for name, module in meant.items():
        weight_matrix(module, f"layer {name!r}")
    check_called(model, meant)


def _complete(adapted: PeftModel) -> PeftModel:
    """Tell the layers that they are inside a PeftModel, whose whole state is another one than that of its inside."""
    for _, layer in factor_layers(adapted):
        layer.inside_peft_model = True
    return adapted


def load(
    model: nn.Module,
    folder: str | Path,
    config_class: type[FactorConfig],
    *,
    adapter_name: str = "default",
    trainable: bool = False,
) -> PeftModel:
    """Load an adapter that ``save_pretrained`` wrote, onto the untouched base model; nothing is decomposed.

    Args:
        model: the base model as it was before injection, or a ``PeftModel`` that gets one more adapter.
        folder: with ``adapter_model.safetensors`` and ``adapter_config.json``.
        config_class: settings class of the technique.
        adapter_name: name that the adapter gets here.
        trainable: go on training it; default False.

    Raises:
        FileNotFoundError: no adapter is there.
        ValueError: it belongs to another technique, is damaged, or does not fit the model.
    """
    config = config_class.read(folder)
    try:
        if isinstance(model, PeftModel):
            config.inference_mode = not trainable
            model.add_adapter(adapter_name, config)
            set_peft_model_state_dict(model, load_peft_weights(str(folder)), adapter_name)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(
                model, str(folder), adapter_name=adapter_name, is_trainable=trainable, config=config
            )
    except (RuntimeError, SafetensorError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the adapter in {folder} does not fit this model: {error}") from error
    # PEFT reports only missing keys that are named like LoRA's.
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        held = set(file.keys())
    if missing := sorted(set(get_peft_model_state_dict(adapted, adapter_name=adapter_name)) - held):
        raise ValueError(
            f"the adapter in {folder} does not fit this model: it lacks {len(missing)} tensors, such as {missing[:3]}"
        )
    return _complete(adapted)


def base_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """Weights of the base model as they were before the adapters, under their own names; equal up to rounding.

    PEFT's ``get_base_model_state_dict`` raises where adapters have taken something out of the base weights.

    Args:
        model: from :func:`inject` or :func:`load`.

    Raises:
        RuntimeError: an adapter is merged.
    """
    layers = dict(factor_layers(model))
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"an adapter is merged into {len(merged)} layers; call unmerge_adapter() first")
    for layer in layers.values():
        layer.inside_peft_model = False
    try:
        state: dict[str, Tensor] = get_base_model_state_dict(model)
    finally:
        _complete(model)
    for name, layer in layers.items():
        weight = cast(Tensor, layer.get_base_layer().weight)
        original = weight_like(layer.get_base_layer(), layer.original_matrix())
        state[f"{name.removeprefix(_PREFIX)}.weight"] = original.to(weight.dtype)
    return state


def export_lora(model: PeftModel, folder: str | Path, *, adapter_name: str | Mapping[str, float] = "default") -> Path:
    """Write what an adapter changes as a standard PEFT LoRA, for the untouched base model.

    Exact up to rounding: a LoRA of rank r or 2 r with scale 1. ``PeftModel.from_pretrained(base, folder)`` of stock
    PEFT loads it, and so does whatever else reads LoRA files.

    Args:
        model: from :func:`inject` or :func:`load`.
        folder: made if it is not there.
        adapter_name: which adapter; or several, each with a factor on its change: their weighted sum, of as many ranks
            as all of them have.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such adapter; several of them save one module whole; or a convolution whose dilation or
            padding PEFT's LoRA would ignore.
    """
    shares = {adapter_name: 1.0} if isinstance(adapter_name, str) else dict(adapter_name)
    known = getattr(model, "peft_config", {})
    if unknown := sorted(shares.keys() - known.keys()) or ([] if shares else ["of no name"]):
        raise ValueError(f"there is no adapter {unknown[0]!r}; there are {sorted(known)}")
    layers = {name: layer for name, layer in factor_layers(model) if shares.keys() & layer.r.keys()}
    tensors = _saved_besides(model, layers, shares)
    ranks = {}
    for name, layer in layers.items():
        changes = [(layer.change(adapter), share) for adapter, share in shares.items() if adapter in layer.r]
        right = torch.cat([change.right for change, _ in changes])
        left = torch.cat([change.left * (share * change.middle) for change, share in changes], dim=1)
        ranks[name] = len(right)
        base = layer.get_base_layer()
        if isinstance(base, nn.Conv2d):
            if base.padding_mode != "zeros" or any(d != 1 for d in base.dilation):
                raise ValueError(
                    f"{name} has dilation {base.dilation} and padding_mode {base.padding_mode!r}, which PEFT's LoRA "
                    "for convolutions ignores, so the export would compute something else; merge_and_unload() instead"
                )
            right, left = right.reshape(-1, *base.weight.shape[1:]), left[:, :, None, None]
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = right, left
    most = max(ranks.values())
    pattern = {_exactly(name): rank for name, rank in ranks.items() if rank != most}
    configs = [known[adapter] for adapter in shares]
    copied = {f.name: getattr(configs[0], f.name) for f in dataclasses.fields(LoraConfig) if f.init}
    if len(configs) > 1:
        copied["target_modules"] = "|".join(_exactly(name) for name in layers)
        copied["modules_to_save"] = sorted({m for config in configs for m in config.modules_to_save or ()}) or None
    standard = LoraConfig(
        **{
            **copied,
            "r": most,
            "lora_alpha": most,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "inference_mode": True,
            "fan_in_fan_out": any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        }
    )
    out = Path(folder)
    standard.save_pretrained(str(out))
    save_file({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, out / WEIGHTS, {"format": "pt"})
    return out


def _saved_besides(model: PeftModel, layers: Mapping[str, FactorLayer], adapters: Iterable[str]) -> dict[str, Tensor]:
    """What PEFT saves of adapters besides their factors: ``modules_to_save``, biases, token embeddings."""
    inside = tuple(f"{name}." for name in layers)
    own = {key for layer in layers.values() for key in (*layer.trainable, *layer.frozen)}
    tensors: dict[str, Tensor] = {}
    for adapter in adapters:
        saved = get_peft_model_state_dict(model, adapter_name=adapter)
        besides = {k: t for k, t in saved.items() if not (k.startswith(inside) and k.rpartition(".")[2] in own)}
        if both := sorted(besides.keys() & tensors.keys()):
            raise ValueError(
                f"several of the adapters save {both[0]!r} whole, of which there is no weighted sum; export each alone"
            )
        tensors |= besides
    return tensors


def _exactly(name: str) -> str:
    """A layer's name as a pattern of PEFT, which knows it without the wrapper's prefix."""
    return re.escape(name.removeprefix(_PREFIX))
