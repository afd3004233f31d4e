"""Few-shot classification by an image encoder and a text encoder (CLIP), with low-rank adapters in both.

A class is what its description says: the logit of a class is the similarity of the image with the text. So a model that
is tuned on some classes can be asked about others. The adapters are PEFT's own LoRA: ``save_pretrained``,
``PeftModel.from_pretrained`` and ``merge_and_unload`` of PEFT work on them.

The functions of this module take any model of the form of ``transformers.CLIPModel``. :func:`add_lora` needs the extra:
``pip install "regularized[peft]"``.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FewShotClassifier", "add_lora", "clip_logits", "few_shot_loss"]

# Shapes: B images, C classes, D width of the shared space, L tokens of a description.

Towers: TypeAlias = Literal["both", "vision", "text"]

_TOWERS = {"both": r"(?:vision_model|text_model)", "vision": "vision_model", "text": "text_model"}


def clip_logits(image: Tensor, text: Tensor, *, logit_scale: float | Tensor = 100.0) -> Tensor:
    """Similarity of images with the texts of the classes: the scaled cosine.

    Args:
        image: (B, D) image features.
        text: (C, D) text features, one description a class.
        logit_scale: s, inverse temperature; default 100, CLIP's.

    Returns:
        (B, C) ``s cos(image, text)``.

    Examples:
        >>> import torch
        >>> clip_logits(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), logit_scale=10.0)
        tensor([[10.,  0.]])
    """
    return logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def few_shot_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the described classes.

    Args:
        logits: (B, C).
        labels: (B,) int64 in [0, C). Looked at on the CPU; on another device torch's own assertion answers.

    Raises:
        ValueError: a label has no description.

    Examples:
        >>> import torch
        >>> few_shot_loss(torch.zeros(3, 4), torch.tensor([0, 3, 1]))
        tensor(1.3863)
    """
    classes = logits.shape[-1]
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be in [0, {classes}), the classes that have a description; got {int(labels.min())} to "
            f"{int(labels.max())}. Number the classes of the few shots from 0, in the order of their descriptions"
        )
    return F.cross_entropy(logits, labels)


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
    if towers not in _TOWERS:
        raise ValueError(f"towers must be 'both', 'vision' or 'text', got {towers!r}")
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


class FewShotClassifier(nn.Module):
    """A two-tower model as an image classifier over described classes.

    ``classifier(pixel_values)`` gives logits; with ``labels`` it gives what Hugging Face's ``Trainer`` takes. The
    descriptions pass through the text encoder in each forward, since its adapters change.

    Args:
        model: returns ``logits_per_image`` for ``input_ids``, ``attention_mask`` and ``pixel_values``, as
            ``transformers.CLIPModel`` does, with adapters or without.
        input_ids: (C, L) int64, the descriptions of the classes ("a photo of a cat."), tokenised.
        attention_mask: (C, L), 0 for padding; default None, no padding.

    Raises:
        ValueError: ``input_ids`` is not of shape (C, L).

    Warns:
        UserWarning: the model's ``logit_scale`` is trainable: a few images move it towards over-confidence.

    Examples:
        >>> import torch
        >>> import transformers
        >>> tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = transformers.CLIPModel(transformers.CLIPConfig(
        ...     text_config=tower | {"vocab_size": 20}, vision_config=tower | {"image_size": 8, "patch_size": 4}))
        >>> classifier = FewShotClassifier(add_lora(model), torch.randint(20, (3, 5)))
        >>> classifier(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3])
    """

    input_ids: Tensor
    attention_mask: Tensor | None

    def __init__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        super().__init__()
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must be of shape (C, L), one tokenised description a class; got {tuple(input_ids.shape)}"
            )
        if any(p.requires_grad and name.endswith("logit_scale") for name, p in model.named_parameters()):
            warnings.warn(
                "the model's logit_scale is trainable: few images push it up and make the model over-confident. Freeze "
                "it (model.logit_scale.requires_grad_(False)); add_lora does",
                UserWarning,
                stacklevel=2,
            )
        self.model = model
        # The descriptions belong to the task, not to the weights: they are not saved with them.
        self.register_buffer("input_ids", input_ids, persistent=False)
        self.register_buffer("attention_mask", attention_mask, persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Classify images.

        Args:
            pixel_values: (B, channels, height, width).
            labels: (B,) int64 in [0, C), or None.

        Returns:
            (B, C) logits; with labels a dictionary of ``loss`` and ``logits``.

        Raises:
            ValueError: a label has no description.
        """
        out = self.model(input_ids=self.input_ids, attention_mask=self.attention_mask, pixel_values=pixel_values)
        logits: Tensor = out.logits_per_image
        if labels is None:
            return logits
        return {"loss": few_shot_loss(logits, labels), "logits": logits}
