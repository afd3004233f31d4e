"""Frame pairs: two near frames of one video, all crops of both, every video once an epoch, the same in every run."""

import torch

from regularized.self_supervised.identity_seeking import FramePairs


def frames(**options):
    """Five videos of four frames with two or three crops; the last video has one frame."""
    rows = [(v, f, c) for v in range(5) for f in (0, 2, 5, 9) for c in range(2 + f % 2) if v < 4 or f == 0]
    video, frame, _ = map(torch.tensor, zip(*rows, strict=True))
    crops = torch.arange(len(rows), dtype=torch.float32)[:, None]
    return FramePairs(crops, video, frame, **{"videos_per_batch": 2, "max_gap": 3, **options}), video, frame


def test_two_near_frames_of_each_video():
    """Fails when frames are too far apart, of two videos, the same one, or without some of their crops."""
    data, video, frame = frames()
    gaps = set()
    for epoch in range(6):
        for batch in data.batches(epoch):
            first, second = (batch.inputs[name][:, 0].long() for name in ("first", "second"))
            assert video[first].equal(batch.inputs["group_a"])
            assert video[second].equal(batch.inputs["group_b"])
            for one in batch.inputs["group_a"].unique():
                (a,), (b,) = (frame[rows[video[rows] == one]].unique().tolist() for rows in (first, second))
                assert 0 < abs(a - b) <= 3
                gaps.add(b - a)
                assert int((video[first] == one).sum()) == int(((video == one) & (frame == a)).sum())
    assert gaps == {-3, -2, 2, 3}


def test_every_video_once_an_epoch():
    """Fails when a video is drawn twice, or never; the one with a single frame is counted."""
    data, *_ = frames()
    assert data.skipped == 1
    assert len(data) == 2
    seen = torch.cat([batch.inputs["group_a"].unique() for batch in data.batches(0)])
    assert sorted(seen.tolist()) == [0, 1, 2, 3]


def test_a_function_of_seed_epoch_and_number():
    """Fails when a run that goes on in the middle of an epoch sees other batches."""
    data, *_ = frames()
    whole, rest = list(data.batches(3)), list(data.batches(3, start=1))
    assert whole[1].inputs["first"].equal(rest[0].inputs["first"])
    other = list(frames(seed=1)[0].batches(3))
    assert any(not a.inputs["first"].equal(b.inputs["first"]) for a, b in zip(whole, other, strict=True))


def test_processes_share_the_videos():
    """Fails when two processes see one video, or one is left out."""
    data, *_ = frames(videos_per_batch=4)
    parts = [next(iter(data.batches(0, rank=rank, world=2))).inputs["group_a"].unique() for rank in range(2)]
    assert sorted(torch.cat(parts).tolist()) == [0, 1, 2, 3]


def test_long_epochs_begin_again():
    """Fails when an epoch that is longer than the videos runs out of them."""
    data, *_ = frames(batches_per_epoch=5)
    assert len(list(data.batches(0))) == len(data) == 5
