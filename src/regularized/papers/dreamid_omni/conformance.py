"""Golden vectors of DreamID-Omni: rotary positions, the whole two-stream network, sampling steps and guidance.

The released modules, run in float64 with exact attention and with the division of the margin repaired, which they make
once for every sample of a batch. ``audio_rope_shipped_batch2``, what they give for a second sample without the repair,
is no output of ours.
"""

import ast
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.conformance import Case, UnknownCase
from regularized.generation.dreamid_omni.config import JointAVConfig
from regularized.generation.dreamid_omni.guidance import code_guidance
from regularized.generation.dreamid_omni.model import SymmetricConditionalDiT
from regularized.generation.dreamid_omni.positions import Layout, SynRoPE, rotate
from regularized.generation.dreamid_omni.sampling import shifted_sigmas

TOLERANCE = 1e-9


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for: rotated heads, a forward pass of the network, sigmas, or a guided velocity."""
    if case.has("in/video", "in/audio", "hp/ref_audio_lengths"):
        return _rotated(case)
    if case.has("in/video", "in/audio", "in/text", "in/t", "hp/param_names"):
        return _network(case)
    if case.has("hp/steps", "hp/shift"):
        sigmas = shifted_sigmas(int(case.number("steps")), shift=case.number("shift"))
        return {"sigmas_linear_shifted": sigmas.numpy()}
    if case.has("in/pos", "in/neg_text", "in/no_ref"):
        full, no_text, no_ref = (_tensor(case, name) for name in ("pos", "neg_text", "no_ref"))
        weights = {"w_text": case.number("w_text"), "w_ref": case.number("w_ref")}
        return {"code_guidance": code_guidance(full, no_text, no_ref, **weights).numpy()}
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(case.inputs[name])


def _layout(case: Case) -> Layout:
    lengths = [int(length) for length in case.hp["ref_audio_lengths"]]
    return Layout(
        int(case.number("video_frames")),
        (int(case.hp["grid_hw"][0]), int(case.hp["grid_hw"][1])),
        int(case.number("audio_len")),
        tuple(range(1, int(case.number("ref_images")) + 1)),
        tuple(enumerate(lengths, start=1)),
    )


def _rotated(case: Case) -> Mapping[str, NDArray[Any]]:
    at, margin = _layout(case), case.number("margin", 150.0)
    rope = SynRoPE(margin=margin, placing="code")
    # What the shipped code gives a second sample: the margin, in steps by then, is divided once more.
    again = SynRoPE(margin=margin / at.gamma, placing="code")
    video, audio = _tensor(case, "video"), _tensor(case, "audio")
    head = video.shape[-1]
    of_video, of_audio = rope.tables(at, head, device=video.device, dtype=video.dtype)
    frames, steps = rope.times(at)
    return {
        "video_rope": rotate(video, of_video).numpy(),
        "audio_rope": rotate(audio, of_audio).numpy(),
        "audio_rope_shipped_batch2": rotate(
            audio, again.tables(at, head, device=audio.device, dtype=audio.dtype)[1]
        ).numpy(),
        "video_pos": frames.round().long().numpy(),
        "audio_pos": (steps / at.gamma).round().long().numpy(),
        "audio_pos_scaled": steps.numpy(),
    }


def _network(case: Case) -> Mapping[str, NDArray[Any]]:
    names = [str(name) for name in case.hp["param_names"]]
    shapes = {name: tuple(ast.literal_eval(str(s))) for name, s in zip(names, case.hp["param_shapes"], strict=True)}
    video, audio, text = (_tensor(case, name) for name in ("video", "audio", "text"))
    patch = shapes["video_model.patch_embedding.weight"][2:]
    config = JointAVConfig(
        dim=int(case.number("dim")),
        heads=int(case.number("heads")),
        layers=int(case.number("layers")),
        ffn=int(case.number("ffn_dim")),
        video_channels=video.shape[0],
        audio_channels=audio.shape[1],
        patch=patch,
        freq=int(case.number("freq_dim")),
        text=int(case.number("text_dim")),
        text_len=int(case.number("text_len")),
    )
    model = SymmetricConditionalDiT(
        config, syn_rope=SynRoPE(margin=case.number("margin", 150.0), placing="code")
    ).double()
    model.load_state_dict({name: _formula(j, name, shapes[name], case) for j, name in enumerate(sorted(names))})
    with torch.no_grad():
        texts = text.unsqueeze(0)
        out = model.joined(
            video.unsqueeze(0), audio.unsqueeze(0), _tensor(case, "t"), texts, texts, _layout_of_network(case, patch)
        )
    return {"video": out.video[0].numpy(), "audio": out.audio[0].numpy()}


def _formula(j: int, name: str, shape: tuple[int, ...], case: Case) -> Tensor:
    """Weights by a formula of their place in the alphabet."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    wave = np.sin(0.37 * i + 1.7 * j + case.number("weight_phase", 0.0)).reshape(shape)
    gain = len(shape) == 1 and name.endswith("weight")
    return torch.tensor(1.0 + 0.1 * wave if gain else 0.08 * wave)


def _layout_of_network(case: Case, patch: tuple[int, ...]) -> Layout:
    """The layout that the case or, as in the file of the authors' code, another of the same lengths tells."""
    frames, audio = case.inputs["video"].shape[1], len(case.inputs["audio"])
    for told in (case, *case.others.values()):
        if told.has("hp/video_frames", "hp/ref_audio_lengths", "hp/audio_len", "hp/ref_images", "hp/grid_hw"):
            at = _layout(told)
            if (at.frames + len(at.pictures), at.audio_tokens) == (frames, audio):
                grid = (case.inputs["video"].shape[2] // patch[1], case.inputs["video"].shape[3] // patch[2])
                return Layout(at.frames, grid, at.steps, at.pictures, at.voices)
    raise UnknownCase(case)
