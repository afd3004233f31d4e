"""The commands. Each imports what it needs when it runs: ``--help`` must not wait for torch."""

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from regularized.cli.checkout import needs_checkout
from regularized.cli.comparing import compare
from regularized.cli.errors import MEANING, CommandError, Exit, exit_of
from regularized.cli.output import console, emit_json, emit_table, in_terminal, note
from regularized.cli.site import register as register_site

if TYPE_CHECKING:
    from regularized.evidence.results import ReproduceResult
    from regularized.papers.catalogue import Entry

__all__ = ["app"]

SCHEMA_VERSION = 1
"""Raised when a key of any ``--json`` output is renamed or removed; new keys do not raise it."""


class _Commands(TyperGroup):
    """Turns errors that a person can mend into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            note(str(interrupt) or "interrupted")
            code = Exit.INTERRUPTED
        except Exception as error:
            known = exit_of(error)
            if known is None:
                raise
            note(f"error: {error}")
            code = known
        raise typer.Exit(int(code))


_CODES = "\n\n".join(f"{code.value}: {MEANING[code]}" for code in Exit)

app: typer.Typer = typer.Typer(
    name="regularized",
    cls=_Commands,
    help="Published techniques for regularized training that work, compose, and are proven: every paper is a command.",
    epilog=f"Exit codes:\n\n{_CODES}\n\nIn a terminal the commands print tables, in a pipe tab-separated values.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="Short name of a paper; `regularized papers` lists them.")]
MaybeSlug = Annotated[str | None, typer.Argument(metavar="[SLUG]", help="Short name of a paper; default all.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Parallel processes; default one for each core.")]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds that a run may take before it is ended; default any.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Make runs again that are stored already.")]


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version; with --json as JSON.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --version: as JSON.", hidden=True)] = False,
) -> None:
    """Print the version where it is asked for; otherwise the command follows."""
    if version:
        _print_version(as_json=as_json)
        raise typer.Exit
    if as_json:
        raise CommandError("--json goes after the command: regularized COMMAND --json", Exit.USAGE)


def _print_version(*, as_json: bool) -> None:
    from regularized._version import __version__

    if not as_json:
        print(f"regularized {__version__}")
        return
    import platform
    from importlib import metadata

    try:
        torch_version: str | None = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch_version = None
    about = {"name": "regularized", "version": __version__, "schema_version": SCHEMA_VERSION}
    emit_json({**about, "python": platform.python_version(), "torch": torch_version})


# -- find ---------------------------------------------------------------------------------------


papers_app: typer.Typer = typer.Typer(help="List or search the catalogue; get further papers in.")
app.add_typer(papers_app, name="papers")


@papers_app.callback(invoke_without_command=True)
def papers(
    ctx: typer.Context,
    search: Annotated[str, typer.Option("--search", "-s", help="Your problem, in your words.")] = "",
    family: Annotated[str, typer.Option(help="Only this problem family, for example noisy_labels.")] = "",
    implemented: Annotated[bool, typer.Option("--implemented", help="Only papers with code that runs.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many; default all.")] = None,
    as_json: Json = False,
) -> None:
    """List or search the catalogue, best first (without a search: best proven first)."""
    if ctx.invoked_subcommand is not None:
        return
    from regularized.papers.card import FAMILIES
    from regularized.papers.catalogue import load_catalogue
    from regularized.papers.search import explain
    from regularized.papers.search import search as look_up

    if family and family not in FAMILIES:
        raise CommandError(f"there is no family {family!r}; families: {', '.join(FAMILIES)}", Exit.USAGE)
    found = [
        entry
        for entry in look_up(search, load_catalogue())
        if (not family or family in entry.card.families) and (entry.implemented or not implemented)
    ][:limit]
    why = {entry.slug: explain(search, entry, load_catalogue()) for entry in found} if search.strip() else {}
    if as_json:
        emit_json([entry.to_dict() | ({"matched": why[entry.slug]} if why else {}) for entry in found])
        return
    if not found:
        note("nothing found; try fewer or other words" if search else "nothing found")
    columns: dict[str, Callable[[Entry], object]] = {
        "slug": lambda entry: entry.slug,
        "title": lambda entry: entry.card.title,
        "date": lambda entry: entry.card.date,
        "implemented": lambda entry: entry.implemented,
        "evidence": _verdicts,
        "problem": lambda entry: entry.card.problem,
        "matched": lambda entry: why[entry.slug],
    }
    left_out = {"title", "implemented"} if in_terminal() else set()
    shown = [name for name in columns if name not in left_out and (why or name != "matched")]
    emit_table(shown, [[columns[name](entry) for name in shown] for entry in found])


def _verdicts(entry: "Entry") -> str:
    """The verdicts of a paper, counted."""
    from regularized.evidence.claims import SHORT, count_verdicts

    counted = [f"{n} {SHORT[verdict]}" for verdict, n in count_verdicts(entry.outcomes).items() if n]
    return ", ".join(counted) or ("not run" if entry.implemented else "no code yet")


@app.command()
def show(
    slug: Slug,
    page: Annotated[
        bool, typer.Option("--page", help="Its page of the documentation: all knobs, hosts, costs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a paper: the problem that it solves, how to use it, and what was measured."""
    from regularized.cli.show import print_paper, to_json
    from regularized.papers.catalogue import find

    entry = find(slug)
    if page:
        from regularized.cli.page import filled_in, print_page

        if not entry.page:
            raise CommandError(f"{slug} has no page: {'; '.join(entry.missing) or 'nobody wrote one'}", Exit.NOT_FOUND)
        if as_json:
            emit_json({"slug": slug, "page": filled_in(entry)})
        else:
            print_page(entry, console())
    elif as_json:
        emit_json(to_json(entry))
    else:
        print_paper(entry, console())


