"""The card of a paper: its facts, the problem that it solves, and its claims.

A card is a TOML file, ``papers/<slug>/card.toml``. Reading one reports every problem at once; check files with::

    python -m regularized.papers.card src/regularized/papers/*/card.toml

Whether a paper is implemented, and what was measured, is not in the card: both are computed, see
:mod:`regularized.papers.catalogue`.
"""

import datetime
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from regularized.evidence.claims import Claim, Reported

__all__ = ["FAMILIES", "Blocker", "Card", "CardError", "Exemption", "Implementation", "Official", "PaperScale"]

FAMILIES: Mapping[str, str] = {
    "noisy_labels": "labels that are partly wrong",
    "curriculum": "which samples to train on, and in what order",
    "overfitting": "overfitting and over-confidence",
    "fine_tuning": "fine-tuning of pretrained models",
    "pretraining": "pretraining of large models",
    "compression": "smaller, sparser, and lower-precision models",
    "robustness": "adversarial and shifted inputs",
    "self_supervised": "learning without labels",
    "continual": "learning one task after another without forgetting",
    "unlearning": "removing what a model has learned",
    "alignment": "aligning language models",
    "generation": "training of generative models",
    "scientific": "solvers, inverse problems, and bilevel problems",
    "understanding": "understanding what training does",
}
"""Problem families, which are also the folders of the techniques, in words."""

MARK = "FILL IN"
"""What a card that was laid out for a new paper says where its author must."""

SCALES = ("smoke", "laptop", "paper")


class CardError(ValueError):
    """A card is wrong; the message names the file and every key that is, what it holds, and what is allowed.

    Args:
        source: the file.
        problems: one line a problem.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems: tuple[str, ...] = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in problems)]))

    def __reduce__(self) -> tuple[type["CardError"], tuple[str, tuple[str, ...]]]:
        return type(self), (self.source, self.problems)


@dataclass(frozen=True, slots=True)
class Blocker:
    """What stops people who use the authors' code, as somebody reported it there.

    Args:
        issue: number of the issue in their repository.
        breaks: what does not work, in one line.
    """

    issue: int
    breaks: str


@dataclass(frozen=True, slots=True)
class Official:
    """The authors' own code.

    Args:
        repository: ``owner/name`` on GitHub, or an address.
        commit: the commit that was read; empty if not stated.
        licence: its licence; empty if none or unknown.
        note: where paper and code differ.
        blockers: known obstacles, by their issues in a repository on GitHub.
    """

    repository: str
    commit: str = ""
    licence: str = ""
    note: str = ""
    blockers: tuple[Blocker, ...] = ()

    @property
    def url(self) -> str:
        """Address of the repository."""
        return self.repository if "://" in self.repository else f"https://github.com/{self.repository}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the addresses of repository and issues.

        Examples:
            >>> official = Official("owner/name", blockers=(Blocker(3, "stops at import"),))
            >>> official.to_dict()["blockers"]
            [{'issue': 3, 'breaks': 'stops at import', 'url': 'https://github.com/owner/name/issues/3'}]
        """
        blockers = [asdict(blocker) | {"url": f"{self.url}/issues/{blocker.issue}"} for blocker in self.blockers]
        return {**asdict(self), "url": self.url, "blockers": blockers}


@dataclass(frozen=True, slots=True)
class Implementation:
    """What implements the paper here.

    Args:
        names: fully qualified public names.
        floor: the least ratio of a step with the technique to a plain step that its necessary work allows.
        floor_reason: what that work is.
    """

    names: tuple[str, ...]
    floor: float
    floor_reason: str


@dataclass(frozen=True, slots=True)
class Exemption:
    """A check of the contract that the paper's implementation cannot pass: shown to users.

    Args:
        check: name of the check.
        reason: why.
        until: what must happen for it to pass.
    """

    check: str
    reason: str
    until: str


@dataclass(frozen=True, slots=True)
class PaperScale:
    """How long the original set-up takes, as far as anybody has said.

    Args:
        hours: how long.
        each: of what: a ``"run"``, or the whole ``"comparison"`` of all arms and seeds.
        source: who says so, where, and of which machine.
    """

    hours: float
    each: str
    source: str


