"""Synchronised rotary positions."""

import pytest
import torch

from regularized.generation.dreamid_omni import Layout, SynRoPE, affinity, head_split, rotate

F64 = {"device": torch.device("cpu"), "dtype": torch.float64}
REAL = Layout(31, (1, 1), 157, pictures=(1, 2), voices=((1, 31), (2, 31)))


def segments(rope: SynRoPE):
    frames, steps = rope.times(REAL)
    return frames[31], frames[32], steps[157:188], steps[188:]


@pytest.mark.parametrize(
    ("placing", "expected"),
    [("consecutive", (0.829, 0.680, 0.870, 0.690)), ("code", (0.835, 0.430, 0.393, 0.841))],
)
def test_affinities_of_the_real_sizes(placing, expected):
    """By the closed form. Fails when a slot is misplaced, gamma is forgotten, or base or split are others."""
    numbers = head_split(128)[0]
    picture_1, picture_2, voice_1, voice_2 = segments(SynRoPE(placing=placing))
    pairs = [(picture_1, voice_1), (picture_1, voice_2), (picture_2, voice_1), (picture_2, voice_2)]
    found = [round(float(affinity(p, q, numbers=numbers)), 3) for p, q in pairs]
    assert found == list(expected)
    bound_right = found[0] > found[1] and found[3] > found[2]
    assert bound_right == (placing == "code")


def test_target_frames_see_the_nearer_slot_better():
    """Of the pictures, by the closed form. Fails when slots are counted from the end of the target."""
    frames = SynRoPE().times(REAL)[0]
    found = [float(affinity(picture, frames[:31], numbers=44)) for picture in frames[31:]]
    assert found == pytest.approx([0.372, 0.201], abs=6e-4)


def test_one_clock():
    """Fails when frame f and audio step f / gamma turn by different angles in the numbers that are time."""
    layout = Layout(4, (2, 3), 8)
    video, audio = SynRoPE().tables(layout, 16, **F64)
    numbers = head_split(16)[0] // 2
    assert torch.equal(video.view(4, 6, 8)[:, 0, :numbers], audio[::2, 0, :numbers])
    assert (audio[:, :, numbers:] == 1).all(), "height and width pass through the audio"


@pytest.mark.parametrize("placing", ["slots", "code"])
def test_a_slot_holds_picture_and_voice_of_a_person(placing):
    """Fails when persons are numbered by place instead of identity, or segments meet."""
    layout = Layout(5, (1, 1), 16, pictures=(2, 1, 2), voices=((2, 3), (1, 4), (2, 2)))
    rope = SynRoPE(margin=150, placing=placing)
    frames, steps = rope.times(layout)
    assert frames[5:].tolist() == [300, 150, 301], "a second picture of a person stands behind the first"
    gamma = 5 / 16
    starts = steps[16:].split([3, 4, 2])
    for start, at in zip(starts, (300, 150, 300 + 3 * gamma)):
        assert abs(float(start[0]) - at) < gamma
        assert torch.allclose(start.diff(), torch.tensor(gamma, dtype=torch.float64))
    every = torch.cat([steps, frames[5:]])
    assert len(steps.unique()) == len(steps)
    assert (every[16:] >= 150).all()


def test_the_codes_rounding():
    """With the released engine's gamma a slot begins a little before M. Fails when M / gamma is not rounded down."""
    rope = SynRoPE(placing="code", gamma=float(torch.tensor(31 / 157, dtype=torch.bfloat16)))
    assert round(float(rope.times(REAL)[1][157]), 3) == round(760 * float(torch.tensor(31 / 157).bfloat16()), 3)
    assert round(float(SynRoPE(placing="code").times(REAL)[1][157]), 3) == 149.866


def test_one_person_at_the_edge_is_consecutive():
    """N = 1 and M -> L_v. Fails when slots are counted from 0, or consecutive positions do not follow the target."""
    layout = Layout(4, (1, 1), 8, pictures=(1,), voices=((1, 5),))
    near = SynRoPE(margin=4 + 1e-9).times(layout)
    for slots, consecutive in zip(near, SynRoPE(placing="consecutive").times(layout)):
        assert torch.allclose(slots, consecutive, atol=1e-8)


def test_rotation():
    """Fails when a rotation changes norms, or scores depend on more than the difference of two positions."""
    layout = Layout(6, (2, 2), 12)
    table = SynRoPE().tables(layout, 12, **F64)[0]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 12, generator=generator, dtype=torch.float64)
    turned_q, turned_k = (rotate(x.expand(1, 24, 1, 12), table) for x in (q, k))
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1).expand(1, 24, 1))
    scores = torch.einsum("bqhd,bkhd->qk", turned_q, turned_k).view(6, 4, 6, 4)
    assert torch.allclose(scores[1:, :, 1:], scores[:-1, :, :-1])
    assert not torch.allclose(scores[0, 0, 1], scores[1, 0, 0])


def test_tables_are_made_once_a_layout():
    """Fails when every call builds them anew, as the released code does, or layouts are mixed up."""
    rope = SynRoPE(margin=1000.0)
    short, long = (Layout(4, (1, 2), 8, (1,), ((1, length),)) for length in (2, 3))
    first = rope.tables(short, 16, **F64)
    assert rope.tables(Layout(4, (1, 2), 8, (1,), ((1, 2),)), 16, **F64)[0] is first[0]
    assert rope.tables(long, 16, **F64)[1].shape[0] == first[1].shape[0] + 1
    assert rope.tables(short, 16, device=torch.device("cpu"), dtype=torch.bfloat16)[0].dtype == torch.complex64
    for length in range(4, 520):
        rope.tables(Layout(4, (1, 2), 8, (1,), ((1, length),)), 16, **F64)
    assert len(rope._tables) <= 512
