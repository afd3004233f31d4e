"""Low-rank adapters in both encoders of a two-tower model: PEFT's own LoRA, with its files and its merging.

Needs the extra: ``pip install "regularized[peft]"``.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from regularized.mechanisms.ranges import Choice, allowed

__all__ = ["add_lora"]

Towers: TypeAlias = Literal["both", "vision", "text"]

_TOWERS = {"both": r"(?:vision_model|text_model)", "vision": "vision_model", "text": "text_model"}


@allowed(towers=Choice(*_TOWERS))
def add_lora(
    model: Any,
    *,
    rank: int = 2,
    alpha: int = 1,
    dropout: float = 0.25,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    towers: Towers = "both",
) -> Any:
    """Put PEFT's LoRA into the attention of both encoders and freeze everything else, the logit scale included.

    At the start the factor B is 0: the model computes what it did before, and the first gradient of A is 0.

    Args:
        model: a ``transformers.CLIPModel``, or one whose encoders are called ``vision_model`` and ``text_model``.
            Changed in place.
        rank: r; default 2 (CLIP-LoRA's recipe, from memory; unconfirmed for GLAD).
        alpha: the update is ``alpha / r B A``; default 1 (as above).
        dropout: of the input of the adapters; default 0.25 (as above).
        targets: names of the linear layers; default query, key and value (as above).
        towers: ``"both"`` (default), ``"vision"`` or ``"text"``.

    Returns:
        A ``peft.PeftModel``.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: unknown ``towers``; by PEFT, a rank below 1 or targets that match nothing.

    Examples:
        >>> import transformers
        >>> tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = transformers.CLIPModel(transformers.CLIPConfig(
        ...     text_config=tower | {"vocab_size": 20}, vision_config=tower | {"image_size": 8, "patch_size": 4}))
        >>> tuned = add_lora(model)
        >>> sum(p.requires_grad for p in tuned.parameters())
        12
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f'add_lora needs {error.name}: pip install "regularized[peft]"') from error
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"(?:.*\.)?{_TOWERS[towers]}\..*\.(?:{'|'.join(targets)})",
    )
    return peft.get_peft_model(model, config)
