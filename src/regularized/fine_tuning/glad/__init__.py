"""GLAD: Generalizable Tuning for Vision-Language Models."""

from regularized.fine_tuning.glad.classifier import FewShotClassifier
from regularized.fine_tuning.glad.huggingface import SteeredTraining
from regularized.fine_tuning.glad.loss import clip_logits, few_shot_loss
from regularized.fine_tuning.glad.optimizer import GLAD, steer
from regularized.fine_tuning.glad.peft import add_lora

__all__ = ["GLAD", "FewShotClassifier", "SteeredTraining", "add_lora", "clip_logits", "few_shot_loss", "steer"]
