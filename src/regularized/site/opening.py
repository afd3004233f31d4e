"""Opens a site: database, templates, mail, and, for who shows papers, the catalogue and the encoder.

A command that sends or moderates loads neither the catalogue nor the web framework: cron calls it every hour.
"""

import logging
import threading

from regularized.site.database import migrate, one_at_a_time, open_database
from regularized.site.mail import Mailer
from regularized.site.settings import Settings
from regularized.site.state import Site
from regularized.site.templating import environment

__all__ = ["find_stale", "open_site"]

log: logging.Logger = logging.getLogger(__name__)


def open_site(settings: Settings, *, catalogue: bool = True) -> Site:
    """Open the database, bring its tables and the catalogue up to date, and load the encoder.

    Args:
        settings: the settings.
        catalogue: False leaves out all but the tables: for commands that send or moderate what is there.

    Raises:
        SettingsError: a setting has a value that is not allowed.
    """
    engine = open_database(settings.database)
    migrate(engine)
    if not catalogue:
        return Site(settings, engine, environment(), Mailer(settings), None)
    from regularized.papers.catalogue import load_catalogue
    from regularized.site.meaning import Meaning, open_encoder
    from regularized.site.sync import sync_catalogue

    encoder = open_encoder(settings.encoder)
    site = Site(settings, engine, environment(), Mailer(settings), Meaning(encoder) if encoder else None)
    with site.write.begin() as session:
        sync_catalogue(session, load_catalogue(settings.package), now=settings.now)
    if site.meaning is not None:
        with site.write.begin() as session:
            one_at_a_time(session, "catalogue")
            log.info("encoded %s papers", site.meaning.update(session))
    return site


def find_stale(site: Site, closing: threading.Event | None = None) -> None:
    """Find out which evidence is older than the code of its experiment, and say so on the pages.

    After an installation this takes longer than the start itself: the code that each experiment reaches is read.

    Args:
        site: an open site.
        closing: stops it when set.
    """
    from regularized.papers.catalogue import load_catalogue
    from regularized.site.sync import sync_catalogue

    entries = load_catalogue(site.settings.package)
    measured = [entry for entry in entries if entry.implemented and entry.ledger.is_file()]
    unknown = [entry for entry in measured if not entry.knows_code_key]
    for entry in unknown:
        if closing is not None and closing.is_set():
            return
        log.debug("the code of %s is %s", entry.slug, entry.code_key)
    if unknown:
        with site.write.begin() as session:
            sync_catalogue(session, entries, now=site.settings.now)
