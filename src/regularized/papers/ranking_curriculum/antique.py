"""ANTIQUE with a BERT ranker, for the paper scale: files and weights are looked for, never downloaded."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regularized.curriculum.ranking_curriculum.first_stage import FirstStageRun, read_qrels, read_run
from regularized.evidence.datasets import data_folder
from regularized.evidence.experiment import Unavailable
from regularized.evidence.models import seeded

FILES = (
    "collection.tsv",
    "train.queries.tsv",
    "train.qrels",
    "train.bm25.run",
    "test.queries.tsv",
    "test.qrels",
    "test.bm25.run",
)
QUERY_TOKENS, LENGTH = 40, 512  # "query length 30-40 tokens, document 475": the longest that BERT takes


@dataclass(frozen=True, slots=True)
class TextLists:
    """Lists of texts; see ``experiment.Lists``."""

    run: FirstStageRun
    labels: Mapping[str, Mapping[str, int]]
    positive: Tensor
    other: Tensor
    queries: Sequence[str]
    documents: Sequence[Sequence[str]]
    tokenizer: Any

    def encode(self, rows: Tensor, columns: Tensor) -> Mapping[str, Tensor]:
        """Token ids and masks of (n,) pairs."""
        pairs = list(zip(rows.tolist(), columns.tolist()))
        encoded: Mapping[str, Tensor] = self.tokenizer(
            [self.queries[row] for row, _ in pairs],
            [self.documents[row][column] for row, column in pairs],
            truncation="only_second",
            max_length=LENGTH,
            padding=True,
            return_tensors="pt",
        )
        return encoded


class Ranker(nn.Module):
    """A sequence classifier with one output, on its own device, fed with what the tokenizer gives."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """(n,) scores; in evaluation a few pairs at a time."""
        device = next(self.parameters()).device
        size = len(encoded["input_ids"]) if self.training else 64
        parts = zip(*(tensor.to(device).split(size) for tensor in encoded.values()))
        scores = [self.classifier(**dict(zip(encoded, part))).logits.squeeze(-1) for part in parts]
        return torch.cat(scores)


def antique(
    seed: int, settings: Mapping[str, Any]
) -> tuple[TextLists, TextLists, TextLists, Ranker, list[dict[str, Any]], str]:
    """Training, validation and test lists, the ranker, its parameter groups, and the fingerprint of the data.

    Raises:
        Unavailable: files, weights, a package or the GPU are missing.
    """
    folder, weights = data_folder() / "antique", data_folder() / "bert-base-uncased"
    missing = [str(folder / name) for name in FILES if not (folder / name).is_file()]
    if not (weights / "config.json").is_file():
        missing.append(f"{weights} (config.json, model.safetensors and the tokenizer's files)")
    if missing:
        raise Unavailable(
            f"the paper scale re-ranks ANTIQUE with BERT; missing: {', '.join(missing)}. Get the collection from "
            "https://ciir.cs.umass.edu/downloads/Antique/, rank it by BM25 (k1=1.4, b=0.4; 100 documents a query, TREC "
            "format), and set REGULARIZED_DATA"
        )
    if not torch.cuda.is_available() and settings["device"] != "cpu":
        raise Unavailable("the paper scale fine-tunes BERT for thousands of steps and needs a CUDA GPU; none is here")
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise Unavailable('the paper scale needs transformers: pip install "regularized[huggingface]"') from error

    tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
    collection = _texts(folder / "collection.tsv")

    def lists(name: str, part: slice, *, depth: int) -> TextLists:
        run, labels = read_run(folder / f"{name}.bm25.run"), read_qrels(folder / f"{name}.qrels")
        names = sorted(query for query in run.ranks if query in labels)
        # The same queries are held out for every seed.
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
        return _lists(
            [names[i] for i in order[part]],
            run,
            labels,
            _texts(folder / f"{name}.queries.tsv"),
            collection,
            depth=depth,
            grade=settings["grade"],
            tokenizer=tokenizer,
        )

    held = settings["validation"]
    train, validation = lists("train", slice(held, None), depth=100), lists("train", slice(held), depth=20)
    test = lists("test", slice(None), depth=100)

    def build() -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=1, local_files_only=True)
        assert isinstance(model, nn.Module)
        return Ranker(model)

    net = seeded(seed, build)  # the head is drawn from the seed
    assert isinstance(net, Ranker)
    net.to(settings["device"]).train()
    head = [p for name, p in net.named_parameters() if name.startswith("classifier.classifier")]
    encoder = [p for name, p in net.named_parameters() if not name.startswith("classifier.classifier")]
    groups = [{"params": head}, {"params": encoder, "lr": settings["encoder_lr"]}]
    return train, validation, test, net, groups, _fingerprint(folder)


def _lists(
    names: Sequence[str],
    run: FirstStageRun,
    labels: Mapping[str, Mapping[str, int]],
    queries: Mapping[str, str],
    collection: Mapping[str, str],
    *,
    depth: int,
    grade: int,
    tokenizer: Any,
) -> TextLists:
    tops = [sorted(run.ranks[name], key=run.ranks[name].__getitem__)[:depth] for name in names]
    positive, other = (torch.zeros(len(names), depth, dtype=torch.bool) for _ in range(2))
    for row, (name, top) in enumerate(zip(names, tops)):
        for column, document in enumerate(top):
            known = labels[name].get(document, 0) >= grade
            (positive if known else other)[row, column] = True
    return TextLists(
        FirstStageRun.from_scores(
            {
                str(row): {str(column): run.scores[name][document] for column, document in enumerate(top)}
                for row, (name, top) in enumerate(zip(names, tops))
            }
        ),
        {
            # Relevant documents that were not retrieved do not change a reciprocal rank.
            str(row): {str(column): labels[name].get(document, 0) for column, document in enumerate(top)}
            for row, (name, top) in enumerate(zip(names, tops))
        },
        positive,
        other,
        [" ".join(queries[name].split()[:QUERY_TOKENS]) for name in names],
        [[collection[document] for document in top] for top in tops],
        tokenizer,
    )


def _texts(path: Path) -> dict[str, str]:
    texts = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            name, _, text = line.rstrip("\n").partition("\t")
            texts[name] = text
    return texts


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
