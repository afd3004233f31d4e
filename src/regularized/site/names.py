"""Display names: which are one and the same to a reader, and which nobody may have.

Two names are the same when their *skeletons* are: letters and digits without case, accents, and the letters of other
alphabets that look like Latin ones.
"""

import re
import unicodedata

__all__ = ["is_reserved", "shown_name", "skeleton"]

_LOOKS = dict(zip("авекмнорстухіјѕԁһӏαβεηικνορτυχ", "abekmhopctyxijsdhlabenikvoptux"))  # Cyrillic, then Greek
_LOOKS |= {"0": "o", "1": "l", "|": "l", "ı": "i", "ł": "l", "ø": "o", "$": "s", "@": "a"}

_STAFF = re.compile(
    r"(site|forum|the)*(adm[il]n(istrator)?|moderat[oe]r?|mod|staff|support|helpdesk|system|root|operator|webmaster"
    r"|postmaster|official|owner|team|security|editor)s?(team)?"
)
# "reader 7" is what somebody is called who has chosen no name.
_UNNAMED = re.compile(r"reader[\dol]+")


def shown_name(text: str) -> str:
    """A name as it is kept: printable letters, single spaces.

    Examples:
        >>> shown_name(" Ada\u202e  Lovelace ")
        'Ada Lovelace'
    """
    return " ".join("".join(letter for letter in " ".join(text.split()) if letter.isprintable()).split())


def skeleton(name: str) -> str:
    """What a name has in common with those that look like it.

    Examples:
        >>> skeleton("Ada Lovelace") == skeleton("аda.LoveIace".replace("I", "1")) == skeleton("ADA_Lóvelace")
        True
    """
    plain = unicodedata.normalize("NFKD", name).casefold()
    like = "".join(_LOOKS.get(letter, letter) for letter in plain)
    return "".join(letter for letter in like if letter.isalnum())


def is_reserved(name: str) -> bool:
    """Whether a name would pass for somebody of the site, or for a reader without a name.

    Examples:
        >>> [is_reserved(name) for name in ("regularized staff", "Admin", "аdmіn", "M0derator", "reader 7", "Ada")]
        [True, True, True, True, True, False]
    """
    bare = skeleton(name)
    return "regularized" in bare or bool(_STAFF.fullmatch(bare) or _UNNAMED.fullmatch(bare))
