"""Who says which features are unintended: *sighted*, with the labels of the shortcut, or *blind*, without.

A user of the method has no labels of the shortcut; a judge that reads them is only fairly compared with a baseline that
gets them too. The blind rules stand in for a person or a language model who sees what excites a feature. They see no
label, no phrase and no direction, and were fixed before the evidence was made. But who wrote them knew what *kind* of
thing the shortcut is (a phrase, noise on a picture), as a user with a suspicion does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE
from regularized.fine_tuning.sae_regularization.judging import Example, Judge

__all__ = ["EXAMPLES", "fires_with", "looks_like_no_picture", "reads_phrases", "shares_words"]

EXAMPLES = 20
"""Rows shown of each feature; a feature with fewer stays allowed."""


def fires_with(sae: TopKSAE, embeddings: Tensor, shortcut: Tensor) -> Judge:
    """Sighted: a feature that fires three times as often, and one row in a hundred more, where the shortcut is.

    Args:
        sae: the autoencoder.
        embeddings: (N, d) unlabelled ones.
        shortcut: (N,) whether the shortcut is in each, 0 or 1.
    """
    active = sae.encode(embeddings) > 0
    rate = {value: active[shortcut == value].float().mean(dim=0).tolist() for value in (0.0, 1.0)}
    return lambda feature, _: rate[1.0][feature] > 3 * rate[0.0][feature] + 0.01


def reads_phrases(phrases: tuple[str, ...]) -> Judge:
    """Sighted: a feature of whose texts nine in ten begin with one of the phrases that are the shortcut."""

    def judge(_: int, examples: Sequence[Example]) -> bool:
        marked = sum(str(example.item).startswith(phrases) for example in examples)
        return len(examples) == EXAMPLES and marked >= 0.9 * EXAMPLES

    return judge


def shares_words(least: int = 3, share: float = 0.75) -> Judge:
    """Blind: a feature of whose texts most have the same words in a row is about a formula, not about a topic.

    Written down before anything was run with it.

    Args:
        least: how many words in a row; default 3.
        share: of the texts that must have them; default three quarters.

    Examples:
        >>> texts = [f"{topic} Only for experts." for topic in "abcdefghijklmnopqrst"]
        >>> shares_words()(0, [Example(row, 1.0, text) for row, text in enumerate(texts)])
        True
        >>> shares_words()(0, [Example(row, 1.0, text[:-9]) for row, text in enumerate(texts)])
        False
    """

    def judge(_: int, examples: Sequence[Example]) -> bool:
        texts: dict[tuple[str, ...], int] = {}
        for example in examples:
            words = str(example.item).lower().split()
            for formula in {tuple(words[start : start + least]) for start in range(len(words) - least + 1)}:
                texts[formula] = texts.get(formula, 0) + 1
        return len(examples) == EXAMPLES and max(texts.values(), default=0) >= share * EXAMPLES

    return judge


def looks_like_no_picture(pictures: Tensor, roughness: float = 0.75) -> Judge:
    """Blind: a feature whose pictures share something in which neighbouring pixels have next to nothing to do with each
    other, as no part of a thing looks.

    What they share is the mean of the pictures that excite it most, less the mean of all. Its roughness is the mean
    square between neighbours over twice the variance: about 1 where pixels are unrelated.

    Args:
        pictures: (N, height, width), what each row was made from.
        roughness: at least; default 0.75, where a look at seeds 1000 and 1001, which are for tuning, found the features
            of the shortcut and a fifth of the others. (A first rule, that such a feature fires all or nothing and that
            its pictures are as varied as any, had found none of the shortcut's on seed 1000.)

    Examples:
        >>> pictures = torch.zeros(100, 8, 8)
        >>> pictures[:20] = torch.linspace(0, 1, 8)  # a slope, from left to right
        >>> pictures[20:40] = torch.randint(2, (8, 8), generator=torch.Generator().manual_seed(0)).float()
        >>> judge = looks_like_no_picture(pictures)
        >>> [judge(0, [Example(row, 1.0) for row in rows]) for rows in (range(20), range(20, 40))]
        [False, True]
    """
    everything = pictures.mean(dim=0)

    def judge(_: int, examples: Sequence[Example]) -> bool:
        if len(examples) < EXAMPLES:
            return False
        shared = pictures[torch.tensor([example.row for example in examples])].mean(dim=0) - everything
        steps = shared.diff(dim=0).square().mean() + shared.diff(dim=1).square().mean()
        return bool(steps / 2 >= roughness * 2 * shared.var(unbiased=False))

    return judge