@dataclass(frozen=True, slots=True)
class Card:
    """Facts, problem and claims of a paper.

    Args:
        slug: short name; the folder's name, too.
        title: exact title.
        date: first posted.
        problem: the problem in a practitioner's words, one line.
        summary: idea, needs and cost in our own words.
        families: problem families, home first; see :data:`FAMILIES`.
        tags: lower-case key words.
        searches: phrases that a person with the problem would type.
        changes: what of the training it changes.
        needs: what it needs from the loop.
        when_to_use: where it pays.
        when_not_to_use: where it does not.
        arxiv: arXiv identifier; empty if unknown.
        venue: where it was published; empty if unknown.
        authors: the authors that are known by name.
        authors_count: how many there are; 0 if unknown.
        organization: that of the authors; empty if unknown.
        hardware: of what makes a model smaller or cheaper, the machine on which that is so; empty for everything else.
        comments: discussion entries where the paper was listed.
        unconfirmed: statements about the paper that nobody has checked.
        claims: what the paper claims.
        official: the authors' code, if there is any.
        implementation: ours, if there is one.
        exceptions: contract checks that ours does not pass.
        paper_scale: how long the original set-up takes, if anybody has said.

    Examples:
        >>> try:
        ...     Card.parse('slug = "My Paper"', source="card.toml")
        ... except CardError as error:
        ...     print(error.problems[0])
        slug: got 'My Paper'; must be lower-case letters, digits and underscores, a letter first
    """

    slug: str
    title: str
    date: datetime.date
    problem: str
    summary: str
    families: tuple[str, ...]
    tags: tuple[str, ...]
    searches: tuple[str, ...]
    changes: str
    needs: tuple[str, ...]
    when_to_use: str
    when_not_to_use: str
    arxiv: str = ""
    venue: str = ""
    authors: tuple[str, ...] = ()
    authors_count: int = 0
    organization: str = ""
    hardware: str = ""
    comments: int = 0
    unconfirmed: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    official: Official | None = None
    implementation: Implementation | None = None
    exceptions: tuple[Exemption, ...] = ()
    paper_scale: PaperScale | None = None

    @classmethod
    def load(cls, path: Any) -> "Card":
        """Read a card.

        Args:
            path: a path, or a resource of a package. A file called ``card.toml`` must lie in a folder named after its
                slug.

        Raises:
            CardError: it cannot be read, or anything in it is wrong.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise CardError(str(path), ["there is no such file"]) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CardError(str(path), [f"cannot be read as UTF-8 text: {error}"]) from error
        where = Path(str(path)).absolute()
        return cls.parse(text, source=str(path), folder=where.parent.name if where.name == "card.toml" else "")

    @classmethod
    def parse(cls, text: str, *, source: str = "card", folder: str = "") -> "Card":
        """Read a card from its text.

        Args:
            text: TOML.
            source: what to call it in errors.
            folder: the folder that it must be named after; empty for any.

        Raises:
            CardError: it is not TOML, or anything in it is wrong.
        """
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # of which RecursionError: nested a thousand times
            raise CardError(source, [f"not valid TOML: {error}"]) from error
        problems: list[str] = []
        tables = ("official", "implementation", "claims", "exceptions", "paper_scale")
        values = _read(data, _CARD, "", problems, tables=tables)
        values["claims"] = _claims(data.get("claims", []), problems)
        values["exceptions"] = _exceptions(data.get("exceptions", []), problems)
        if "official" in data:
            values["official"] = _official(data["official"], problems)
        if "paper_scale" in data:
            values["paper_scale"] = _build(PaperScale, data["paper_scale"], "paper_scale", _PAPER_SCALE, problems)
        if "implementation" in data:
            values["implementation"] = _build(
                Implementation, data["implementation"], "implementation", _IMPLEMENTATION, problems
            )
            if not data.get("claims"):
                problems.append("claims: an implemented paper needs at least one [[claims]] table")
            problems.extend(
                f"claims.{claim.id}.smallest_effect: missing; fix the smallest effect that counts before the first run"
                for claim in values["claims"]
                if claim.smallest_effect is None
            )
            problems.extend(
                f"claims.{claim.id}.differs: missing; name the settings in which its arms may differ"
                for claim in values["claims"]
                if not claim.differs
            )
        if folder and values.get("slug", folder) != folder:
            problems.append(f"slug: got {values['slug']!r}; must be the name of its folder, {folder!r}")
        if 0 < values.get("authors_count", 0) < len(values.get("authors", ())):
            problems.append(f"authors_count: got {values['authors_count']}, but authors names {len(values['authors'])}")
        if problems:
            raise CardError(source, problems)
        return cls(**values)

    def bibtex(self) -> str:
        """The paper as a BibTeX entry.

        Authors that are not known by name are left to the reader: the entry says how many are missing.

        Examples:
            >>> from regularized.papers.catalogue import load_catalogue
            >>> print(load_catalogue()[0].card.bibtex().splitlines()[0].split("{")[0])
            @misc
        """
        fields = {"title": f"{{{_tex(self.title)}}}", "year": str(self.date.year), "month": str(self.date.month)}
        if self.authors:
            names = [_tex(name) for name in self.authors]
            fields["author"] = " and ".join([*names, "others"] if len(names) < self.authors_count else names)
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv", "url": f"https://arxiv.org/abs/{self.arxiv}"}
        if self.venue:
            fields["howpublished"] = _tex(self.venue)
        missing = "" if self.authors else "% the authors are not known here: complete this entry\n"
        body = "".join(f"  {key} = {{{value}}},\n" for key, value in sorted(fields.items()))
        return f"{missing}@misc{{{self.slug}_{self.date.year},\n{body}}}"


def _tex(text: str) -> str:
    return re.sub(r"([&%$#_])", r"\\\1", text)


# -- the schema ---------------------------------------------------------------------------------
#
# A check takes a value and returns what is allowed, as a phrase, or "" when the value is fine.

_Check: TypeAlias = Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class _Key:
    check: _Check
    required: bool = True
    convert: Callable[[Any], Any] = lambda value: value


def _text(pattern: str = "", allowed: str = "", *, empty: bool = False, one_line: bool = True, most: int = 0) -> _Check:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            return "a string"
        if not value.strip():
            return "" if empty else "a string that is not empty"
        if MARK in value:
            return "filled in"
        if one_line and "\n" in value:
            return "one line"
        if most and len(value) > most:
            return f"at most {most} characters, this has {len(value)}"
        return "" if not pattern or re.fullmatch(pattern, value) else allowed

    return check


def _one_of(*choices: str) -> _Check:
    return lambda value: "" if value in choices else "one of " + ", ".join(map(repr, choices))


def _texts(least: int, most: int | None, each: _Check) -> _Check:
    def check(value: Any) -> str:
        if not isinstance(value, list):
            return "a list of strings"
        if len(value) < least or (most is not None and len(value) > most):
            return f"{least} to {most} entries" if most is not None else f"at least {least} entries"
        for entry in value:
            if wrong := each(entry):
                return f"a list whose entries are {wrong}, unlike {entry!r}"
        lowered = [entry.lower() for entry in value]
        twice = [entry for entry in value if lowered.count(entry.lower()) > 1]
        return f"each entry once, unlike {twice[0]!r}" if twice else ""

    return check


def _whole(value: Any) -> str:
    return "" if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else "a whole number, 0 or more"


def _number(value: Any) -> str:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    return "" if fine and abs(value) <= sys.float_info.max else "a finite number"


def _positive(value: Any) -> str:
    return _number(value) or ("" if value > 0 else "a number above 0")


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _date(value: Any) -> str:
    plain = isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)
    return "" if plain else "a date without quotes, such as 2020-06-30"


_WORD = _text(r"[a-z][a-z0-9_]*", "lower-case letters, digits and underscores, a letter first")
_LINE = _text()
RESERVED = ("export", "import")
"""Names that no paper can have: words that stand in the place of one, as in `regularized ledger export`."""


def _slug(value: Any) -> str:
    return _WORD(value) or ("another name: it is a word of the commands" if value in RESERVED else "")


_MAYBE = _text(empty=True)
_PROSE = _text(one_line=False)

_CARD: Mapping[str, _Key] = {
    "slug": _Key(_slug),
    "title": _Key(_LINE),
    "date": _Key(_date),
    "arxiv": _Key(_text(r"\d{4}\.\d{4,5}", 'an arXiv identifier such as "2007.00151", or ""', empty=True)),
    "venue": _Key(_MAYBE),
    "authors": _Key(_texts(0, None, _LINE), convert=tuple),
    "authors_count": _Key(_whole),
    "organization": _Key(_MAYBE),
    "hardware": _Key(_MAYBE, required=False),
    "comments": _Key(_whole),
    "families": _Key(_texts(1, 4, _one_of(*FAMILIES)), convert=tuple),
    "tags": _Key(_texts(3, 8, _text(r"[^A-Z]+", "lower case")), convert=tuple),
    "problem": _Key(_text(most=160)),
    "searches": _Key(_texts(4, 10, _LINE), convert=tuple),
    "summary": _Key(_PROSE, convert=lambda value: " ".join(value.split())),
    "changes": _Key(_LINE),
    "needs": _Key(_texts(0, None, _LINE), convert=tuple),
    "when_to_use": _Key(_PROSE, convert=lambda value: " ".join(value.split())),
    "when_not_to_use": _Key(_PROSE, convert=lambda value: " ".join(value.split())),
    "unconfirmed": _Key(_texts(0, None, _LINE), required=False, convert=tuple),
}

_OFFICIAL: Mapping[str, _Key] = {
    "repository": _Key(_text(r"[\w.-]+/[\w.-]+|https?://\S+", '"owner/name" or an address')),
    "commit": _Key(_text(r"[0-9a-f]{7,40}", '7 to 40 hexadecimal digits, or ""', empty=True), required=False),
    "licence": _Key(_MAYBE, required=False),
    "note": _Key(_text(empty=True, one_line=False), required=False, convert=lambda value: " ".join(value.split())),
}

_BLOCKER: Mapping[str, _Key] = {
    "issue": _Key(lambda value: _whole(value) or ("" if value > 0 else "the number of an issue, 1 or more")),
    "breaks": _Key(_LINE),
}

_IMPLEMENTATION: Mapping[str, _Key] = {
    "names": _Key(
        _texts(1, None, _text(r"[a-z_]\w*(\.\w+)+", "fully qualified names such as 'regularized.family.module.Name'")),
        convert=tuple,
    ),
    "floor": _Key(_positive, convert=float),
    "floor_reason": _Key(_LINE),
}

_PAPER_SCALE: Mapping[str, _Key] = {
    "hours": _Key(_positive, convert=float),
    "each": _Key(_one_of("run", "comparison")),
    "source": _Key(_LINE),
}

_CLAIM: Mapping[str, _Key] = {
    "id": _Key(_WORD),
    "statement": _Key(_LINE),
    "metric": _Key(_LINE),
    "direction": _Key(_one_of("higher", "lower")),
    "baseline": _Key(_LINE),
    "method": _Key(_LINE),
    "smallest_effect": _Key(_number, required=False, convert=float),
    "differs": _Key(_texts(0, None, _LINE), required=False, convert=tuple),
    "relative": _Key(_flag, required=False),
    "kind": _Key(_one_of("claim", "sanity"), required=False),
    "pilot": _Key(_flag, required=False),
    "unit": _Key(_MAYBE, required=False),
    "scale": _Key(_one_of(*SCALES), required=False),
    "note": _Key(_MAYBE, required=False),
}

_REPORTED: Mapping[str, _Key] = {
    "setting": _Key(_LINE),
    "baseline": _Key(_number, required=False, convert=float),
    "method": _Key(_number, required=False, convert=float),
    "source": _Key(_LINE),
}

_EXEMPTION: Mapping[str, _Key] = {"check": _Key(_LINE), "reason": _Key(_LINE), "until": _Key(_LINE)}


def _read(
    data: Any, keys: Mapping[str, _Key], where: str, problems: list[str], tables: Sequence[str] = ()
) -> dict[str, Any]:
    """The valid values of a table, but for the ``tables`` inside it; what is wrong is added to ``problems``."""
    prefix = f"{where}." if where else ""
    if not isinstance(data, Mapping):
        problems.append(f"{where}: got {data!r}; must be a table")
        return {}
    values: dict[str, Any] = {}
    for name, key in keys.items():
        if name not in data:
            if key.required:
                problems.append(f"{prefix}{name}: missing; must be {key.check(None) or 'given'}")
        elif wrong := key.check(data[name]):
            problems.append(f"{prefix}{name}: got {_short(data[name])}; must be {wrong}")
        else:
            values[name] = key.convert(data[name])
    problems.extend(
        f"{prefix}{name}: unknown key; allowed: {', '.join([*keys, *tables])}"
        for name in data
        if name not in keys and name not in tables
    )
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _build(kind: type[Any], data: Any, where: str, keys: Mapping[str, _Key], problems: list[str]) -> Any:
    before = len(problems)
    values = _read(data, keys, where, problems)
    return kind(**values) if len(problems) == before else None


def _rows(
    data: Any, where: str, keys: Mapping[str, _Key], problems: list[str], tables: Sequence[str] = ()
) -> list[tuple[Mapping[str, Any], dict[str, Any]]]:
    """The tables of an array: as they stand, and their valid values."""
    if not isinstance(data, list) or not all(isinstance(table, Mapping) for table in data):
        problems.append(f"{where}: got {_short(data)}; must be an array of tables, [[{where}]]")
        return []
    return [
        (table, _read(table, keys, f"{where}.{table.get('id', number)}", problems, tables))
        for number, table in enumerate(data, start=1)
    ]


def _official(data: Any, problems: list[str]) -> Official | None:
    before = len(problems)
    values = _read(data, _OFFICIAL, "official", problems, tables=("blockers",))
    given = data.get("blockers", []) if isinstance(data, Mapping) else []
    rows = [values for _, values in _rows(given, "official.blockers", _BLOCKER, problems)]
    if given and "://" in str(values.get("repository", "")):
        problems.append("official.blockers: only a repository on GitHub, 'owner/name', has issues by number")
    if len(problems) > before:
        return None
    return Official(**values, blockers=tuple(Blocker(**row) for row in rows))


def _exceptions(data: Any, problems: list[str]) -> tuple[Exemption, ...]:
    before = len(problems)
    rows = _rows(data, "exceptions", _EXEMPTION, problems)
    return tuple(Exemption(**values) for _, values in rows) if len(problems) == before else ()


def _claims(data: Any, problems: list[str]) -> tuple[Claim, ...]:
    claims = []
    before = len(problems)
    for number, (table, values) in enumerate(_rows(data, "claims", _CLAIM, problems, tables=("reported",)), start=1):
        where = f"claims.{table.get('id', number)}.reported"
        numbers = [values for _, values in _rows(table.get("reported", []), where, _REPORTED, problems)]
        if len(problems) == before:
            reported = (Reported(n["setting"], n.get("baseline"), n.get("method"), n["source"]) for n in numbers)
            claims.append(Claim(**values, reported=tuple(reported)))
    ids = [claim.id for claim in claims]
    problems.extend(f"claims.{name}: this id is used twice" for name in sorted({i for i in ids if ids.count(i) > 1}))
    return tuple(claims)


def _main(arguments: Sequence[str]) -> int:
    if not arguments:
        print("usage: python -m regularized.papers.card FILE...", file=sys.stderr)
        return 2
    wrong = 0
    for name in arguments:
        try:
            Card.load(Path(name))
        except CardError as error:
            wrong += 1
            print(error, file=sys.stderr)
    print(f"{len(arguments) - wrong} of {len(arguments)} cards are valid")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
