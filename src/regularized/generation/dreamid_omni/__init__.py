"""DreamID-Omni: one transformer for video and audio of talking people, each with his own face, voice and lines."""

from regularized.generation.dreamid_omni.caption import Line, StructuredCaption, model_text
from regularized.generation.dreamid_omni.config import JointAVConfig
from regularized.generation.dreamid_omni.decode import Seen, decode, measure
from regularized.generation.dreamid_omni.files import picture_strip, save_clip, tones, write_gif, write_wav
from regularized.generation.dreamid_omni.glyphs import Scene, TalkingGlyphs, palette
from regularized.generation.dreamid_omni.guidance import Guidance, code_guidance, paper_guidance
from regularized.generation.dreamid_omni.loss import (
    JointLoss,
    OmniBatch,
    draw_sigma,
    drop_conditions,
    joint_flow_matching_loss,
    masked_velocity_error,
    noised,
)
from regularized.generation.dreamid_omni.model import Conditions, SymmetricConditionalDiT, Velocity
from regularized.generation.dreamid_omni.positions import Layout, SynRoPE, affinity, head_split, rotate
from regularized.generation.dreamid_omni.procedure import OmniData, OmniTraining
from regularized.generation.dreamid_omni.references import fit_picture, reference_voice
from regularized.generation.dreamid_omni.sampling import Clip, sample, shifted_sigmas
from regularized.generation.dreamid_omni.stages import ProgressivePlan, Stage
from regularized.generation.dreamid_omni.weights import load_released

__all__ = [
    "Clip",
    "Conditions",
    "Guidance",
    "JointAVConfig",
    "JointLoss",
    "Layout",
    "Line",
    "OmniBatch",
    "OmniData",
    "OmniTraining",
    "ProgressivePlan",
    "Scene",
    "Seen",
    "Stage",
    "StructuredCaption",
    "SymmetricConditionalDiT",
    "SynRoPE",
    "TalkingGlyphs",
    "Velocity",
    "affinity",
    "code_guidance",
    "decode",
    "draw_sigma",
    "drop_conditions",
    "fit_picture",
    "head_split",
    "joint_flow_matching_loss",
    "load_released",
    "masked_velocity_error",
    "measure",
    "model_text",
    "noised",
    "palette",
    "paper_guidance",
    "picture_strip",
    "reference_voice",
    "rotate",
    "sample",
    "save_clip",
    "shifted_sigmas",
    "tones",
    "write_gif",
    "write_wav",
]
