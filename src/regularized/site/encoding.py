"""Loads the sentence encoder of a running site, and encodes what is new, in a thread of its own.

Loading takes up to a minute on a busy machine, and encoding thousands of papers longer: until it is done, search goes
by words, and no request waits. Papers that are imported while the site runs are encoded, too, a few minutes later.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from regularized.site.models import Paper
from regularized.site.state import Site

__all__ = ["Encoding"]

log: logging.Logger = logging.getLogger(__name__)

_LOOK = 300.0
"""Seconds after which it is looked for new papers."""


class Encoding:
    """Gives a site its meaning once that is loaded, and keeps it up to date.

    Args:
        site: an open site.
        folder: the encoder's.
    """

    def __init__(self, site: Site, folder: Path) -> None:
        self._site = site
        self._folder = folder
        self._closing = threading.Event()
        # A daemon: who stops the site does not wait for a model.
        self._thread = threading.Thread(target=self._run, name="encoding", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._site.is_loading = True
        self._thread.start()

    def stop(self) -> None:
        """End after what is at hand, which nobody waits for."""
        self._closing.set()

    def _run(self) -> None:
        try:
            from regularized.site.meaning import Meaning, SentenceEncoder

            with _quietly():
                meaning = self._site.meaning = Meaning(SentenceEncoder(self._folder))
        except Exception:  # the site goes on by words
            log.exception("the sentence encoder in %s cannot be loaded", self._folder)
            return
        finally:
            self._site.is_loading = False
        seen = None
        while not self._closing.is_set():
            try:
                if (papers := self._papers()) != seen:
                    log.info("encoded %s papers", meaning.update(self._site.read, self._site.write))
                    seen = papers
            except Exception:  # a database that is away for a moment
                log.exception("papers cannot be encoded")
            self._closing.wait(_LOOK)

    def _papers(self) -> tuple[int, int]:
        with self._site.read() as session:
            count, changed = session.execute(select(func.count(), func.max(Paper.changed_at))).one()
        return int(count), int(changed or 0)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what other packages say while a model is loaded, of quantised tensors that nobody asked for."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    bars: Any = transformers_logging  # which has no types
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if had_bars:
            bars.enable_progress_bar()
