"""Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models."""

from regularized.unlearning.score_forgetting.diffusion import ConditionalDiffusion, OneStepGenerator
from regularized.unlearning.score_forgetting.labels import LabelSampler
from regularized.unlearning.score_forgetting.loss import eps_matching_loss, sid_generator_loss
from regularized.unlearning.score_forgetting.procedure import Losses, ScoreForgettingDistillation
from regularized.unlearning.score_forgetting.report import PromptReport, prompt_report
from regularized.unlearning.score_forgetting.schedule import NoiseSchedule

__all__ = [
    "ConditionalDiffusion",
    "LabelSampler",
    "Losses",
    "NoiseSchedule",
    "OneStepGenerator",
    "PromptReport",
    "ScoreForgettingDistillation",
    "eps_matching_loss",
    "prompt_report",
    "sid_generator_loss",
]
