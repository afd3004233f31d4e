"""Whether a text is an attempt at all: every key known, every string printable, every number finite, all of it small.

What passes can be shown and judged; whether it belongs to a paper of this package is asked by
:mod:`regularized.evidence.attempts.fitting`. Public names: :class:`Attempt`, :class:`Maker`, :func:`parse`,
:func:`of_data`.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from regularized.evidence.attempts.files import AttemptError, shown
from regularized.evidence.ledger import CONFIRMED, FORMAT, RUN_KEYS, Ledger, laid_out
from regularized.evidence.ledger import parse as parse_ledger
from regularized.evidence.store import canonical

__all__ = ["ENVIRONMENT", "VERSIONS", "Attempt", "Maker", "of_data", "parse"]

VERSIONS = ("python", "torch", "numpy", "scikit-learn")
"""What :func:`regularized.evidence.provenance.versions` names."""

ENVIRONMENT: Mapping[str, type] = {
    **dict.fromkeys(
        ("package", "commit", "python", "torch", "numpy", "scikit-learn", "platform", "cpu", "device"), str
    ),
    **{"dirty": bool, "cores": int, "threads": int},
}
"""What :func:`regularized.evidence.provenance.environment` names."""

_KEYS = {
    *("format", "slug", "scale", "seeds", "why_seeds", "arms", "code_key", "versions", "settings", "about", "claims"),
    *("tuning", "tuned_settings", "environments", "runs", "tuning_runs", "attempt"),
}
_ABOUT = {"data", "samples", "model", "weights", "resplit", "sampling", "toy"}
_LONGEST = {"by": 80, "where": 160, "note": 600, "command": 300, "when": 40}
_LONGEST_TEXT = 1000
_DEEPEST = 8
_MOST_PROBLEMS = 20
_SMALLEST, _LARGEST = 1e-100, 2.0**63  # what effects, their squares and their shares of a baseline are computed from
_WORD = re.compile(r"[a-z][a-z0-9_]{0,79}")
_KEY = re.compile(r"[0-9a-f]{16}")
_COMMIT = re.compile(r"(?:[0-9a-f]{7,64})?")
_VERSION = re.compile(r"[0-9][\w.+!-]{0,39}", re.ASCII)
_NAME = re.compile(r".{1,120}")


@dataclass(frozen=True, slots=True)
class Maker:
    """Who made an attempt, and how; free text of a stranger, printable and short.

    Args:
        by: a name, of a person or a group.
        where: the machine, or the institution.
        when: ISO 8601 in UTC.
        note: what else a reader should know.
        command: by which the runs were made.
    """

    by: str
    where: str = ""
    when: str = ""
    note: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A ledger of another machine or person.

    Args:
        maker: who made it.
        ledger: its runs.
        data: all of it as plain data.
    """

    maker: Maker
    ledger: Ledger
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name for its file: the maker's in plain letters, and eight digits of a hash of the evidence."""
        plain = unicodedata.normalize("NFKD", self.maker.by).encode("ascii", "ignore").decode().lower()
        words = re.sub(r"[^a-z0-9]+", "-", plain)[:40].strip("-") or "attempt"
        measured = canonical({name: value for name, value in self.data.items() if name != "attempt"})
        return f"{words}-{hashlib.sha256(measured.encode()).hexdigest()[:8]}"

    @property
    def text(self) -> str:
        """The file, in the layout of a ledger."""
        return laid_out(self.data)


def of_data(ledger: Mapping[str, Any], maker: Maker) -> Attempt:
    """An attempt from the plain data of a ledger.

    Args:
        ledger: what :func:`regularized.evidence.ledger.collect` gives.
        maker: who made it.

    Raises:
        AttemptError: it does not have the form of one; above all a maker's text that is too long or not printable.
    """
    return parse(laid_out({**ledger, "attempt": asdict(maker)}))


