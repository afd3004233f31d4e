"""The released weights: read by their own names, without a conversion and without two copies in memory."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from regularized.generation.dreamid_omni.config import JointAVConfig
from regularized.generation.dreamid_omni.model import SymmetricConditionalDiT
from regularized.generation.dreamid_omni.positions import SynRoPE

__all__ = ["load_released"]


def load_released(
    source: str | Path | Mapping[str, Tensor],
    *,
    config: JointAVConfig | None = None,
    syn_rope: SynRoPE | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> SymmetricConditionalDiT:
    """Build the model without memory and give it weights, every one of them.

    Args:
        source: file of the released weights (``dreamid_omni.safetensors``, 46.6 GB of float32), or tensors by name. A
            file is read tensor by tensor, so that no more than the result is ever held.
        config: default :meth:`JointAVConfig.dreamid_omni`.
        syn_rope: default the released code's positions: starts of voices at whole audio steps, gamma in bfloat16.
        device: where the weights go.
        dtype: default bfloat16, 23.3 GB (released code).

    Returns:
        The model in evaluation mode; its weights need a gradient as usual.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or sizes differ; the message says which.

    Examples:
        >>> tiny = SymmetricConditionalDiT(JointAVConfig.tiny())
        >>> model = load_released(tiny.state_dict(), config=tiny.config, dtype=torch.float32)
        >>> bool((model.video_model.patch_embedding.weight == tiny.video_model.patch_embedding.weight).all())
        True
    """
    config = JointAVConfig.dreamid_omni() if config is None else config
    if syn_rope is None:
        syn_rope = SynRoPE(placing="code", gamma=float(torch.tensor(31 / 157, dtype=torch.bfloat16)))
    with torch.device("meta"):
        model = SymmetricConditionalDiT(config, syn_rope=syn_rope)
    if isinstance(source, Mapping):
        tensors = {name: tensor.to(device, dtype) for name, tensor in source.items()}
    else:
        tensors = _read(Path(source), device, dtype)
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    sizes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    if missing or unknown or sizes:
        raise ValueError(
            f"the weights do not fit this model: missing {missing[:3]} ({len(missing)} in all), unknown {unknown[:3]} "
            f"({len(unknown)} in all), other sizes {sizes[:3]}; give the config that they were made with"
        )
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def _read(path: Path, device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; the weights are XuGuo699/DreamID-Omni on Hugging Face")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to(device, dtype) for name in file.keys()}  # noqa: SIM118
