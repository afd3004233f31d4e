"""The world and how it is read."""

import torch

from regularized.generation.dreamid_omni import Clip, TalkingGlyphs, decode, measure, palette


def drawn(count=300, task="r2av", pairing="cross_pair", seed=0, **settings):
    world = TalkingGlyphs(**settings)
    batch, scene = world.batch(count, task, pairing, torch.Generator().manual_seed(seed))
    return world, batch, scene


def test_what_should_be_is_read_without_a_mistake():
    """Fails when drawing and reading disagree about anything: then no measure of a model means anything."""
    world, batch, scene = drawn()
    found = measure(Clip(batch.video, batch.audio), scene)
    for name in ("identity_accuracy", "identity_set", "voice_known"):
        assert found[name] == 100, name
    for name in ("binding_error", "speaker_confusion", "word_error"):
        assert found[name] == 0, name
    assert found["synchrony"] > 0.9
    assert found["copy_rate"] > 0.999
    seen = decode(world.render(scene))
    assert torch.equal(seen.word, scene.said)
    world, batch, scene = drawn(persons=1)
    assert scene.alone.all()
    found = measure(world.render(scene), scene)
    assert (found["identity_accuracy"], found["binding_error"], found["speaker_confusion"]) == (100, 0, 0)


def test_each_mistake_is_its_own_number():
    """Fails when a measure counts something else: a swap of faces, voices, or sides must be seen by its own number."""
    world, _, scene = drawn()
    wrong_faces = measure(world.render(scene._replace(hue=scene.hue.flip(1))), scene)
    assert (wrong_faces["identity_accuracy"], wrong_faces["identity_set"]) == (0, 100)
    assert (wrong_faces["binding_error"], wrong_faces["speaker_confusion"]) == (1, 0)
    wrong_voices = measure(world.render(scene._replace(voice=scene.voice.flip(1))), scene)
    assert (wrong_voices["binding_error"], wrong_voices["identity_accuracy"]) == (1, 100)
    wrong_sides = measure(world.render(scene._replace(there=1 - scene.there)), scene)
    assert (wrong_sides["speaker_confusion"], wrong_sides["binding_error"]) == (1, 0)
    strangers = measure(world.render(scene._replace(hue=(scene.hue + 3) % 6, voice=(scene.voice + 3) % 6)), scene)
    assert strangers["voice_known"] < 50
    world, _, single = drawn(persons=1)
    other = measure(world.render(single._replace(there=1 - single.there)), single)
    assert (other["speaker_confusion"], other["binding_error"], other["identity_accuracy"]) == (1, 1, 0)
    noise = measure(Clip(torch.randn(300, 3, 4, 4, 8), torch.randn(300, 8, 6)), scene)
    assert 0.35 < noise["binding_error"] < 0.65
    assert 0.4 < noise["speaker_confusion"] < 0.6


def test_nothing_but_references_tells_whose_voice_it_is():
    """Fails when hue and voice of a person depend on each other, or a picture tells the side."""
    _, batch, scene = drawn(4000)
    table = torch.zeros(6, 6)
    table.index_put_((scene.hue.flatten(), scene.voice.flatten()), torch.ones(8000), accumulate=True)
    assert float((table / 8000 - 1 / 36).abs().max()) < 0.01
    clean = batch.given.pictures[:, :, :, :, :4] - batch.given.pictures[:, :, :, :, 4:]
    assert float(clean.abs().mean()) < 0.15, "both halves show the same, but for noise"


def test_pairs_of_a_clip_and_across():
    """Fails when references across clips keep the gain, those of a clip do not, or masks cover what was not cut."""
    world, batch, scene = drawn(pairing="in_pair")
    assert torch.allclose(batch.given.voices[0].amax(dim=(1, 2)), 2 * scene.gain[:, 0] - 0.5)
    assert batch.mask_video.shape == (300, 1, 4, 1, 8)
    assert batch.mask_video.mean() == 1 / 4
    assert batch.mask_audio.mean() == 1 / 2
    silent = world.render(scene).video[:, :, :, 2, 1] < 0
    cut = batch.mask_video[:, 0, :, 0, 0].bool()
    assert (silent.all(dim=1) | ~cut).all(), "the mouth is closed where a face is cut"
    _, across, scene = drawn(noise=0.0)
    assert across.mask_video is None
    gains = (across.given.voices[0].amax(dim=(1, 2)) + 0.5) / 2
    assert abs(float(torch.corrcoef(torch.stack([gains, scene.gain[:, 0]]))[0, 1])) < 0.2


def test_tasks():
    """Fails when structure is missing, tells the colour, or a driven clip has voices besides."""
    _, grey, scene = drawn(task="rv2av")
    source = grey.given.source_video
    assert (source == source[:, :1]).all()
    assert torch.equal(decode(Clip(source.mul(2), grey.audio)).side, scene.side)
    _, driven, _ = drawn(task="ra2v")
    assert torch.equal(driven.given.driving_audio, driven.audio)
    assert driven.given.voices == ()
    _, free, _ = drawn()
    assert free.given.source_video is None
    assert len(free.given.voices) == 2


def test_captions():
    """Fails when a structured caption leaves anything open, or a plain one tells who."""
    world, batch, scene = drawn()
    text = batch.given.text / 10**0.5
    assert text.shape == (300, 2, 10)
    for half in range(2):
        assert torch.equal(text[:, half, :3].argmax(dim=1), 1 + scene.speaker[:, half])
        assert torch.equal(text[:, half, 3:5].argmax(dim=1), scene.side[:, half])
        assert (text[:, half, 5:7].argmax(dim=1) == half).all()
        assert torch.equal(text[:, half, 7:].argmax(dim=1), scene.said[:, half])
    assert not TalkingGlyphs(persons=1).caption(scene)[:, :, 3:5].any()
    plain = TalkingGlyphs(structured=False)
    for field in ("there", "speaker"):
        swapped = scene._replace(**{field: 1 - getattr(scene, field)})
        assert torch.equal(plain.caption(scene), plain.caption(swapped)), "who is not told"
        assert not torch.equal(world.caption(scene), world.caption(swapped))


def test_hues_are_far_apart():
    """Fails when two hues are read for each other, or one is brighter than another."""
    colours = palette()
    assert torch.allclose(colours.norm(dim=1), colours.norm(dim=1)[:1].expand(6), atol=1e-5)
    likeness = colours @ colours.mT - 2 * torch.eye(6)
    assert float(likeness.max()) < 1.0