@app.command()
def cite(
    slugs: Annotated[list[str], typer.Argument(metavar="SLUG...", help="Short names of papers.")],
    as_json: Json = False,
) -> None:
    """Print the papers as BibTeX entries."""
    from regularized.papers.catalogue import find

    entries = {entry.slug: entry.card.bibtex() for entry in map(find, slugs)}
    if as_json:
        emit_json([{"slug": slug, "bibtex": text} for slug, text in entries.items()])
    else:
        print("\n\n".join(entries.values()))


# -- trust --------------------------------------------------------------------------------------


@app.command()
def reproduce(
    slug: Slug,
    scale: Annotated[str, typer.Option(help="smoke (seconds), laptop (minutes), or paper (the original set-up).")] = (
        "laptop"
    ),
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many of the declared seeds; default all. Fewer give no verdict.")
    ] = None,
    arms: Annotated[
        str, typer.Option(help="Only these arms, with commas; claims about others are not shown. Default all.")
    ] = "",
    workers: Workers = None,
    fresh: Fresh = False,
    time_limit: TimeLimit = None,
    report: Annotated[Path | None, typer.Option(help="Folder of the report; default your data folder.")] = None,
    as_json: Json = False,
) -> None:
    """Run a paper's comparison and judge its claims; write report and plot.

    Runs are kept: the same command goes on where it was interrupted. Exits with 0 whatever the verdict is.
    """
    from regularized.evidence import report as reports
    from regularized.evidence.runner import reproduce as run

    entry = _implemented(slug)
    if report is not None:
        reports.prepare(report)  # before the runs: a place that was asked for must do
    result = _or_usage(
        run,
        slug,
        entry.module_name("experiment"),
        entry.card.claims,
        scale=scale,
        seeds=seeds,
        arms=[name.strip() for name in arms.split(",")] if arms else None,
        workers=workers,
        fresh=fresh,
        time_limit=time_limit,
    )
    unwritten = ""
    try:
        reports.write(result, report or reports.default_directory(slug, scale), title=entry.card.title)
    except reports.ReportError as error:  # what was measured is shown all the same
        unwritten = str(error)
    if as_json:
        emit_json(reports.to_json(result))
    elif in_terminal():
        reports.print_table(result, console())
    else:
        _print_claims(result)
        for text in result.notes:
            note(text)
    if unwritten:
        note(unwritten)
    elif not as_json:
        note(f"report with plots: {result.report}")
    if result.failures:
        failed = result.failures[0]
        raise CommandError(
            f"{len(result.failures)} of {len(result.runs) + len(result.failures)} runs failed; the first, arm "
            f"{failed.arm!r} with seed {failed.seed}: {failed.error}",
            Exit.FAILED,
        )
    if unwritten and report is not None:
        raise typer.Exit(int(Exit.FAILED))


