"""The scripts of examples/ write what their pages say."""

import runpy
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_phrase_is_right_as_often_as_the_page_says():
    """Fails when the phrase goes with the other half, or when a sentence is in both halves."""
    names = runpy.run_path(str(EXAMPLES / "text_shortcut.py"))
    texts, y = names["sentences"]()
    assert len(set(texts)) == len(texts) > 1500
    assert y.mean() == 0.5
    for share in (0.9, 0.5):
        seen = names["with_phrases"](texts, y, share, np.random.default_rng(0))
        marked = np.array([text.startswith(names["PHRASES"]) for text in seen])
        assert abs((marked == y).mean() - share) < 4 * (share * (1 - share) / len(y)) ** 0.5
