"""Captions and references."""

import torch

from regularized.generation.dreamid_omni import Line, StructuredCaption, fit_picture, model_text, reference_voice

CAPTION = StructuredCaption(
    images=["A man, identified as <sub1>.", "A woman, identified as <sub2>."],
    video="<sub1> is on the left, <sub2> on the right.",
    audio="Rain. <sub1> speaks softly.",
    joint="<sub1> looks at <sub2> and says, <S>Is it you?<E> <sub2> smiles as she replies, <S>It is.<E>",
)


def test_who_says_what():
    """Fails when the person next to the speech is taken for its owner: here <sub2> is only looked at."""
    assert CAPTION.lines() == [Line(1, "Is it you?"), Line(2, "It is.")]
    assert CAPTION.persons == {1, 2}


def test_what_the_model_is_given():
    """As the released script makes it. Fails when times or sound stay, tags stay, or anchors go."""
    text = CAPTION.text() + '\n\n[SPEAKER_TIMESTAMPS_START]\n{"<sub1>": ["0-2"]}\n[SPEAKER_TIMESTAMPS_END]'
    given = model_text(text)
    assert given.splitlines() == [
        "<img1>: A man, identified as <sub1>.",
        "<img2>: A woman, identified as <sub2>.",
        "<sub1> is on the left, <sub2> on the right.",
        CAPTION.joint,
    ]
    assert model_text("plain words") == "plain words"


def test_a_caption_comes_back():
    """Fails when a field is lost or gets another's text."""
    read = StructuredCaption.parse(CAPTION.text())
    assert read == CAPTION
    assert list(read.images) == list(CAPTION.images)


def test_checked_captions_pass():
    """Fails when a person of two pictures is taken for two persons, or RA2V is asked for voices."""
    CAPTION.check(pictures=2, voices=2)
    CAPTION.check(pictures=2)
    twice = StructuredCaption([*CAPTION.images, "The woman again, identified as <sub2>."], "<sub1>, <sub2>.", "", "")
    twice.check(pictures=3, voices=2)


def test_pictures_fit():
    """Fails when a picture is stretched or cut instead of padded."""
    tall = fit_picture(torch.zeros(3, 8, 4), (4, 8))
    assert tall.shape == (3, 4, 8)
    assert (tall[:, :, 3:5] == 0).all()
    assert (tall[:, :, [0, 1, 2, 5, 6, 7]] == 1).all()
    assert torch.allclose(fit_picture(torch.full((3, 2, 4), 0.3), (4, 8), white=9.0), torch.tensor(0.3))


def test_a_second_of_a_voice():
    """Fails when the first second is taken of a long recording, or none of a short one."""
    assert reference_voice(torch.arange(50.0), 10).tolist() == list(range(10, 20))
    assert reference_voice(torch.arange(15.0), 10).tolist() == list(range(5, 15))
    assert reference_voice(torch.arange(10.0), 10).tolist() == list(range(10))
    assert reference_voice(torch.stack([torch.zeros(20), torch.ones(20)]), 10).tolist() == [0.5] * 10
