"""From noise to a clip, and to files."""

import wave

import torch

from regularized.generation.dreamid_omni import (
    Clip,
    Conditions,
    Guidance,
    SymmetricConditionalDiT,
    TalkingGlyphs,
    Velocity,
    code_guidance,
    paper_guidance,
    picture_strip,
    sample,
    save_clip,
    tones,
    write_wav,
)

WORLD = TalkingGlyphs()
SIZE = {"frames": 4, "audio_steps": 8, "size": (4, 8)}


class Exact(SymmetricConditionalDiT):
    """Knows the clip, and so the velocity at each point: (z_s - z) / s."""

    def __init__(self, clip):
        super().__init__(WORLD.config())
        self.clip = clip
        self.passes = 0

    def joined(self, video, audio, t, text_v, text_a, at):
        self.passes += 1
        s = t / 1000
        frames, steps = self.clip.video.shape[2], self.clip.audio.shape[1]
        v = (video[:, :, :frames] - self.clip.video) / s.view(-1, 1, 1, 1, 1)
        a = (audio[:, :steps] - self.clip.audio) / s.view(-1, 1, 1)
        return Velocity(torch.cat([v, video[:, :, frames:]], dim=2), torch.cat([a, audio[:, steps:]], dim=1))


def test_the_exact_velocity_leads_to_the_clip():
    """Fails when a step has another sign or length, the end is not reached, or references are integrated, too."""
    batch, scene = WORLD.batch(3, "r2av", "cross_pair", torch.Generator().manual_seed(0))
    clip = WORLD.render(scene)
    model = Exact(clip)
    for steps, shift in ((1, 5.0), (7, 5.0), (4, 1.0)):
        made = sample(model, batch.given, **SIZE, steps=steps, shift=shift, guidance=Guidance.off())
        assert torch.allclose(made.video, clip.video, atol=1e-5)
        assert torch.allclose(made.audio, clip.audio, atol=1e-5)
    assert model.passes == 12, "all passes of a step are one"


class Reader(SymmetricConditionalDiT):
    """Answers by what it was given: 100 for text, 10 for pictures, 1 for voices, times the time."""

    def joined(self, video, audio, t, text_v, text_a, at):
        there = 100 * text_v.flatten(1).any(1) + 10 * video[:, :, 4:].flatten(1).any(1) + audio[:, 8:].flatten(1).any(1)
        there = there.to(video)
        return Velocity(there.view(-1, 1, 1, 1, 1).expand_as(video), there.view(-1, 1, 1).expand_as(audio))


def guided(guidance):
    """The velocity of one Euler step from noise to 0."""
    given = Conditions(torch.ones(1, 2, 10), torch.ones(1, 3, 2, 4, 8), (torch.ones(1, 2, 6),))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    made = sample(Reader(WORLD.config()), given, **SIZE, steps=1, guidance=guidance, generator=generators[0])
    noise = torch.randn(1, 3, 4, 4, 8, generator=generators[1]), torch.randn(1, 8, 6, generator=generators[1])
    found = [(start - end).mean() for start, end in zip(noise, made)]
    return [round(float(value), 3) for value in found]


def test_guidance_of_code_and_paper():
    """Fails when what is dropped is another condition, streams have each other's weights, or formulas are mixed up."""
    assert guided(Guidance.off()) == [111, 111]
    assert guided(Guidance(formula="paper", text=(1.0, 1.0), ref=(1.0, 1.0))) == [111, 111]
    # code: 11 + w_T (111 - 11) + w_S (111 - without the stream's own references)
    assert guided(Guidance()) == [11 + 300 + 1.5 * 10, 11 + 400 + 2 * 1]
    assert guided(Guidance(text=(1.0, 1.0), ref=(2.0, 3.0))) == [111 + 2 * 10, 111 + 3 * 1]
    # paper: 0 + w_T 100 + w_S 11
    assert guided(Guidance(formula="paper")) == [300 + 1.5 * 11, 400 + 2 * 11]