def _print_claims(result: "ReproduceResult") -> None:
    from regularized.evidence.claims import reason_text

    columns = ["claim", "baseline", "method", "effect", "low", "high", "smallest_effect", "unit", "verdict", "reason"]
    rows = []
    for outcome in result.outcomes:
        claim = outcome.claim
        low, high = outcome.interval or (None, None)
        unit = "share" if claim.relative else claim.unit
        measured = [outcome.effect, low, high, claim.smallest_effect, unit, outcome.verdict.value, reason_text(outcome)]
        rows.append([claim.id, claim.baseline, claim.method, *measured])
    emit_table(columns, rows)


@app.command()
def tune(
    slug: Slug,
    workers: Workers = None,
    fresh: Fresh = False,
    time_limit: TimeLimit = None,
    as_json: Json = False,
) -> None:
    """Try the settings of a paper's arms: as many trials for each, on seeds that are no evidence."""
    from regularized.evidence.runner import tune as run

    entry = _implemented(slug)
    result = _or_usage(run, slug, entry.module_name("experiment"), workers=workers, fresh=fresh, time_limit=time_limit)
    if as_json:
        trials = [
            {
                "arm": trial.arm,
                "overrides": dict(trial.overrides),
                "values": list(trial.values),
                "mean": trial.mean,
                "best": trial.best,
            }
            for trial in result.trials
        ]
        head = {"slug": slug, "metric": result.metric, "direction": result.direction, "seeds": list(result.seeds)}
        emit_json({**head, "trials": trials, "agrees": dict(result.agrees), "seconds": result.seconds})
    else:
        rows = [
            [t.arm, ", ".join(f"{k}={v}" for k, v in t.overrides.items()), t.mean, "best" if t.best else ""]
            for t in result.trials
        ]
        emit_table(
            ["arm", "settings", f"{result.metric}>", "chosen"], rows, title=f"{slug}: {result.direction} is better"
        )
    for arm, agrees in result.agrees.items():
        if not agrees:
            note(f"arm {arm!r} of the experiment does not use its best settings {dict(result.best[arm])}")
    if result.failures:
        raise CommandError(f"{len(result.failures)} trials failed; the first: {result.failures[0].error}", Exit.FAILED)


@app.command()
def conform(
    slug: MaybeSlug = None,
    golden: Annotated[Path | None, typer.Option(help="Folder of SLUG.npz files; default the shipped ones.")] = None,
    as_json: Json = False,
) -> None:
    """Compare implementations with the golden vectors of the authors' code; exit 1 if any output disagrees."""
    from regularized.evidence.conformance import GoldenError
    from regularized.evidence.conformance import conform as compare

    parts = _Parts(slug, "conformance")
    if golden is not None and not golden.is_dir():
        raise CommandError(f"there is no folder {golden}", Exit.NOT_FOUND)
    rows, problems = [], []
    for entry, adapter in parts:
        path = entry.golden if golden is None else golden / f"{entry.slug}.npz"
        if golden is not None and not path.exists():
            if slug is not None:
                raise CommandError(f"there is no golden file {path}", Exit.NOT_FOUND)
            note(f"{entry.slug}: skipped, there is no {path}")
            continue
        try:
            rows.extend(compare(entry.slug, adapter, path))
        except GoldenError as error:
            problems.append(str(error))
            note(f"error: {error}")
    if as_json:
        emit_json([row.to_dict() for row in rows])
    else:
        columns = ["slug", "case", "output", "max_abs_error>", "max_rel_error>", "tolerance>", "ok"]
        emit_table(
            columns,
            [[r.slug, r.case, r.output, r.max_abs_error, r.max_rel_error, r.tolerance, r.ok] for r in rows],
        )
        for row in rows:
            if row.note:
                note(f"{row.slug} {row.case} {row.output}: {row.note}")
    if not rows and not problems and not parts.left_out:
        raise CommandError(
            f"nothing was compared: {golden or 'the catalogue'} has no golden file of these papers", Exit.NOT_FOUND
        )
    wrong = sum(not row.ok for row in rows)
    note(f"{len(rows) - wrong} of {len(rows)} outputs agree")
    parts.end(failed=bool(wrong or problems))


