"""The network: what its conditions do, and what they must not."""

from dataclasses import replace

import pytest
import torch

from regularized.generation.dreamid_omni import (
    Conditions,
    JointAVConfig,
    SymmetricConditionalDiT,
    SynRoPE,
    load_released,
)

TINY = replace(JointAVConfig.tiny(), dim=24, heads=2, layers=2, ffn=32, text=6, text_len=4)


def model(config=TINY, **settings):
    torch.manual_seed(0)
    made = SymmetricConditionalDiT(config, **settings).double()
    with torch.no_grad():
        for stream in (made.video_model, made.audio_model):  # a head of zeros answers nothing
            stream.head.head.weight.normal_()
    return made


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(batch=2):
    given = Conditions(draw(batch, 3, 6), draw(batch, 3, 2, 4, 8), (draw(batch, 3, 6), draw(batch, 5, 6, seed=1)))
    return draw(batch, 3, 4, 4, 8, seed=2), draw(batch, 8, 6, seed=3), torch.full((batch,), 300.0).double(), given


def target(out):
    return out.video[:, :, :4], out.audio[:, :8]


@torch.no_grad()
def test_no_structure_is_a_structure_of_zeros():
    """Bit for bit. Fails when a missing structure takes another path, or references get one, too."""
    video, audio, t, given = inputs()
    net = model()
    plain = net(video, audio, t, given)
    zeros = given._replace(source_video=torch.zeros_like(video), driving_audio=torch.zeros_like(audio))
    for a, b in zip(plain, net(video, audio, t, zeros)):
        assert torch.equal(a, b)
    for other in (given._replace(source_video=video), given._replace(driving_audio=audio)):
        assert not torch.equal(plain.video, net(video, audio, t, other).video)
    x_v, x_a = given._replace(source_video=video, driving_audio=audio).join(video, audio)
    assert torch.equal(x_v[:, :, :4], 2 * video)
    assert torch.equal(x_v[:, :, 4:], given.pictures)
    assert torch.equal(x_a, torch.cat([2 * audio, *given.voices], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("placing", ["slots", "consecutive"])
def test_order_of_references(placing):
    """Fails when a reference is known by its place in the list and not by its person, or persons are not told apart."""
    video, audio, t, given = inputs()
    net = model(syn_rope=SynRoPE(placing=placing))
    before = target(net(video, audio, t, given))
    swapped = given._replace(pictures=given.pictures.flip(2), voices=given.voices[::-1])
    relabelled = swapped._replace(persons=(2, 1), speakers=(2, 1))
    same = all(torch.allclose(a, b, atol=1e-10) for a, b in zip(before, target(net(video, audio, t, relabelled))))
    assert same == (placing == "slots"), "consecutive positions know nothing of persons"
    assert not torch.allclose(before[0], target(net(video, audio, t, swapped))[0], atol=1e-6)
    voices_alone = given._replace(voices=given.voices[::-1])
    assert not torch.allclose(before[1], target(net(video, audio, t, voices_alone))[1], atol=1e-6)


@torch.no_grad()
def test_without_references_there_is_nothing_to_place():
    """A plain joint model. Fails when the positions of the target depend on the scheme."""
    video, audio, t, given = inputs()
    outs = [
        model(syn_rope=SynRoPE(placing=p))(video, audio, t, Conditions(given.text)) for p in ("slots", "consecutive")
    ]
    assert torch.equal(outs[0].video, outs[1].video)
    assert outs[0].video.shape == video.shape
    assert outs[0].audio.shape == audio.shape


@torch.no_grad()
def test_clips_of_a_batch_do_not_meet():
    """Fails when anything depends on the place in the batch, as the margin does in the released code."""
    video, audio, t, given = inputs(3)
    whole = model()(video, audio, t, given)
    alone = Conditions(given.text[2:], given.pictures[2:], tuple(voice[2:] for voice in given.voices))
    last = model()(video[2:], audio[2:], t[2:], alone)
    assert torch.allclose(whole.video[2:], last.video, atol=1e-12)
    assert torch.allclose(whole.audio[2:], last.audio, atol=1e-12)


@torch.no_grad()
def test_the_streams_meet_as_they_were():
    """Fails when one stream sees what the other has become in the same block: then swapping them would matter.

    With two streams of the same sizes and weights, the audio as the video's twin, both answer alike.
    """
    config = replace(TINY, video_channels=6, audio_channels=6, patch=(1, 1, 1))
    net = model(config)
    twin = {
        name.replace("audio_model", "video_model"): value.view_as(net.state_dict()[name.replace("audio", "video")])
        for name, value in net.state_dict().items()
        if name.startswith("audio_model") and value.numel() == net.state_dict()[name.replace("audio", "video")].numel()
    }
    net.load_state_dict(twin, strict=False)
    audio = draw(1, 5, 6)
    video = audio.mT.reshape(1, 6, 5, 1, 1)
    out = net(video, audio, torch.full((1,), 100.0).double(), Conditions(draw(1, 4, 6)))
    assert torch.allclose(out.video.flatten(2).mT, out.audio, atol=1e-12)


def test_begins_at_zero():
    """Fails when the heads are not zero at the start."""
    made = SymmetricConditionalDiT(TINY).double()
    assert not any(out.any() for out in made(*inputs()))


def test_the_video_streams_fusion_begins_small():
    """Ovi divides it by ten, in the video's stream alone. Fails when it is forgotten, or done to both."""
    torch.manual_seed(0)
    made = SymmetricConditionalDiT(replace(TINY, fusion_init=0.1))
    for name in ("k_fusion", "v_fusion"):
        sizes = [
            float(getattr(stream.blocks[0].cross_attn, name).weight.std())
            for stream in (made.video_model, made.audio_model)
        ]
        assert 0.05 < sizes[0] / sizes[1] < 0.2


def test_text_is_padded_by_zeros():
    """Fails when padding is masked, or another length of it is used."""
    net = model()
    video, audio, t, given = inputs()
    padded = given._replace(text=torch.nn.functional.pad(given.text, (0, 0, 0, 1)))
    assert torch.equal(net(video, audio, t, given).video, net(video, audio, t, padded).video)


def test_every_weight_is_trained():
    """Fails when a module is built and not used: released weights would go nowhere."""
    net = model(replace(TINY, audio_embedding="conv"))
    video, audio, t, given = inputs()
    sum(out.square().sum() for out in net(video, audio, t, given)).backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # What the other stream is after the last step is seen by no one; its keys have no bias that matters to a softmax.
    assert not [name for name in idle if not name.endswith(".k.bias")]


def test_released_names(tmp_path):
    """Random weights under the released names load strictly, from the meta device, one by one, in another type.

    Fails when a module has another name, weights are copied over values that were drawn, or some are left on meta.
    """
    from safetensors.torch import save_file

    source = model(replace(TINY, audio_embedding="conv")).float()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = load_released(tmp_path / "w.safetensors", config=source.config)
    assert not any(p.is_meta for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    exact = load_released(source.state_dict(), config=source.config, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), exact.parameters()))
    assert loaded.syn_rope.placing == "code"
    video, audio, t, given = inputs()
    to = [x.bfloat16() for x in (video, audio, t)]
    given = Conditions(given.text.bfloat16(), given.pictures.bfloat16(), tuple(v.bfloat16() for v in given.voices))
    assert loaded(*to, given).video.dtype == torch.bfloat16


def test_the_real_size():
    """Without memory: 11.7 billion weights under the names of the released file. Fails when a size is another one."""
    with torch.device("meta"):
        real = SymmetricConditionalDiT(JointAVConfig.dreamid_omni())
    assert round(sum(p.numel() for p in real.parameters()) / 1e9, 2) == 11.66
    shapes = {name: tuple(p.shape) for name, p in real.named_parameters()}
    assert shapes["video_model.patch_embedding.weight"] == (3072, 48, 1, 2, 2)
    assert shapes["audio_model.patch_embedding.2.w1.weight"] == (8192, 3072, 7)
    assert shapes["audio_model.blocks.29.cross_attn.norm_k_fusion.weight"] == (3072,)
    assert shapes["video_model.head.head.weight"] == (192, 3072)
