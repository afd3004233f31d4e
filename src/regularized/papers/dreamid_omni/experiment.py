"""Whose voice is it? Slots on the axis of time that picture and voice share, against positions that follow one another.

*Probe* (``task = "probe"``): one attention from two pictures to the tokens of two voices, see
:mod:`~regularized.papers.dreamid_omni.probe`. ``binding_accuracy`` is the percent of the pictures that find their own
voice; 50 where they find one of the two. Lengths of voices are drawn, or fixed (``..._fixed``): then what follows one
another stands at fixed distances, too. ``separate_slots`` is a control: slots as far apart, but a voice does not share
that of its picture, it stands two further.

*World* (``task = "world"``): a transformer of two blocks learns the *Talking Glyphs* with one of two referenced persons
in a clip, from data to clips. Measured are clips of R2AV with references across clips, without guidance:
``identity_accuracy`` (percent of the cells with the asked face), ``speaker_confusion`` (share of the lines that the
other person says, by his face), ``binding_error`` (share of the lines in which face and voice are of different
persons), ``copy_rate`` (correlation of the brightness of a face with that of its picture). All arms take as many steps.

Claims: ``binding_probe``, ``sharing``, ``fixed_lengths``; ``binding_error``, ``speaker_confusion``,
``stages_against_all_at_once``, ``copying``. A claim is refuted by an interval below the smallest effect of the card.

The rates of the probe's arms are tuned with equal trials, by draws of their own. The world's arms are not tuned: they
share all settings but the one in question. *Paper* scale needs a million clips that are not public.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.experiment import About, Audible, Measurements, Tuning, Unavailable, data_fingerprint
from regularized.generation.dreamid_omni.config import JointAVConfig
from regularized.generation.dreamid_omni.decode import measure
from regularized.generation.dreamid_omni.files import picture_strip, tones
from regularized.generation.dreamid_omni.glyphs import TalkingGlyphs, palette
from regularized.generation.dreamid_omni.guidance import Guidance
from regularized.generation.dreamid_omni.model import SymmetricConditionalDiT
from regularized.generation.dreamid_omni.positions import SynRoPE
from regularized.generation.dreamid_omni.procedure import OmniTraining
from regularized.generation.dreamid_omni.sampling import Clip, sample
from regularized.generation.dreamid_omni.stages import ProgressivePlan, Stage
from regularized.papers.dreamid_omni.probe import BindingProbe, draw, probe
from regularized.training.progress import cosine, warmup

DEFAULTS: Mapping[str, Any] = {
    "task": "probe",
    "placing": "slots",
    "margin": 150.0,  # "M = 150"
    "lengths": (2, 8),
    # The probe, by our sheet's trial.
    "apart": False,
    "dim": 48,
    "heads": 3,
    "noise": 0.5,
    "probe_lr": 3e-3,
    "probe_batch": 96,
    "probe_steps": 200,
    "probe_layouts": 40,
    # The world. What the paper does not state is ours: rate, times, shares of dropped conditions, average.
    "structured": True,
    "plan": "three_stages",
    "layers": 2,
    "lr": 5e-3,
    "batch": 16,
    "steps": 200,
    "shift": 4.0,
    "dropout": 0.1,
    "ema": 0.97,
    "clips": 64,
    "sampling_steps": 8,
}

SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        **{"probe_steps": 20, "probe_batch": 16, "probe_layouts": 4},
        **{"layers": 1, "batch": 2, "steps": 5, "clips": 8, "sampling_steps": 2},
    },
    "laptop": {},
    # "10k, 20k, 20k steps", "lr 1e-5", "global batch 32", about a million clips.
    "paper": {"task": "paper", "layers": 30, "lr": 1e-5, "batch": 32, "steps": 50_000, "sampling_steps": 50},
}

_WORLD: Mapping[str, Any] = {"task": "world"}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "consecutive_positions": {"placing": "consecutive", "probe_lr": 1e-2},
    "separate_slots": {"apart": True},
    "shared_slots": {},
    "consecutive_positions_fixed": {"placing": "consecutive", "lengths": (8, 8), "probe_lr": 3e-2},
    "shared_slots_fixed": {"lengths": (8, 8)},
    "consecutive_positions_world": {**_WORLD, "placing": "consecutive"},
    "plain_caption": {**_WORLD, "structured": False},
    "all_tasks_at_once": {**_WORLD, "plan": "all_at_once"},
    "in_pair_only": {**_WORLD, "plan": "in_pair_only"},
    "three_stages": {**_WORLD},
}
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"paper": {arm: {"task": "paper"} for arm in ARMS}}

_PROBES = [arm for arm, settings in ARMS.items() if "task" not in settings]
TUNING = Tuning(
    metric="validation_accuracy",
    direction="higher",
    # One arm was best at the edge, 1e-2: one more for all.
    grids={arm: [{"probe_lr": rate} for rate in (1e-3, 3e-3, 1e-2, 3e-2)] for arm in _PROBES},
)

SIZE: Mapping[str, Any] = {"frames": 4, "audio_steps": 8, "size": (4, 8)}


def about(s: Mapping[str, Any]) -> About:
    """Everything is drawn anew."""
    if s["task"] == "paper":
        return About("about a million clips", 1_000_000, "two streams of 30 blocks, 11.7B weights", 11_660_000_000)
    if s["task"] == "probe":
        samples, model = s["probe_steps"] * s["probe_batch"], BindingProbe(s["dim"], s["heads"], SynRoPE())
        weights = sum(p.numel() for p in model.parameters())
        return About(f"{samples:,} drawn pairs", samples, f"one attention, {weights // 1000}k weights", weights)
    samples = s["batch"] * s["steps"]
    with torch.device("meta"):
        weights = sum(p.numel() for p in SymmetricConditionalDiT(_config(s)).parameters())
    return About(f"{samples:,} drawn clips", samples, f"{s['layers']} blocks, {weights // 1000}k weights", weights)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train one arm, and look at what it makes.

    Raises:
        Unavailable: paper scale; there are no public clips.
    """
    if s["task"] == "paper":
        raise Unavailable(
            "the paper's million clips are not public, nor is its training code; `load_released` reads its weights"
        )
    if s["task"] == "probe":
        found, curve = probe(s, seed)
        asked = draw(s, 8, torch.eye(6, s["dim"]), torch.Generator().manual_seed(seed))
        data = data_fingerprint(asked.voice.numpy(), asked.pictures.numpy())
        return Measurements(found, {"probe_loss": curve}, data=data, curve_unit="step")
    world = TalkingGlyphs(structured=s["structured"], lengths=s["lengths"], persons=1)
    training = trained(s, world, seed)
    losses = training.fit()
    clip, metrics = made(s, world, training.trained, seed)
    first = world.sample(8, "r2av", "cross_pair", torch.Generator().manual_seed(seed))
    return Audible(
        metrics=metrics,
        curves={name: _sampled(losses[:, column]) for column, name in ((1, "video_loss"), (2, "audio_loss"))},
        data=data_fingerprint(first.video.numpy(), first.audio.numpy()),
        curve_unit="step",
        images={"frames": picture_strip(clip.video[0]).numpy()},
        sounds={"sound": tones(clip.audio[0]).numpy()},
    )