def parse(text: str) -> Attempt:
    """Read an attempt.

    Args:
        text: of a file that may come from anybody.

    Raises:
        AttemptError: says of each field that is wrong what was given and what is needed.

    Examples:
        >>> parse('{"format": 2, "slug": "x", "extra": 1}')  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        regularized.evidence.attempts.files.AttemptError: 'extra': is no field; ...
    """
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except AttemptError:
        raise
    except RecursionError:
        raise AttemptError(["the file: is nested too deeply"]) from None
    except ValueError as error:  # also of whole numbers with thousands of digits
        raise AttemptError([f"the file: must be JSON ({shown(str(error))})"]) from None
    # One after the other: what a later check reads, an earlier one has found to be there.
    for check in (_values, _fields, _head, _environments, _maker, _runs):
        if problems := _first(check(data)):
            raise AttemptError(problems)
    try:
        ledger = parse_ledger(data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise AttemptError([f"the file: {type(error).__name__}: {shown(str(error))}"]) from None
    return Attempt(Maker(**data["attempt"]), ledger, data)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise AttemptError([f"{shown(next(name for name in names if names.count(name) > 1))}: is there twice"])
    return found


def _no_number(name: str) -> float:
    raise AttemptError([f"the file: {name} is no JSON; a value of a run that diverged is null"])


def _first(problems: Iterator[str]) -> list[str]:
    """So many as a person reads."""
    found: list[str] = []
    for problem in problems:
        if len(found) == _MOST_PROBLEMS:
            return [*found, "and more"]
        found.append(problem)
    return found


def _values(value: Any, field: str = "the file", depth: int = 0) -> Iterator[str]:
    """Whatever it is, and wherever it stands: it can be shown and computed with."""
    if depth > _DEEPEST:
        yield f"{field}: is nested too deeply; at most {_DEEPEST} levels are allowed"
    elif isinstance(value, str):
        if not value.isprintable() or len(value) > _LONGEST_TEXT:
            yield f"{field}: got {shown(value)}; must be printable, in one line, of at most {_LONGEST_TEXT} characters"
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _values(name, f"a key of {field}")
            yield from _values(inner, shown(name) if field == "the file" else f"{field}.{shown(name)}", depth + 1)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _values(inner, f"{field}[{place}]", depth + 1)
    elif isinstance(value, int | float) and value != 0 and not _SMALLEST < abs(value) < _LARGEST:
        yield f"{field}: got {shown(value)}; must be a number of ordinary size: {_SMALLEST} to {_LARGEST:.0e}, or 0"


def _fields(data: Any) -> Iterator[str]:
    if not isinstance(data, Mapping):
        yield f"the file: must be a JSON object, got {type(data).__name__}"
        return
    yield from _exactly("", data, _KEYS)


def _exactly(field: str, given: Mapping[str, Any], needed: set[str]) -> Iterator[str]:
    inside = f" of {field}" if field else ""
    for name in sorted(given.keys() - needed):
        yield f"{shown(name)}: is no field{inside}; there are {sorted(needed)}"
    for name in sorted(needed - given.keys()):
        yield f"{name!r}: is missing{inside}"


def _head(data: Mapping[str, Any]) -> Iterator[str]:
    if data["format"] != FORMAT or isinstance(data["format"], bool):
        yield f"format: got {shown(data['format'])}; this version of regularized reads {FORMAT}"
    yield from _match("slug", data["slug"], _WORD, "the short name of a paper")
    yield from _match("scale", data["scale"], _WORD, "the name of a scale")
    yield from _match("code_key", data["code_key"], _KEY, "16 hexadecimal digits")
    yield from _is("why_seeds", data["why_seeds"], str)
    for name, what, most in (("seeds", int, 100), ("arms", str, 200)):
        given = data[name]
        if not _list_of(given, what) or not 0 < len(given) <= most or len(set(given)) < len(given):
            needed = "whole numbers" if what is int else "names"
            yield f"{name}: got {shown(given)}; must be 1 to {most} {needed}, each once"
    if not isinstance(data["versions"], Mapping):
        yield f"versions: got {shown(data['versions'])}; must name {list(VERSIONS)}"
    else:
        yield from _exactly("versions", data["versions"], set(VERSIONS))
        for name, version in data["versions"].items():
            yield from _match(f"versions.{shown(name)}", version, _VERSION, "a version")
    for name in ("settings", "about", "claims", "tuned_settings"):
        given = data[name]
        if not isinstance(given, Mapping) or not all(isinstance(inner, Mapping) for inner in given.values()):
            yield f"{name}: got {shown(given)}; must be an object of objects"
            return
    for name in ("settings", "about"):
        if list(data[name]) != data["arms"]:
            yield f"{name}: got {shown(list(data[name]))}; must have an object for each of arms, in their order"
    for arm, about in data["about"].items():
        yield from _exactly(f"about.{shown(arm)}", about, _ABOUT | ({"share"} & about.keys()))
        if not _is_number(about.get("resplit", 0)) or about.get("resplit", 0) < 0:
            yield f"about.{shown(arm)}.resplit: got {shown(about['resplit'])}; must be a share"
        if not _is_number(about.get("share", 0)) or not 0 <= about.get("share", 0) < 1:
            yield f"about.{shown(arm)}.share: got {shown(about['share'])}; must be from 0 to below 1"
    if data["tuning"] is not None:
        if not isinstance(data["tuning"], Mapping):
            yield f"tuning: got {shown(data['tuning'])}; must be null or an object"
        else:
            yield from _exactly("tuning", data["tuning"], {"metric", "direction", "scale", "seeds"})


def _environments(data: Mapping[str, Any]) -> Iterator[str]:
    given = data["environments"]
    if not _list_of(given, Mapping) or not 0 < len(given) <= 1000:
        yield f"environments: got {shown(given)}; must be 1 to 1000 objects"
        return
    for place, about in enumerate(given):
        field = f"environments[{place}]"
        yield from _exactly(field, {name: v for name, v in about.items() if name != CONFIRMED}, set(ENVIRONMENT))
        for name, kind in ENVIRONMENT.items():
            if name in about:
                yield from _is(f"{field}.{name}", about[name], kind)
        if about.get("dirty"):
            yield f"{field}.dirty: got true; runs of uncommitted code are no evidence: commit, then make them again"
        yield from _match(f"{field}.commit", about.get("commit"), _COMMIT, "a commit, or empty")
        for name in VERSIONS:
            whole, part = about.get(name), data["versions"][name]
            if whole != part and not (name == "python" and str(whole).startswith(f"{part}.")):
                yield f"{field}.{name}: got {shown(whole)}; must be that of versions, {shown(part)}"
        history = about.get(CONFIRMED, [])
        if not _list_of(history, Mapping) or not all(
            {"at", "from", "to", "arms"} <= one.keys() and _list_of(one["arms"], str) for one in history
        ):
            yield f"{field}.{CONFIRMED}: got {shown(history)}; must be a list of confirmations"


def _maker(data: Mapping[str, Any]) -> Iterator[str]:
    given = data["attempt"]
    if not isinstance(given, Mapping):
        yield f"attempt: got {shown(given)}; must say by, where, when, note, command"
        return
    yield from _exactly("attempt", given, set(_LONGEST))
    for name, most in _LONGEST.items():
        text = given.get(name, "")
        if not isinstance(text, str) or len(text) > most or text != text.strip():
            yield f"attempt.{name}: got {shown(text)}; must be a text of at most {most} characters"
    if not given.get("by"):
        yield "attempt.by: is empty; must say who made it"
    yield from _moment("attempt.when", given.get("when"))


def _runs(data: Mapping[str, Any]) -> Iterator[str]:
    for name, most in (("runs", 5000), ("tuning_runs", 5000)):
        rows = data[name]
        if not _list_of(rows, Mapping) or len(rows) > most:
            yield f"{name}: got {shown(rows)}; must be at most {most} objects"
            return
        problems = [problem for place, row in enumerate(rows) for problem in _row(f"{name}[{place}]", row, data)]
        if problems:
            yield from problems
            return
    made = [(row["arm"], row["seed"]) for row in data["runs"]]
    needed = [(arm, seed) for arm in data["arms"] for seed in data["seeds"]]
    if made != needed:
        missing = sorted(set(needed) - set(made))
        yield (
            f"runs: got {len(made)}; needed is one of each arm with each declared seed, in their order"
            f"{f'; missing {shown(missing)}' if missing else ''}"
        )
    for place, row in enumerate(data["tuning_runs"]):
        if row["arm"] not in data["tuned_settings"]:
            yield f"tuning_runs[{place}].arm: got {shown(row['arm'])}; must be one of tuned_settings"


def _row(field: str, row: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    yield from _exactly(field, row, {*RUN_KEYS, "environment"})
    if {*RUN_KEYS, "environment"} - row.keys():
        return
    yield from _is(f"{field}.arm", row["arm"], str)
    yield from _is(f"{field}.seed", row["seed"], int)
    yield from _match(f"{field}.data", row["data"], re.compile(r"[\w. -]{1,80}", re.ASCII), "a fingerprint of data")
    yield from _is(f"{field}.curve_unit", row["curve_unit"], str)
    if not isinstance(row["overrides"], Mapping) or (row["overrides"] and field.startswith("runs")):
        yield f"{field}.overrides: got {shown(row['overrides'])}; must be {{}}: settings are those of the arm"
    if not _is_number(row["seconds"]) or row["seconds"] < 0:
        yield f"{field}.seconds: got {shown(row['seconds'])}; must be seconds"
    if not _is_kind(row["peak_memory"], int) or row["peak_memory"] < 0:
        yield f"{field}.peak_memory: got {shown(row['peak_memory'])}; must be bytes"
    if not _is_kind(row["environment"], int) or not 0 <= row["environment"] < len(data["environments"]):
        yield f"{field}.environment: got {shown(row['environment'])}; must be a place in environments"
    yield from _moment(f"{field}.created", row["created"])
    if not isinstance(row["metrics"], Mapping) or not isinstance(row["curves"], Mapping):
        yield f"{field}: metrics and curves must be objects"
        return
    for name, value in row["metrics"].items():
        yield from _match(f"{field}: a metric", name, _NAME, "a name")
        if value is not None and not _is_number(value):
            yield f"{field}.metrics.{shown(name)}: got {shown(value)}; must be a number, or null where it diverged"
    for name, points in row["curves"].items():
        yield from _match(f"{field}: a curve", name, _NAME, "a name")
        if not isinstance(points, list) or len(points) > 60 or not all(_is_point(point) for point in points):
            yield f"{field}.curves.{shown(name)}: got {shown(points)}; must be at most 60 points [x, y]"


def _is_point(point: Any) -> bool:
    return (
        isinstance(point, list)
        and len(point) == 2
        and _is_number(point[0])
        and (point[1] is None or _is_number(point[1]))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_kind(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(_is_kind(inner, kind) for inner in value)


def _is(field: str, value: Any, kind: type) -> Iterator[str]:
    if not _is_kind(value, kind):
        names = {str: "a text", int: "a whole number", bool: "true or false"}
        yield f"{field}: got {shown(value)}; must be {names[kind]}"


def _match(field: str, value: Any, pattern: re.Pattern[str], needed: str) -> Iterator[str]:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        yield f"{field}: got {shown(value)}; must be {needed}"


def _moment(field: str, value: Any) -> Iterator[str]:
    try:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        moment.astimezone(UTC)
    except (ValueError, TypeError, OverflowError):
        yield f"{field}: got {shown(value)}; must be a moment such as 2026-03-02T12:00:00+00:00"
