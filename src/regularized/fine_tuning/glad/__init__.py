"""GLAD: Generalizable Tuning for Vision-Language Models."""

from regularized.fine_tuning.glad.optimizer import GLAD, SteeredTraining, steer
from regularized.fine_tuning.glad.two_tower import FewShotClassifier, add_lora, clip_logits, few_shot_loss

__all__ = ["GLAD", "FewShotClassifier", "SteeredTraining", "add_lora", "clip_logits", "few_shot_loss", "steer"]
