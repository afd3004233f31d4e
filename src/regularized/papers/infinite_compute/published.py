"""The paper's scale: 0.2 billion tokens of DCLM, Llama models of 0.15 to 1.4 billion weights, certified settings."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from regularized.evidence.corpora import TokenText
from regularized.evidence.requirements import need_files, need_gpu

__all__ = ["PAPER", "PUBLISHED_SETTINGS", "SHAPES", "published_text"]

SHAPES: dict[int, tuple[int, int, int]] = {
    512: (6, 8, 1792),
    768: (12, 12, 2688),
    1024: (24, 16, 3584),
    2048: (16, 16, 7168),
}
"""Layers, heads, inner width by width: the models called 150M, 300M, 600M and 1.4B; ours have a key for each head."""

PAPER: dict[str, Any] = {
    "corpus": "dclm",
    "train": 800 * 64 * 4096,
    "unit": 256,
    "vocabulary": 128_256,
    "members": 5,
    "context": 4096,
    "batch": 64,
    "pool": 150_000,
    "students": 1,
}

_FOUR = {
    "multiples": [2, 3, 4, 8],
    "epochs": [16, 16, 8, 8],
    "lr": [3e-3, 3e-3, 1e-3, 1e-3],
    "decay": [0.8, 1.6, 3.2, 3.2],
}
_SMALL = {"multiples": [3], "epochs": [16], "lr": [3e-3], "decay": [1.6]}
_LARGE = {"multiples": [8], "epochs": [8], "lr": [1e-3], "decay": [3.2]}

PUBLISHED_SETTINGS: dict[str, dict[str, Any]] = {
    "small_standard": {"multiples": [3], "epochs": [8], "lr": [1e-3]},
    "large_standard": {"multiples": [8], "epochs": [4], "lr": [3e-4]},
    "small_regularized": _SMALL,
    "large_regularized": _LARGE,
    "growing": _FOUR,
    "ensemble_same": _SMALL,
    "ensemble_lighter": _SMALL,
    "joint": _FOUR,
    "self_distilled": _SMALL,
    "distilled": _SMALL,
}
"""Certified for 0.2 billion tokens, from the official configurations."""


@lru_cache(maxsize=1)
def published_text() -> TokenText:
    """The first 209.7 million tokens, and 1,024 sequences each to choose and to judge by.

    Raises:
        Unavailable: no GPU that holds all members and a whole batch, or the tokens are not there.
    """
    why = "the paper scale trains five models of up to 1.4 billion weights in one step, each on 64 x 4,096 tokens,"
    device = need_gpu(why, gigabytes=1500)
    folder = need_files(
        {
            f"dclm/{part}.npy": f"{count:,} tokens of DCLM, int32, by Llama 3's tokenizer (huggingface.co)"
            for part, count in (("train", PAPER["train"] + 1), ("held_out", 2 * 1024 * 4096 + 2))
        }
    )
    train, held_out = (torch.from_numpy(np.load(folder / f"dclm/{part}.npy")) for part in ("train", "held_out"))
    validation, test = held_out.to(device, torch.int64).chunk(2)
    return TokenText(train[: PAPER["train"] + 1].to(device, torch.int64), validation, test)
