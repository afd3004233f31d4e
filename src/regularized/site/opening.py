"""Opens a site: database, templates, mail, and, for who shows papers, the catalogue.

The encoder comes later (:mod:`regularized.site.encoding`). A command that sends or moderates loads neither the
catalogue nor the web framework: cron calls it every hour.
"""

from regularized.site.database import migrate, open_database
from regularized.site.mail import Mailer
from regularized.site.settings import Settings
from regularized.site.state import Site
from regularized.site.templating import environment

__all__ = ["open_site"]


def open_site(settings: Settings, *, catalogue: bool = True) -> Site:
    """Open the database, and bring its tables and the catalogue up to date.

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

    site = Site(settings, engine, environment(), Mailer(settings), None)
    with site.write.begin() as session:
        sync_catalogue(session, load_catalogue(settings.package), now=settings.now)
    return site
