"""Evidence that ships with the package: the ledgers, how often the rule errs, and what fresh seeds would decide."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regularized.cli.checkout import needs_checkout
from regularized.cli.errors import CommandError, Exit
from regularized.cli.options import Engine, EngineName, Gpus, Json, Workers, on_engine
from regularized.cli.output import emit_json, emit_table, note
from regularized.cli.selection import entries

__all__ = ["ledger", "outlook", "rates"]


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
        from regularized.evidence.comparison import rates as simulation

        simulated = simulation.simulate(repetitions=repetitions)
        saved = simulation.save(simulated) if save else None
        columns = {
            "case": "case",
            "splits": "splits>",
            "rule": "rule",
            "share": "recommends>",
            "repetitions": "simulated>",
        }
        _tell([rate._asdict() for rate in simulated], columns, saved=saved, as_json=as_json)
    else:
        from regularized.evidence import rates as verdicts

        found = verdicts.simulate(repetitions=repetitions)
        saved = verdicts.save(found, repetitions=repetitions) if save else None
        columns = {"case": "case", "seeds": "seeds>", "rule": "rule", "share": "holds>", "error": "error>"}
        _tell([rate._asdict() for rate in found], columns, saved=saved, as_json=as_json)


def outlook(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="[SLUG...]", help="Papers; default all.")] = None,
    seeds: Annotated[int, typer.Option(min=10, help="How many fresh seeds.")] = 20,
    share: Annotated[
        float,
        typer.Option(min=0.0, max=0.99, help="Of a large set, what one seed gets; default what is known."),
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """How likely so many fresh seeds give a verdict to each claim that is open: to be said before they are run."""
    from regularized.evidence.outlook import chances_of_a_verdict

    chosen = [entry for slug in slugs for entry in entries(slug)] if slugs else entries(None)
    rows = [
        {"slug": entry.slug, **chance._asdict()}
        for entry in chosen
        for chance in chances_of_a_verdict(entry.outcomes, seeds=seeds, share=share)
    ]
    columns = {"slug": "slug", "claim": "claim", "seeds": "seeds>", "decided": "decided>", "likeliest": "likeliest"}
    _tell(rows, columns, saved=None, as_json=as_json)


def _tell(found: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, saved: Path | None, as_json: bool) -> None:
    """As JSON or as a table, whose columns have headings by the name of what stands in them."""
    if saved is not None:
        note(f"saved {saved}")
    if as_json:
        emit_json(found)
    else:
        emit_table(list(columns.values()), [[rate[name] for name in columns] for rate in found])


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
    beside: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="With --confirm, on a machine that rounds otherwise than the ledger's: a checkout of the code of the "
            "ledger, which is run here, too, and compared with.",
        ),
    ] = None,
    workers: Workers = None,
    engine: Engine = EngineName.LOCAL,
    gpus: Gpus = 0,
    as_json: Json = False,
) -> None:
    """Make the runs of the laptop scale that are missing, and write the evidence that ships with the package.

    For developers, in a checkout without uncommitted changes to the code that is measured. `ledger export` writes a
    paper's evidence as a folder to attach, `ledger import` keeps that of others.
    """
    from regularized.evidence.ledger import LedgerError
    from regularized.evidence.recording import check_committed, record

    chosen = [entry for slug in slugs for entry in entries(slug)] if slugs else entries(None)
    needs_checkout("ledger")
    for entry in chosen:  # all of them before the first run, which may take hours
        check_committed(entry.slug, entry.module_name("experiment"))
    where = on_engine(engine, gpus)
    written: list[dict[str, str]] = []
    failed: list[str] = []
    for entry in chosen:
        try:
            path = record(
                entry.slug,
                entry.module_name("experiment"),
                entry.card.claims,
                confirmed=confirm,
                beside=beside,
                workers=workers,
                **where,
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
