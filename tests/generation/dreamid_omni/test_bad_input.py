"""Bad inputs of `dreamid_omni`: each is answered by what was given, what is allowed, and how to mend it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused

from regularized.generation.dreamid_omni import (
    Conditions,
    Guidance,
    JointAVConfig,
    Layout,
    OmniBatch,
    OmniTraining,
    ProgressivePlan,
    Stage,
    StructuredCaption,
    SymmetricConditionalDiT,
    SynRoPE,
    TalkingGlyphs,
    fit_picture,
    head_split,
    load_released,
    reference_voice,
    sample,
    write_gif,
    write_wav,
)

WORLD = TalkingGlyphs()
MODEL = SymmetricConditionalDiT(WORLD.config())
VIDEO, AUDIO, T = torch.zeros(1, 3, 4, 4, 8), torch.zeros(1, 8, 6), torch.zeros(1)
TEXT, PICTURES, VOICE = torch.zeros(1, 2, 10), torch.zeros(1, 3, 2, 4, 8), torch.zeros(1, 2, 6)
R2AV = {"r2av": 1}


def _caption(
    joint="", images=("A man, identified as <sub1>.", "A woman, identified as <sub2>."), video="<sub1>, <sub2>."
):
    return StructuredCaption(images, video, "", joint)


def _call(**given):
    MODEL(VIDEO, AUDIO, T, Conditions(**{"text": TEXT, **given}))


def _sample(**given):
    conditions = Conditions(**{"text": TEXT, **given})
    sample(MODEL, conditions, frames=4, audio_steps=8, size=(4, 8), steps=1, guidance=Guidance.off())


def _training(tasks=R2AV, data=WORLD):
    plan = ProgressivePlan([Stage("cross_pair", 1, tasks)])
    return OmniTraining(MODEL, data, plan, optimizer=partial(torch.optim.SGD, lr=0.1))


def _covered(**masks):
    OmniBatch(VIDEO, AUDIO, Conditions(TEXT), **masks).check()


def _overlap(margin, voices=((1, 2),), pictures=(1,)):
    SynRoPE(margin=margin).times(Layout(4, (1, 2), 8, pictures, voices))


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    return [
        refused("pictures", lambda: _caption().check(pictures=1, voices=2), ValueError, ("2 pictures", "1 are given")),
        refused("voices", lambda: _caption().check(pictures=2, voices=1), ValueError, ("<sub1>, <sub2>", "1 voices")),
        refused(
            "an anchor without a picture",
            lambda: _caption("<sub3> laughs.").check(pictures=2),
            ValueError,
            ("<sub3>", "no picture", "add it"),
        ),
        refused(
            "a picture without an anchor",
            lambda: _caption(images=("A man.", "A woman, <sub2>.")),
            ValueError,
            ("picture 1", "nobody", "identified as <sub1>"),
        ),
        refused("idle", lambda: _caption(video="<sub1>").check(pictures=2), ValueError, ("<sub2>", "does not tell")),
        refused(
            "voices where the sound is given",
            lambda: _sample(driving_audio=AUDIO, voices=(VOICE,)),
            UserWarning,
            ("1 reference voices", "RA2V", "voices=()"),
        ),
        refused(
            "frames of the source",
            lambda: _call(source_video=VIDEO[:, :, :3]),
            ValueError,
            ("source_video", "(1, 3, 4, 4, 8)", "(1, 3, 3, 4, 8)", "cut"),
        ),
        refused(
            "size of the source", lambda: _call(source_video=VIDEO[..., :4]), ValueError, ("source_video", "scale it")
        ),
        refused(
            "length of the sound",
            lambda: _call(driving_audio=AUDIO[:, :7]),
            ValueError,
            ("driving_audio", "(1, 8, 6)", "(1, 7, 6)"),
        ),
        refused(
            "margin below the target", lambda: _overlap(4), ValueError, ("segments overlap", "the target", "4", "150")
        ),
        refused(
            "margin below a voice",
            lambda: _overlap(6, voices=((1, 2), (2, 14))),
            ValueError,
            ("segments overlap", "the voice of person 2", "7 frames", "margin is 6"),
        ),
        refused("margin below pictures", lambda: _overlap(5, pictures=(1,) * 6), ValueError, ("pictures of person 1",)),
        refused("speech without an end", lambda: _caption("<sub1> says, <S>Yes."), ValueError, ("<S>", "no <E>")),
        refused("an end without speech", lambda: _caption("<sub1> says, Yes.<E>"), ValueError, ("<E>", "no partner")),
        refused("speech in speech", lambda: _caption("<sub1>: <S>a<S>b<E>"), ValueError, ("take turns", "<S>")),
        refused(
            "speech without owner",
            lambda: _caption("<sub1> says, <S>Yes.<E> Then <S>No.<E>"),
            ValueError,
            ("speech without owner", "nobody is named", "<sub1> says"),
        ),
        refused(
            "a short voice", lambda: reference_voice(torch.zeros(800), 1600), ValueError, ("at least 1 s", "0.50 s")
        ),
        refused(
            "a mask over everything",
            lambda: _covered(mask_audio=torch.ones(1, 8, 1)),
            ValueError,
            ("mask_audio", "everything", "weight to 0"),
        ),
        refused(
            "a mask over all frames",
            lambda: _covered(mask_video=torch.ones(1, 1, 4, 1, 8)),
            ValueError,
            ("mask_video",),
        ),
        refused(
            "a task that is not supplied",
            lambda: _training({"r2av": 1, "v2a": 2}),
            ValueError,
            ("stage 1", "['v2a']", "ra2v"),
        ),
        refused("pairing", lambda: Stage("pairs", 1, R2AV), ValueError, ("'in_pair' or 'cross_pair'", "'pairs'")),
        refused("no steps", lambda: Stage("in_pair", 0, R2AV), ValueError, ("Stage.steps", "at least 1", "0")),
        refused("no tasks", lambda: Stage("in_pair", 1, {}), ValueError, ("needs a task",)),
        refused("half a task", lambda: Stage("in_pair", 1, {"r2av": 0.4}), ValueError, ("task r2av", "whole", "0.4")),
        refused("no stages", lambda: ProgressivePlan([]), ValueError, ("needs a stage",)),
        refused("world", lambda: WORLD.batch(1, "v2a", "in_pair", torch.Generator()), ValueError, ("ra2v", "'v2a'")),
        refused("persons of a clip", lambda: TalkingGlyphs(persons=3), ValueError, ("persons", "[1, 2]", "3")),
        refused("lengths", lambda: TalkingGlyphs(lengths=(3, 2)), ValueError, ("lengths", "(3, 2)")),
        refused("persons", lambda: _call(pictures=PICTURES, persons=(1,)), ValueError, ("persons", "(1,) for 2")),
        refused("size of pictures", lambda: _call(pictures=PICTURES[..., :4]), ValueError, ("pictures", "fit them")),
        refused("a long text", lambda: _call(text=torch.zeros(1, 5, 10)), ValueError, ("at most 4", "(1, 5, 10)")),
        refused("another text", lambda: _call(text=torch.zeros(1, 2, 9)), ValueError, ("(B, states, 10)", "(1, 2, 9)")),
        refused(
            "a layout of other lengths",
            lambda: MODEL.joined(VIDEO, AUDIO, T, TEXT, TEXT, Layout(4, (1, 2), 9)),
            ValueError,
            ("8 video and 9 audio tokens", "8 and 8"),
        ),
        refused("person 0", lambda: Layout(4, (1, 1), 8, (0,)), ValueError, ("person", "at least 1", "counted from 1")),
        refused("empty voice", lambda: Layout(4, (1, 1), 8, (), ((1, 0),)), ValueError, ("length", "at least 1")),
        refused("odd heads", lambda: head_split(7), ValueError, ("even", "7")),
        refused("heads", lambda: replace(JointAVConfig.tiny(), heads=5), ValueError, ("heads", "5 and 48")),
        refused("patch", lambda: replace(JointAVConfig.tiny(), patch=(2, 2, 2)), ValueError, ("(2, 2, 2)", "frames")),
        refused("placing", lambda: SynRoPE(placing="far"), ValueError, ("'slots'", "'far'")),
        refused("margin", lambda: SynRoPE(margin=0.0), ValueError, ("margin", "positive", "frames")),
        refused("formula", lambda: Guidance(formula="both"), ValueError, ("'code' or 'paper'", "'both'")),
        refused("weight", lambda: Guidance(text=(1.0, float("nan"))), ValueError, ("text", "finite", "audio")),
        refused("picture", lambda: fit_picture(torch.zeros(2, 2), (4, 4)), ValueError, ("(C, H, W)", "(2, 2)")),
        refused("sound", lambda: write_wav("x.wav", torch.full((3,), torch.nan)), ValueError, ("finite", "(3,)")),
        refused("frames", lambda: write_gif("x.gif", torch.zeros(3, 4, 4)), ValueError, ("(T, 3, H, W)", "(3, 4, 4)")),
        refused("no weights", lambda: load_released("nowhere.safetensors"), FileNotFoundError, ("XuGuo699",)),
        refused(
            "weights of another size",
            lambda: load_released(MODEL.state_dict(), config=replace(WORLD.config(), text=11)),
            ValueError,
            ("missing []", "text_embedding.0.weight (48, 10) for (48, 11)", "config"),
        ),
        refused(
            "weights of another depth",
            lambda: load_released(MODEL.state_dict(), config=replace(WORLD.config(), layers=4)),
            ValueError,
            ("missing ['audio_model.blocks.3.",),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