@app.command()
def contract(
    slug: MaybeSlug = None,
    module: Annotated[
        str, typer.Option("--module", help="A module of yours with a function subjects(), in place of the papers.")
    ] = "",
    save: Annotated[
        bool, typer.Option("--save", help="Write what came out beside the paper's contract, for the documentation.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check what every technique promises: that it bites, is deterministic, resumes exactly, ...; exit 1 if one fails.

    A check that does not apply says why; it counts neither as passed nor as failed.
    """
    from regularized.evidence.contract import Outcome, run
    from regularized.evidence.contract import save as save_outcomes

    if module and (slug or save):
        raise CommandError("--module goes without SLUG and --save: it is about a module of yours", Exit.USAGE)
    if save:
        needs_checkout("contract --save")
    found: list[Outcome] = []
    parts = _Parts(slug, "contract")
    for name, subjects, exceptions, home in _subjects_of_module(module) if module else _subjects_of_papers(parts):
        outcomes = []
        for outcome in run(name, subjects, exceptions=exceptions):
            outcomes.append(outcome)
            if outcome.status == "failed":
                note(f"{name}: {outcome.subject}: {outcome.check} failed: {outcome.reason}")
        if save and not any(outcome.status == "failed" for outcome in outcomes):
            note(f"saved {save_outcomes(outcomes, home)}")
        found += outcomes
    if as_json:
        emit_json([outcome.to_dict() for outcome in found])
    else:
        emit_table(
            ["slug", "subject", "check", "status", "reason"],
            [[o.slug, o.subject, o.check, o.status.replace("_", " "), o.reason] for o in found],
        )
    counted = Counter(outcome.status for outcome in found)
    note(", ".join(f"{number} {status.replace('_', ' ')}" for status, number in counted.items()))
    parts.end(failed=bool(counted["failed"]))


@app.command()
def bench(
    slug: MaybeSlug = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each size, which its processes share.")] = 12.0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Fresh processes for each size; default 5 with --save, otherwise 1.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; one is the quietest.")] = 1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, too, in processes of their own.")] = True,
    save: Annotated[
        bool, typer.Option("--save", help="Write the rows beside the paper's bench module, for the documentation.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what a technique costs: its step against a plain one, interleaved, beside the least possible ratio.

    Says so where a figure has left what was saved.
    """
    from regularized.evidence import bench_rows
    from regularized.evidence.bench import bench as measure

    if save:
        needs_checkout("bench --save")
    rows: list[bench_rows.BenchRow] = []

    def keep(row: bench_rows.BenchRow) -> None:
        rows.append(row)
        note(f"{row.slug}: {row.size}: {row.ratio:.3f}")

    parts = _Parts(slug, "bench")
    for entry, module in list(parts):  # all of them are loaded, and so found to be complete, before the first is timed
        implementation = entry.card.implementation
        try:
            measured = measure(
                entry.slug,
                module.__name__,
                floor=implementation.floor if implementation else None,
                seconds=seconds,
                processes=processes or (5 if save else 1),
                threads=threads,
                memory=memory,
                on_row=keep,
            )
        except (RuntimeError, ImportError) as error:  # what is measured by then is shown all the same
            parts.leave_out(entry.slug, error, what="failed")
            continue
        for text in bench_rows.departures(measured, bench_rows.load(entry.folder / "bench.json")):
            note(f"{entry.slug}: {text}")
        if save:
            note(f"saved {bench_rows.save(measured, module.__name__)}")
    if as_json:
        emit_json([row.to_dict() for row in rows])
    else:
        columns = [
            "slug",
            "size",
            "plain ms>",
            "method ms>",
            "ratio>",
            "low>",
            "high>",
            "floor>",
            "peak memory ratio>",
            "size ratio>",
        ]
        emit_table(
            columns,
            [
                [
                    r.slug,
                    r.size,
                    r.plain_ms,
                    r.method_ms,
                    r.ratio,
                    *r.ratio_interval,
                    r.floor,
                    r.peak_memory_ratio,
                    r.size_ratio,
                ]
                for r in rows
            ],
        )
    parts.end()


@app.command()
def rates(
    repetitions: Annotated[int, typer.Option(min=10, help="Simulated claims for each case.")] = 2000,
    save: Annotated[bool, typer.Option("--save", help="Write them beside the module, for the documentation.")] = False,
    comparison: Annotated[bool, typer.Option("--comparison", help="Of `compare` instead of the verdicts.")] = False,
    as_json: Json = False,
) -> None:
    """Simulate how often the rule for verdicts errs at the threshold, and how often it sees an effect above it.

    With --comparison: how often `compare` recommends one of seven useless candidates.
    """
    if save:
        needs_checkout("rates --save")
    if comparison:
        _comparison_rates(repetitions, save=save, as_json=as_json)
        return
    from regularized.evidence.rates import save as save_rates
    from regularized.evidence.rates import simulate

    simulated = simulate(repetitions=repetitions)
    if save:
        note(f"saved {save_rates(simulated, repetitions=repetitions)}")
    if as_json:
        emit_json([rate._asdict() for rate in simulated])
    else:
        rows = [[rate.case, rate.seeds, rate.rule, rate.share, rate.error] for rate in simulated]
        emit_table(["case", "seeds>", "rule", "holds>", "error>"], rows)


def _comparison_rates(repetitions: int, *, save: bool, as_json: bool) -> None:
    from regularized.evidence.comparison.rates import save as save_rates
    from regularized.evidence.comparison.rates import simulate

    simulated = simulate(repetitions=repetitions)
    if save:
        note(f"saved {save_rates(simulated)}")
    if as_json:
        emit_json([rate._asdict() for rate in simulated])
    else:
        rows = [[rate.case, rate.splits, rate.rule, rate.share, rate.repetitions] for rate in simulated]
        emit_table(["case", "splits>", "rule", "recommends>", "simulated>"], rows)


@app.command()
def ledger(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="[SLUG...]", help="Papers; default all.")] = None,
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm",
            help="Where only code changed: repeat one seed of every arm, and keep the other runs if it is equal to the "
            "last bit.",
        ),
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Make the runs of the laptop scale that are missing, and write the evidence that ships with the package.

    For developers, in a checkout without uncommitted changes to the code that is measured.
    """
    from regularized.evidence.ledger import LedgerError
    from regularized.evidence.recording import check_committed, record

    entries = [entry for slug in slugs for entry in _entries(slug)] if slugs else _entries(None)
    needs_checkout("ledger")
    for entry in entries:  # all of them before the first run, which may take hours
        check_committed(entry.slug, entry.module_name("experiment"))
    written: list[dict[str, str]] = []
    failed: list[str] = []
    for entry in entries:
        try:
            path = record(
                entry.slug, entry.module_name("experiment"), entry.card.claims, confirmed=confirm, workers=workers
            )
        except LedgerError as error:
            note(str(error))
            failed.append(entry.slug)
        else:
            written.append({"slug": entry.slug, "ledger": str(path)})
    if as_json:
        emit_json(written)
    else:
        emit_table(["slug", "ledger"], [[row["slug"], row["ledger"]] for row in written])
    if failed:
        raise CommandError(f"no ledger written for {', '.join(failed)}", Exit.FAILED)


# -- add ----------------------------------------------------------------------------------------


@app.command("new-paper")
def new_paper(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="Short name: lower-case letters, digits, underscores.")],
    family: Annotated[str, typer.Option(help="Problem family, which is the folder of the technique.")],
    title: Annotated[str, typer.Option(help="Exact title of the paper.")] = "",
    checkout: Annotated[Path, typer.Option(help="Root of the checkout.")] = Path(),
    as_json: Json = False,
) -> None:
    """Lay out the files of a new paper: they run as they are, and its test names each line to fill in."""
    from regularized.cli.scaffold import lay_out

    written = lay_out(slug, family=family, title=title, checkout=checkout)
    if as_json:
        emit_json([str(path) for path in written])
        return
    for path in written:
        print(path)
    note(
        f"Now fill in what says FILL IN; `pytest {written[-1]}` lists it. Put the golden vectors of the authors' code "
        f"into golden.npz beside the card. Then commit, and write the evidence: regularized ledger {slug}"
    )


# -- further commands ---------------------------------------------------------------------------

app.command()(compare)
register_site(app, papers_app)


# -- shared -------------------------------------------------------------------------------------


def _implemented(slug: str) -> "Entry":
    from regularized.papers.catalogue import find

    entry = find(slug)
    if not entry.implemented:
        raise CommandError(
            f"{slug} has no code that runs yet ({'; '.join(entry.missing)}). List papers that run: regularized papers "
            "--implemented",
            Exit.UNAVAILABLE,
        )
    return entry


def _entries(slug: str | None) -> Sequence["Entry"]:
    """The paper of a slug, or all that are implemented, by name."""
    if slug is not None:
        return [_implemented(slug)]
    from regularized.papers.catalogue import load_catalogue

    return sorted((entry for entry in load_catalogue() if entry.implemented), key=lambda entry: entry.slug)


class _Parts:
    """Modules of papers. Of all papers, one that does not load is told and left out; of one paper, it is an error.

    Args:
        slug: the paper; None for all.
        part: which module of its folder.

    Attributes:
        left_out: exit code of what kept a paper from taking part, by slug.
    """

    def __init__(self, slug: str | None, part: str) -> None:
        self._slug, self._part = slug, part
        self._entries = _entries(slug)
        self.left_out: dict[str, Exit] = {}

    def __iter__(self) -> Iterator[tuple["Entry", ModuleType]]:
        for entry in self._entries:
            try:
                module = importlib.import_module(entry.module_name(self._part))
            except Exception as error:
                if self._slug is not None:
                    raise
                self.leave_out(entry.slug, error)
            else:
                yield entry, module

    def leave_out(self, slug: str, error: Exception, *, what: str = "does not load") -> None:
        """Go on without a paper, and say why."""
        code = exit_of(error) or Exit.FAILED
        self.left_out[slug] = code
        if code is Exit.UNAVAILABLE:
            note(f"error: {slug} is left out: {error}")
        else:
            note(f"error: {slug} is left out, its {self._part} {what}: {type(error).__name__}: {error}")

    def end(self, *, failed: bool = False) -> None:
        """End the command with its exit code: 1 where something failed, 4 where all that was amiss is not here."""
        codes = {Exit.FAILED} if failed else set(self.left_out.values())
        if codes:
            raise typer.Exit(int(Exit.UNAVAILABLE if codes == {Exit.UNAVAILABLE} else Exit.FAILED))


def _subjects_of_papers(parts: _Parts) -> Iterator[tuple[str, Sequence[Any], Mapping[str, str], str]]:
    """Slug, subjects, the card's exceptions by check, and the name of the contract module of each paper."""
    for entry, module in parts:
        exceptions = {exception.check: exception.reason for exception in entry.card.exceptions}
        yield entry.slug, module.subjects(), exceptions, module.__name__


def _subjects_of_module(name: str) -> Iterator[tuple[str, Sequence[Any], Mapping[str, str], str]]:
    """The same for a module that is no paper's."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the module may lie in the working directory
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise CommandError(f"there is no module {name}, here or installed", Exit.NOT_FOUND) from error
    if not callable(getattr(module, "subjects", None)):
        raise CommandError(
            f"{name} has no function subjects() that returns a list of regularized.evidence.contract.Subject",
            Exit.USAGE,
        )
    yield name, module.subjects(), {}, name


def _or_usage(run: Any, *arguments: Any, **options: Any) -> Any:
    """Call the runner; what it refuses (a scale, seeds used for tuning) was asked for wrongly.

    Nothing else can raise these errors: experiments run in other processes, and their failures are results.
    """
    try:
        return run(*arguments, **options)
    except ValueError as error:
        raise CommandError(str(error), Exit.USAGE) from error
    except RuntimeError as error:
        if exit_of(error) is not None:
            raise
        raise CommandError(str(error), Exit.FAILED) from error
