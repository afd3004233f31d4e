"""The catalogue: every paper that has a folder with a card, and what is known of it.

Nothing is listed anywhere: folders are scanned. Whether a paper is implemented is read off its files, and whether a
claim holds off its measured runs; reading both loads neither torch nor the paper's code, and is remembered until a file
changes (:mod:`regularized.papers.memory`)::

    for entry in load_catalogue():
        print(entry.card.title, entry.implemented, [outcome.verdict for outcome in entry.outcomes])

A paper whose card is wrong or not finished is left out with a warning; the others are as they were.

A catalogue of your own is a package of such folders: ``load_catalogue("my_papers")``.
"""

import ast
import difflib
import importlib.util
import logging
import os
import re
import symtable
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from regularized.evidence.claims import Attempted, Claim, Outcome, Verdict, count_verdicts
from regularized.papers.abstract import Sentence, load_abstract
from regularized.papers.card import Card, CardError
from regularized.papers.memory import Memory
from regularized.papers.proof import best_proven_first

if TYPE_CHECKING:
    from regularized.evidence.attempts.form import Attempt
    from regularized.evidence.ledger import Ledger

__all__ = ["Entry", "Measured", "UnknownPaper", "broken_cards", "find", "load_catalogue", "public_names"]

PACKAGE = "regularized.papers"
PARTS = ("experiment", "conformance", "bench", "contract")
"""Modules of an implemented paper's folder, without which it is not implemented."""

_ROOT = Path(__file__).parents[1]
_PYTHON = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

RECIPE = "recipe"
"""A further module: how the technique takes part in a comparison on anybody's data, or why it cannot."""

log: logging.Logger = logging.getLogger(__name__)


class UnknownPaper(LookupError):
    """There is no paper of this name; the message suggests what may have been meant.

    Args:
        slug: what was asked for.
        suggestions: slugs, nearest first.
    """

    def __init__(self, slug: str, suggestions: Sequence[str]) -> None:
        self.slug = slug
        self.suggestions: tuple[str, ...] = tuple(suggestions)
        meant = f" Did you mean {' or '.join(suggestions)}?" if suggestions else ""
        super().__init__(f"there is no paper {slug!r} in the catalogue.{meant} List them with: regularized papers")


