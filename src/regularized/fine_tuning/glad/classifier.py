"""Few-shot classification by an image encoder and a text encoder (CLIP).

A class is what its description says: the logit of a class is the similarity of the image with the text. So a model that
is tuned on some classes can be asked about others.
"""

import warnings
from typing import Any

from torch import Tensor, nn

from regularized.fine_tuning.glad.loss import few_shot_loss

__all__ = ["FewShotClassifier"]

# Shapes: B images, C classes, L tokens of a description.


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
        >>> from regularized.fine_tuning.glad import add_lora
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
