"""Emoji, from files of the package's form."""

import json

import pytest
import torch
from PIL import Image

from regularized.evidence.datasets.emoji import emoji
from regularized.evidence.experiment import Unavailable


def entry(name, category, there=True):
    return {"unified": name, "image": f"{name.lower()}.png", "category": category, "has_img_twitter": there}


def test_pictures_lie_on_white_with_their_categories(tmp_path, monkeypatch):
    """Fails when transparency becomes black, an entry without a picture stays, or the order is lost."""
    folder = tmp_path / "emoji-datasource-twitter"
    (folder / "img" / "twitter" / "64").mkdir(parents=True)
    entries = [
        entry("1F601", "Smileys"),
        entry("1F3FB", "Component"),
        entry("1F436", "Animals"),
        entry("1F999", "Animals", there=False),
    ]
    (folder / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    for name, colour in (("1f601", (255, 0, 0, 255)), ("1f436", (0, 0, 255, 0))):
        Image.new("RGBA", (64, 64), colour).save(folder / "img" / "twitter" / "64" / f"{name}.png")
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    glyphs = emoji("twitter")
    assert glyphs.names == ("1F436", "1F601")
    assert [glyphs.categories[i] for i in glyphs.labels.tolist()] == ["Animals", "Smileys"]
    assert glyphs.pixels.shape == (2, 3, 64, 64)
    assert glyphs.pixels.dtype == torch.uint8
    assert glyphs.pixels[:, :, 0, 0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    """Fails when a missing package is a traceback, or the message names no command."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match=r"npm pack emoji-datasource-google@16\.0\.0"):
        emoji()