class Measured(NamedTuple):
    """How shipped runs were made.

    Attributes:
        scale: their scale.
        seeds: how many.
        code_key: of the experiment's code at that time.
        environment: torch, processor, commit and Python of the first run.
    """

    scale: str
    seeds: int
    code_key: str
    environment: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Entry:
    """A paper of the catalogue.

    Args:
        card: its card.
        folder: where the card lies.
        package: the package that the folder belongs to.
        memory: what is known of the catalogue already.
    """

    card: Card
    folder: Path
    package: str = PACKAGE
    memory: Memory = field(default_factory=lambda: Memory(None, ""), repr=False)

    @property
    def slug(self) -> str:
        """Short name."""
        return self.card.slug

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """What is lacking before the paper counts as implemented; empty when nothing is."""
        return tuple(self.memory.recall(f"{self.slug} missing", self._find_missing))

    def _find_missing(self) -> list[str]:
        if self.card.implementation is None:
            return ["no [implementation] in card.toml"]
        files = [*(f"{part}.py" for part in PARTS), self.golden.name]
        absent = [f"no {name}" for name in files if not (self.folder / name).is_file()]
        return [*(f"no {name}" for name in self.card.implementation.names if not _defines(name)), *absent]

    @property
    def implemented(self) -> bool:
        """Whether code, experiment, checks, golden vectors and benchmark are there."""
        return not self.missing

    @property
    def golden(self) -> Path:
        """Golden vectors of the authors' code."""
        return self.folder / "golden.npz"

    @cached_property
    def abstract(self) -> tuple[Sentence, ...]:
        """What the paper's abstract claims, and what of it is tested; empty where nobody has listed it, or wrongly."""
        try:
            return load_abstract(self.folder, {claim.id for claim in self.card.claims})
        except CardError as error:
            log.warning("%s", error)
            return ()

    @property
    def ledger(self) -> Path:
        """Measured runs that ship with the package."""
        return self.folder / "ledger.json"

    @cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Each claim with its verdict from the shipped runs; ``not run`` without any, ``contested`` where attempts of
        other machines or persons are at odds with them or with each other."""
        judged = self.memory.recall(f"{self.slug} outcomes", lambda: [*map(_to_plain, self._judge())])
        return tuple(_from_plain(claim, plain) for claim, plain in zip(self.card.claims, judged, strict=True))

    def _judge(self) -> Sequence[Outcome]:
        from regularized.evidence.attempts.judging import together

        ledger = self.load_ledger()
        # Reading a ledger takes as long as judging it: what else is asked of it is found out on the way.
        self.memory.recall(f"{self.slug} measured", lambda: _head(ledger))
        return together(self.card.claims, ledger, self.load_attempts())

    @cached_property
    def measured(self) -> "Measured | None":
        """How the shipped runs were made; None without any."""
        found = self.memory.recall(f"{self.slug} measured", lambda: _head(self.load_ledger()))
        return None if found is None else Measured(**found)

    @cached_property
    def code_key(self) -> str:
        """Key of the experiment's code as it is now, see :func:`regularized.evidence.provenance.code_key`."""

        def find_out() -> str:
            from regularized.evidence.provenance import code_key

            return code_key(self.module_name("experiment"))

        found = self.memory.recall(f"{self.slug} code_key", find_out)
        self.memory.save()
        return found

    @property
    def knows_code_key(self) -> bool:
        """Whether :attr:`code_key` is remembered: else all code that the experiment reaches must be read."""
        return self.memory.knows(f"{self.slug} code_key")

    def load_ledger(self) -> "Ledger | None":
        """The shipped runs; None without any. A damaged ledger is reported by a warning, and counts as none."""
        if not self.ledger.is_file():
            return None
        from regularized.evidence.ledger import LedgerError, load

        try:
            return load(self.ledger)
        except LedgerError as error:
            log.warning("%s", error)
            return None

    def load_attempts(self) -> "tuple[Attempt, ...]":
        """Runs of other machines or persons beside the shipped ones; a damaged one is reported by a warning."""
        from regularized.evidence.attempts.kept import load

        return load(self.folder)

    @cached_property
    def page(self) -> str:
        """How to use it, when not, and what it costs, as Markdown; empty where there is none.

        In a checkout it lies among the documentation, in an installed package beside the code. What was measured stands
        there as markers such as ``{{ evidence:SLUG }}``, which whoever shows it fills in.
        """
        places = (_ROOT / "pages", _ROOT.parents[1] / "docs" / "techniques") if self.package == PACKAGE else ()
        for path in (self.folder / "page.md", *(place / f"{self.slug}.md" for place in places)):
            if path.is_file():
                return path.read_text(encoding="utf-8")
        return ""

    @cached_property
    def usage(self) -> str:
        """Code that trains with the technique, and prints what came of it: the first of its :attr:`page`.

        Without a page, import and example of the first public name; empty where it has none. Read off the source, so
        that showing it loads nothing.
        """
        if (block := _PYTHON.search(self.page)) is not None:
            return block["code"].rstrip()
        implementation = self.card.implementation
        module, _, name = implementation.names[0].rpartition(".") if implementation else ("", "", "")
        file = _home(module, name) if module else None
        if file is None:
            return ""
        for statement in _parsed(file, file.stat().st_mtime_ns).body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.name == name:
                example = _example(ast.get_docstring(statement) or "")
                return f"{_imports(example, module, file)}\n\n{example}" if example else ""
        return ""

    def module_name(self, part: str) -> str:
        """Dotted name of a module of the paper's folder, for example of its ``"experiment"``.

        Raises:
            ValueError: papers have no such module.
        """
        if part not in (*PARTS, RECIPE):
            raise ValueError(f"part must be one of {[*PARTS, RECIPE]}, got {part!r}")
        return f"{self.package}.{self.slug}.{part}"

    def experiment(self) -> ModuleType:
        """Load the claim as a runnable comparison, see :mod:`regularized.evidence.experiment`."""
        return self._load("experiment")

    def conformance(self) -> ModuleType:
        """Load the adapter to the golden vectors, see :mod:`regularized.evidence.conformance`."""
        return self._load("conformance")

    def bench(self) -> ModuleType:
        """Load the workloads, see :mod:`regularized.evidence.bench`."""
        return self._load("bench")

    def contract(self) -> ModuleType:
        """Load what the contract suite checks, see :mod:`regularized.evidence.contract`."""
        return self._load("contract")

    def _load(self, part: str) -> ModuleType:
        return importlib.import_module(self.module_name(part))

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON knows it."""
        card = self.card
        return {
            "slug": card.slug,
            "title": card.title,
            "date": card.date.isoformat(),
            "authors_count": card.authors_count,
            "organization": card.organization,
            "comments": card.comments,
            "families": list(card.families),
            "tags": list(card.tags),
            "implemented": self.implemented,
            "claims": [
                {"id": outcome.claim.id, "statement": outcome.claim.statement, "verdict": outcome.verdict.value}
                for outcome in self.outcomes
            ],
            "verdicts": {verdict.value: n for verdict, n in count_verdicts(self.outcomes).items()},
            "sanity": {verdict.value: n for verdict, n in count_verdicts(self.outcomes, kind="sanity").items()},
        }


def load_catalogue(package: str = PACKAGE) -> tuple[Entry, ...]:
    """Read all cards of a package, best proven first.

    The order is :func:`regularized.papers.proof.best_proven_first`; votes and comments have no say.

    Args:
        package: package whose folders are the papers; default this library's.

    Returns:
        The papers whose card can be read; each of the others costs a warning, once, and is in :func:`broken_cards`.

    Raises:
        ModuleNotFoundError: there is no such package.

    Examples:
        >>> catalogue = load_catalogue()
        >>> all(entry.slug == entry.folder.name for entry in catalogue)
        True
    """
    return _best_proven_first(package)


def broken_cards(package: str = PACKAGE) -> dict[str, CardError]:
    """What is wrong with the cards that cannot be read, by the names of their folders.

    Examples:
        >>> broken_cards()
        {}
    """
    return dict(_read_cards(package).broken)


class _Cards(NamedTuple):
    entries: tuple[Entry, ...]
    broken: dict[str, CardError]
    memory: Memory


@lru_cache(maxsize=8)
def _read_cards(package: str) -> _Cards:
    cards: dict[Path, Card] = {}
    broken: dict[str, CardError] = {}
    for folder in _folders(package):
        if (folder / "card.toml").is_file():
            try:
                cards[folder] = Card.load(folder / "card.toml")
            except CardError as error:
                broken[folder.name] = error
                log.warning("left out of the catalogue: %s", error)
    memory = Memory.of(package, _sources(package, cards.values()))
    return _Cards(tuple(Entry(card, folder, package, memory) for folder, card in cards.items()), broken, memory)


@lru_cache(maxsize=8)
def _best_proven_first(package: str) -> tuple[Entry, ...]:
    cards = _read_cards(package)
    found = tuple(sorted(cards.entries, key=best_proven_first))
    cards.memory.save()
    return found


def _sources(package: str, cards: Iterable[Card]) -> Iterator[Path]:
    """Folders of the packages that have a say in what is known of papers: ours, theirs, and those of their code."""
    names = [name for card in cards if card.implementation for name in card.implementation.names]
    for top in sorted({name.partition(".")[0] for name in [__name__, package, *names]}):
        file = _module_file(top)
        if file is None:
            yield Path(os.devnull, top)  # what is not there today may be there tomorrow
        else:
            yield file.parent if file.name == "__init__.py" else file


def find(slug: str, package: str = PACKAGE) -> Entry:
    """The paper of this slug.

    Raises:
        UnknownPaper: there is none; its message suggests the nearest.
        CardError: there is one, and its card is wrong; the message names every problem.

    Examples:
        >>> entry = load_catalogue()[0]
        >>> find(entry.slug) is entry
        True
        >>> try:
        ...     find(entry.slug[:-1] + "x")
        ... except UnknownPaper as error:
        ...     error.suggestions[0] == entry.slug
        True
    """
    catalogue = load_catalogue(package)
    for entry in catalogue:
        if entry.slug == slug:
            return entry
    if slug in (broken := _read_cards(package).broken):
        raise broken[slug]
    raise UnknownPaper(slug, _nearest(slug, catalogue))


def public_names(package: str = PACKAGE) -> dict[str, str]:
    """Public names of all techniques, with the module that defines each.

    A name that two papers give to different things is left out with a warning: neither may hide the other.

    Examples:
        >>> all(module.startswith("regularized.") for module in public_names().values())
        True
    """
    return dict(_public_names(package))


@lru_cache(maxsize=8)
def _public_names(package: str) -> dict[str, str]:
    modules: dict[str, set[str]] = {}
    for entry in _read_cards(package).entries:
        for qualified in entry.card.implementation.names if entry.card.implementation else ():
            module, _, name = qualified.rpartition(".")
            modules.setdefault(name, set()).add(module)
    for name, owners in modules.items():
        if len(owners) > 1:
            log.warning("%r is a name of %s: import it from there", name, " and of ".join(sorted(owners)))
    return {name: min(owners) for name, owners in modules.items() if len(owners) == 1}


def _head(ledger: "Ledger | None") -> dict[str, Any] | None:
    """What :class:`Measured` holds, as JSON knows it."""
    if ledger is None:
        return None
    environment = {name: str(ledger.environment.get(name, "")) for name in ("torch", "cpu", "commit", "python")}
    return {"scale": ledger.scale, "seeds": len(ledger.seeds), "code_key": ledger.code_key, "environment": environment}


def _to_plain(outcome: Outcome) -> dict[str, Any]:
    """An outcome without its claim, as JSON knows it."""
    plain = {part.name: getattr(outcome, part.name) for part in fields(outcome) if part.name != "claim"}
    plain["attempts"] = [one.to_dict() for one in outcome.attempts]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _from_plain(claim: Claim, plain: Mapping[str, Any]) -> Outcome:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
    attempts = tuple(map(Attempted.from_dict, plain["attempts"]))
    return Outcome(claim, **{**values, "verdict": Verdict(plain["verdict"]), "attempts": attempts})


def _folders(package: str) -> list[Path]:
    # Not importlib.resources: golden files and ledgers are opened by path, and so must be files on a disk anyway.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"there is no package {package!r}", name=package)
    return sorted(path for root in spec.submodule_search_locations for path in Path(root).iterdir() if path.is_dir())


def _nearest(slug: str, catalogue: Iterable[Entry]) -> list[str]:
    asked = slug.strip().lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(asked, [entry.slug for entry in catalogue], n=3, cutoff=0.6)
    if close:
        return close
    from regularized.papers.search import search

    return [entry.slug for entry in search(slug, catalogue)[:2]]


def _defines(qualified: str) -> bool:
    """Whether the module of a fully qualified name defines it or passes it on, without importing anything of it."""
    module, _, name = qualified.rpartition(".")
    return _home(module, name) is not None


def _home(module: str, name: str) -> Path | None:
    """The file that defines a name: of the module that is named, or of that which its package has it from."""
    seen: set[tuple[str, str]] = set()
    while (module, name) not in seen and (file := _module_file(module)) is not None:
        seen.add((module, name))
        modified = file.stat().st_mtime_ns
        if name in _defined(file, modified):
            return file
        # Only packages are parsed: their files are small.
        for statement in _parsed(file, modified).body if file.name == "__init__.py" else ():
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name and statement.module and not statement.level:
                        module, name = statement.module, alias.name
    return None


def _module_file(module: str) -> Path | None:
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # __main__ of some programs
        return None
    if spec is None or spec.origin is None:
        return None
    # Only the top package is looked up by the import system: that of a submodule would import its parents.
    path = Path(spec.origin).parent.joinpath(*rest) if rest else Path(spec.origin)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file if file.is_file() else None


@lru_cache(maxsize=256)
def _parsed(file: Path, _modified: int) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError):  # of which ValueError: no UTF-8, or a zero byte
        return ast.Module(body=[], type_ignores=[])


@lru_cache(maxsize=1024)
def _defined(file: Path, _modified: int) -> frozenset[str]:
    """What a module defines itself. By its symbol table, which is made four times as fast as a syntax tree."""
    try:
        table = symtable.symtable(file.read_text(encoding="utf-8"), str(file), "exec")
    except (SyntaxError, ValueError, RecursionError):  # as above
        return frozenset()
    return frozenset(symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned())


def _example(docstring: str) -> str:
    """The code of a docstring's first example, without prompts and results.

    Examples:
        >>> print(_example("Text.\\n\\n>>> x = [\\n...     1]\\n>>> x\\n[1]\\n\\n>>> another"))
        x = [
            1]
        x
    """
    lines: list[str] = []
    for line in map(str.strip, docstring.splitlines()):
        if line.startswith((">>> ", "... ")) or line in (">>>", "..."):
            lines.append(line[4:])
        elif lines and not line:
            break
    return "\n".join(lines)


def _imports(example: str, module: str, file: Path) -> str:
    """Imports that an example needs: of names of its module, and of those that its module imports itself."""
    try:
        nodes = list(ast.walk(ast.parse(example)))
    except (SyntaxError, ValueError):
        return ""
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    needed = {node.id for node in nodes if isinstance(node, ast.Name)} - bound
    lines = []
    modified = file.stat().st_mtime_ns
    for statement in _parsed(file, modified).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            names = [alias for alias in statement.names if (alias.asname or alias.name) in needed]
            if names:
                used = type(statement)(**{**dict(ast.iter_fields(statement)), "names": names})
                lines.append(ast.unparse(used))
    if own := sorted(needed & _defined(file, modified)):
        lines.append(f"from {module} import {', '.join(own)}")
    return "\n".join(sorted(lines, key=lambda line: ("regularized" in line, line.startswith("from"), line)))