def test_formulas():
    """Fails for a wrong sign: both against the sheet, written out; and weights of the conditional prediction."""
    nothing, text, no_text, full = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(
        paper_guidance(nothing, text, full, w_text=3.0, w_ref=1.5), -2 * nothing + 1.5 * text + 1.5 * full
    )
    assert torch.allclose(
        code_guidance(full, no_text, text, w_text=3.0, w_ref=1.5), -2 * no_text + 4.5 * full - 1.5 * text
    )
    assert torch.allclose(code_guidance(full, no_text, text, w_text=1.0, w_ref=0.0), full)
    assert torch.allclose(paper_guidance(nothing, text, full, w_text=1.0, w_ref=1.0), full)


def test_a_negative_text_takes_the_place_of_none():
    """Fails when it is ignored."""
    given = Conditions(torch.ones(1, 2, 10))
    negative = 5 * torch.ones(1, 2, 10)
    torch.manual_seed(0)
    model = SymmetricConditionalDiT(WORLD.config())
    for stream in (model.video_model, model.audio_model):
        torch.nn.init.normal_(stream.head.head.weight)
    made = [
        sample(model, given, **SIZE, steps=2, negative=words, generator=torch.Generator().manual_seed(0)).video
        for words in (None, negative)
    ]
    assert not torch.allclose(*made)


def test_playable_files(tmp_path):
    """A clip as GIF and WAV of equal length, in which bins are pitches. Fails when frames, rate or pitches are off."""
    from PIL import Image

    _, scene = WORLD.batch(2, "r2av", "cross_pair", torch.Generator().manual_seed(0))
    clip = WORLD.render(scene)
    gif, wav = save_clip(tmp_path / "made", clip, number=1, zoom=10)
    with Image.open(gif) as image:
        assert image.size == (80, 40)
        frames = range(image.n_frames)  # equal ones are one that lasts longer
        seconds = sum(image.seek(frame) or image.info["duration"] for frame in frames) / 1000
    assert seconds == 2
    with wave.open(str(wav)) as sound:
        assert sound.getnframes() / sound.getframerate() == seconds
        values = torch.frombuffer(bytearray(sound.readframes(sound.getnframes())), dtype=torch.int16).double()
    halves = values.chunk(2)
    for half, person in zip(halves, scene.speaker[1]):
        frequency = float(torch.fft.rfft(half).abs().argmax()) * 16_000 / len(half)
        assert abs(frequency - 196 * (4 / 3) ** int(scene.voice[1, person])) < 3


def test_silence_and_stereo(tmp_path):
    """Fails when a silent bin sounds, or channels are written one after the other."""
    assert tones(torch.full((3, 6), -0.5)).abs().max() == 0
    path = write_wav(tmp_path / "s.wav", torch.stack([torch.zeros(4), torch.ones(4)]), rate=8000)
    with wave.open(str(path)) as sound:
        assert (sound.getnchannels(), sound.getframerate()) == (2, 8000)
        pairs = torch.frombuffer(bytearray(sound.readframes(4)), dtype=torch.int16).view(4, 2)
    assert pairs.tolist() == [[0, 32767]] * 4


def test_strip():
    """Fails when frames stand in another order, or rows and columns are mixed up."""
    video = torch.arange(4.0).view(1, 4, 1, 1).expand(3, 4, 4, 8) / 2 - 1
    strip = picture_strip(video, zoom=1)
    assert strip.shape == (4, 4 * 8 + 3 * 2, 3)
    assert strip[0, [0, 10, 20, 30], 0].tolist() == [0.0, 0.25, 0.5, 0.75]


def test_sampling_is_repeatable():
    """Fails when noise comes from elsewhere than the generator."""
    model = SymmetricConditionalDiT(WORLD.config())
    given = Conditions(torch.ones(2, 2, 10))
    first, second = (
        sample(model, given, **SIZE, steps=2, guidance=Guidance.off(), generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert isinstance(first, Clip)
    assert torch.equal(first.audio, second.audio)
    assert abs(float(first.video.std()) - 1) < 0.1, "a model that says nothing leaves the noise"
