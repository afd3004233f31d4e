"""What a site can do without at first: which evidence is older than its code, and plots that nobody has asked for yet.

After an installation this takes minutes. A process of its own does it, with what the machine has to spare, so that who
comes first does not wait for it.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from regularized.papers.catalogue import Entry, load_catalogue
from regularized.site.plots import draw_all, undrawn
from regularized.site.settings import Settings
from regularized.site.state import Site

__all__ = ["find_stale", "main", "meanwhile"]

log: logging.Logger = logging.getLogger(__name__)


@contextmanager
def meanwhile(site: Site) -> Iterator[None]:
    """Do it in a process that ends with the block; nothing is started where nothing is to do.

    Args:
        site: an open site, of which the environment tells a process of its own.
    """
    if not undrawn(site) and not _unknown(load_catalogue(site.settings.package)):
        yield
        return
    # It ends when its standard input does, so also with a server that is killed. Ctrl-C is for the server alone.
    command = [sys.executable, "-m", "regularized.site.afterwards"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


def find_stale(site: Site) -> None:
    """Find out which evidence is older than the code of its experiment, and say so on the pages.

    Args:
        site: an open site.
    """
    from regularized.site.sync import sync_catalogue

    entries = load_catalogue(site.settings.package)
    unknown = _unknown(entries)
    for entry in unknown:
        log.debug("the code of %s is %s", entry.slug, entry.code_key)
    if unknown:
        with site.write.begin() as session:
            sync_catalogue(session, entries, now=site.settings.now)


def _unknown(entries: tuple[Entry, ...]) -> list[Entry]:
    """Measured papers of which it is not known whether the code has changed: all that it reaches must be read."""
    measured = (entry for entry in entries if entry.implemented and entry.ledger.is_file())
    return [entry for entry in measured if not entry.knows_code_key]


def main() -> None:
    """Do it, for the site of the environment, until it is done or standard input ends."""
    from regularized.site.opening import open_site

    os.nice(10)
    logging.basicConfig(level=logging.WARNING)
    threading.Thread(target=_end_with_input, daemon=True).start()
    site = open_site(Settings.from_environment({**os.environ, "REGULARIZED_SITE_ENCODER": "off"}))
    find_stale(site)
    draw_all(site)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # at once: what is half written is written under another name


if __name__ == "__main__":
    main()
