"""Opens a site: database, templates, mail, and, for who shows papers, the catalogue and the encoder.

A command that sends or moderates loads neither the catalogue nor the web framework: cron calls it every hour.
"""

import logging
from typing import TYPE_CHECKING

from regularized.site.database import migrate, one_at_a_time, open_database
from regularized.site.mail import Mailer
from regularized.site.settings import Settings
from regularized.site.state import Site
from regularized.site.templating import environment

if TYPE_CHECKING:
    from regularized.site.meaning import Meaning

__all__ = ["open_site"]

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
    from regularized.site.sync import sync_catalogue

    site = Site(settings, engine, environment(), Mailer(settings), _meaning(settings))
    with site.write.begin() as session:
        sync_catalogue(session, load_catalogue(settings.package), now=settings.now)
    if site.meaning is not None:
        with site.write.begin() as session:
            one_at_a_time(session, "catalogue")
            log.info("encoded %s papers", site.meaning.update(session))
    return site


def _meaning(settings: Settings) -> "Meaning | None":
    if settings.encoder == "off":
        return None
    from regularized.site.meaning import Meaning, open_encoder  # which loads numpy, at least

    encoder = open_encoder(settings.encoder)
    return Meaning(encoder) if encoder else None