def _config(s: Mapping[str, Any]) -> JointAVConfig:
    return replace(TalkingGlyphs.config(), layers=s["layers"])


def plan_of(s: Mapping[str, Any], seed: int) -> ProgressivePlan:
    """The stages: 1 : 2 : 2 as in the paper, or one of as many steps."""
    steps, every = s["steps"], {"r2av": 4, "rv2av": 3, "ra2v": 3}
    alone = {"r2av": 1}
    stages = {
        "three_stages": [
            Stage("in_pair", max(1, steps // 5), alone),
            Stage("cross_pair", 2 * steps // 5, alone),
            Stage("cross_pair", steps - max(1, steps // 5) - 2 * steps // 5, every),
        ],
        "all_at_once": [Stage("cross_pair", steps, every)],
        "in_pair_only": [Stage("in_pair", steps, alone)],
    }
    return ProgressivePlan(stages[s["plan"]], seed)


def trained(s: Mapping[str, Any], world: TalkingGlyphs, seed: int) -> OmniTraining:
    """The training of an arm, not yet begun."""
    torch.manual_seed(seed)
    model = SymmetricConditionalDiT(_config(s), syn_rope=SynRoPE(margin=s["margin"], placing=s["placing"]))
    return OmniTraining(
        model,
        world,
        plan_of(s, seed),
        optimizer=partial(torch.optim.AdamW, lr=s["lr"], betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        schedule=warmup(cosine(end=0.05), 0.1),
        batch_size=s["batch"],
        dropout=s["dropout"],
        shift=s["shift"],
        ema=s["ema"],
        seed=seed,
    )


def made(
    s: Mapping[str, Any], world: TalkingGlyphs, model: SymmetricConditionalDiT, seed: int
) -> tuple[Clip, dict[str, float]]:
    """Clips of R2AV with references across clips, without guidance, and how good they are."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    batch, scene = world.batch(s["clips"], "r2av", "cross_pair", generator)
    steps, off = s["sampling_steps"], Guidance.off()
    clip = sample(model, batch.given, **SIZE, steps=steps, shift=s["shift"], guidance=off, generator=generator)
    assert batch.given.pictures is not None
    return clip, measure(clip, scene, _gain_of(batch.given.pictures, scene.hue))


def _gain_of(pictures: Tensor, hue: Tensor) -> Tensor:
    """How bright the face of each picture is, (B, 2)."""
    colour = (pictures[:, :, :, 1] / 2 + 0.5).mean(dim=3).mT
    own = palette()[hue]
    return (colour * own).sum(dim=2) / own.square().sum(dim=2)


def _sampled(losses: Tensor) -> list[tuple[float, float]]:
    """The loss over steps, in means of 25."""
    return [(25.0 * k, float(part.mean())) for k, part in enumerate(losses.split(25))]
