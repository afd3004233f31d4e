"""How often something may be tried: counted in the database, so that several server processes share the count."""

import ipaddress

from fastapi import Request
from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from regularized.site.middleware import Scope
from regularized.site.models import RateCount
from regularized.site.settings import Settings
from regularized.site.state import Site

__all__ = ["DAY", "HOUR", "TooOften", "address_of", "count_try", "limit", "limit_mail", "where"]

HOUR, DAY = 3600, 24 * 3600


class TooOften(Exception):
    """Something was tried too often.

    Args:
        wait: seconds after which it may be tried again.
    """

    def __init__(self, wait: int) -> None:
        super().__init__(f"too many tries; wait {wait} seconds")
        self.wait = wait


def count_try(session: Session, key: str, *, most: int, seconds: int, now: int) -> None:
    """Count a try, and refuse it beyond a number in a window of time.

    Args:
        session: a session that writes.
        key: what is tried, and by whom.
        most: tries in a window.
        seconds: length of the window.
        now: seconds since 1970.

    Raises:
        TooOften: there were more.
    """
    window = now - now % seconds
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    tried = dialect.insert(RateCount).values(key=f"{key[:180]}/{seconds}", window=window, count=1)
    counted = tried.on_conflict_do_update(index_elements=["key", "window"], set_={"count": RateCount.count + 1})
    number = session.execute(counted.returning(RateCount.count)).scalar_one()
    if number == 1:
        session.execute(delete(RateCount).where(RateCount.window < now - 7 * 24 * 3600))
    if number > most:
        raise TooOften(window + seconds - now)


def limit(site: Site, key: str, *, most: int, seconds: int) -> None:
    """Count a try in a transaction of its own: what is refused or fails afterwards has been tried all the same.

    Raises:
        TooOften: there were more.
    """
    with site.write.begin() as session:
        count_try(session, key, most=most, seconds=seconds, now=site.settings.now)


def limit_mail(site: Site, request: Request, kind: str, address: str, *, most: int, seconds: int) -> None:
    """Limit messages by who asks for them.

    What all together may ask for one mailbox is much more than what one may: else a stranger's few requests would keep
    its owner out.

    Raises:
        TooOften: there were more.
    """
    name, _, host = address.partition("@")
    mailbox = f"{name.partition('+')[0]}@{host}"  # ada+1 and ada+2 arrive in one mailbox
    limit(site, f"{kind} from {where(site, request)} to {mailbox}", most=most, seconds=seconds)
    limit(site, f"{kind} from {where(site, request)}", most=20, seconds=HOUR)
    limit(site, f"{kind} to {mailbox}", most=10 * most, seconds=seconds)


def where(site: Site, request: Request) -> str:
    """Where a request comes from, for limits."""
    return address_of(site.settings, request.scope)


def address_of(settings: Settings, scope: Scope) -> str:
    """The visitor's address, for limits: that of the connection, or what the last believed proxy saw.

    Addresses of version 6 count by their first 64 bits, of which one visitor has them all.
    """
    client = scope.get("client")
    address = client[0] if client else "unknown"
    if settings.proxies:
        forwarded = dict(scope["headers"]).get(b"x-forwarded-for", b"").decode("latin-1")
        hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
        if len(hops) >= settings.proxies:
            address = hops[-settings.proxies]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:60]
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)
