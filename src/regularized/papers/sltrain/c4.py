"""The paper's text and training: C4 as the official script reads it, on one large GPU."""

import gzip
import json
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regularized.evidence.corpora import TokenText
from regularized.evidence.language_models import next_token_loss
from regularized.evidence.requirements import need_files, need_gpu, need_package

__all__ = ["published_text", "published_training"]

_TRAIN_TOKENS = 11_000 * 512 * 256
_HELD_OUT_TOKENS = 10_000_000  # as the official evaluation


@lru_cache(maxsize=1)
def published_text() -> TokenText:
    """1.4 billion tokens of C4 to train on, and 10 million each of its validation files to choose and to judge by.

    Raises:
        Unavailable: no GPU of 80 GB, no sentencepiece, or the files are not there.
    """
    device = need_gpu("the paper scale trains on 1.4 billion tokens", gigabytes=75)
    need_package("sentencepiece", "pip install sentencepiece")
    folder = need_files(
        {
            "c4/en": "C4's c4-train.*.json.gz and c4-validation.*.json.gz (huggingface.co/datasets/allenai/c4, en)",
            "c4/spiece.model": "the tokenizer of t5-base (huggingface.co/google-t5/t5-base)",
        }
    )
    tokenizer: Any = import_module("sentencepiece").SentencePieceProcessor(model_file=str(folder / "c4/spiece.model"))
    train = _tokens(folder / "c4/en", "c4-train.*.json.gz", tokenizer, _TRAIN_TOKENS)
    held_out = _tokens(folder / "c4/en", "c4-validation.*.json.gz", tokenizer, 2 * _HELD_OUT_TOKENS)
    validation, test = held_out.split(_HELD_OUT_TOKENS)
    return TokenText(train.to(device), validation.to(device), test.to(device))


def published_training() -> dict[str, Any]:
    """How ``fit`` trains on it: in bfloat16, 64 windows of the batch at a time."""
    return {"loss": _loss_in_pieces, "warm_up": 0.1, "floor": 0.1}


def _loss_in_pieces(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean loss; the activations of one piece at a time are alive, and computed again in the backward pass."""

    def of(piece: Tensor) -> Tensor:
        with torch.autocast(piece.device.type, torch.bfloat16):
            return next_token_loss(model, piece.long()) * len(piece)

    total: Tensor = sum(checkpoint(of, piece, use_reentrant=False) for piece in windows.split(64))
    return total / len(windows)


def _tokens(folder: Path, pattern: str, tokenizer: Any, count: int) -> Tensor:
    """Documents one after another, each ended by the end-of-sequence token."""
    ids = np.empty(count, dtype=np.int32)
    at = 0
    for text in _documents(folder, pattern):
        found = np.array([*tokenizer.encode(text), tokenizer.eos_id()], dtype=np.int32)[: count - at]
        ids[at : at + len(found)] = found
        at += len(found)
        if at == count:
            return torch.from_numpy(ids)
    raise ValueError(f"the files {pattern} in {folder} have {at:,} tokens, {count:,} are needed; get all of them")


def _documents(folder: Path, pattern: str) -> Iterator[str]:
    for file in sorted(folder.glob(pattern)):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
