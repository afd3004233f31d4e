"""A paper's evidence as one folder, or one zip, that a reviewer can attach and anybody can check.

``attempt.json`` holds all that a program needs; the other files say the same to people. Public names: :func:`write`,
:func:`maker_of_shipped`, :class:`BundleError`.
"""

import csv
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from regularized.evidence import report
from regularized.evidence.attempts.files import FILE
from regularized.evidence.attempts.form import Attempt, Maker
from regularized.evidence.attempts.kept import FOLDER
from regularized.evidence.claims import Outcome
from regularized.evidence.ledger import Ledger

__all__ = ["BundleError", "maker_of_shipped", "write"]

_SUMS = "SHA256SUMS"
_SAME_TIME = (1980, 1, 1, 0, 0, 0)  # equal evidence gives an equal zip

_README = Template("""\
# Evidence: $title

What `regularized` measured of this paper (`$slug`, $scale scale): $arms arms, each with the seeds $seeds.
Made by $by on $where; the last run ended on $day. The command: `$command`

## What is here

| file | what it holds |
|---|---|
| `attempt.json` | everything, for a program: each run with its values by seed, settings, claims, data, machine |
| `verdicts.json` | the verdict on each claim, computed from the runs |
| `values.csv` | each value of each run: arm, seed, metric, value |
| `claims.json` | what was to be shown, with the smallest effect that counts, and what the paper's abstract claims |
| `settings.json` | everything that each arm ran with, defaults included |
| `environment.json` | code key and commit, versions, processor, threads, fingerprint of the data of each run |
| `report.html` | all of it to read, with plots; it needs no other file and no network |
| `curves.png`, `curves.svg` | its learning curves, for slides and papers |
| `attempts/` | attempts of others at the same claims, where there are any |
| `SHA256SUMS` | checksums of the files above |

## How to check it

1. That nothing was changed on the way: `sha256sum --check SHA256SUMS`, in this folder.
2. That it fits the code: `pip install regularized` (package $package; commit `$commit`), then
   `regularized ledger import --check .` compares settings, seeds, data, metrics and code with those of your
   installation, computes the verdicts anew, and writes nothing. It believes no verdict that stands in a file.
3. That the runs are true, which no file can show: make some again. The first seed of every arm:
   `regularized reproduce $slug --scale $scale --seeds 1 --first $first`. On the same kind of processor with the same
   versions the numbers are equal to the last bit; another one rounds otherwise, and training makes much of little.

## What it says

A claim holds when its effect over the seeds is surely at least the smallest that counts: Student's t and, where each
seed has data of its own, the exact sign-flip test, at 2.5 %, corrected by Holm over all claims of the card. Seeds,
settings and thresholds were fixed before the runs; the documentation's page "How evidence works" has the rule.
The runs are of $scale scale: they say nothing of the paper's own scale, whose numbers stand beside ours in the report.
""")


class BundleError(OSError):
    """The folder or zip cannot be written where it was asked for."""


def maker_of_shipped(ledger: Ledger) -> Maker:
    """Who made the runs that ship."""
    about = ledger.environment
    return Maker(
        by="regularized",
        where=str(about.get("cpu", "")),
        when=max(run.created for run in ledger.runs),
        command=f"regularized ledger {ledger.slug}",
    )


def write(
    destination: Path,
    attempt: Attempt,
    outcomes: Sequence[Outcome],
    *,
    title: str,
    abstract: Sequence[dict[str, Any]] = (),
    others: Sequence[Attempt] = (),
) -> Path:
    """Write the evidence of an attempt.

    Args:
        destination: a folder that does not exist or is empty; or a file whose name ends in ``.zip``.
        attempt: the runs.
        outcomes: the claims of the card as they are to be shown.
        title: of the paper.
        abstract: what the paper's abstract claims, for JSON.
        others: attempts of others.

    Returns:
        The destination, absolute.

    Raises:
        BundleError: there is something already, or it cannot be written.
    """
    target = destination.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"{target} exists already; give another folder, or another name that ends in .zip")
    zipped = target.suffix.lower() == ".zip"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as made:
            folder = Path(made) / (target.stem if zipped else target.name)
            folder.mkdir()
            _fill(folder, attempt, outcomes, title=title, abstract=abstract, others=others)
            if zipped:
                packed = Path(made) / "packed.zip"
                _pack(folder, packed)
                packed.replace(target)
            else:
                if target.is_dir():
                    target.rmdir()
                shutil.move(folder, target)
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _fill(
    folder: Path,
    attempt: Attempt,
    outcomes: Sequence[Outcome],
    *,
    title: str,
    abstract: Sequence[dict[str, Any]],
    others: Sequence[Attempt],
) -> None:
    claims = [outcome.claim for outcome in outcomes]
    result = attempt.ledger.to_result(claims)
    judged = report.to_json(result)["claims"]
    result.outcomes = tuple(outcomes)
    report.write(result, folder, title=title)
    files = {
        FILE: attempt.text,
        "README.md": _readme(attempt, title),
        "verdicts.json": _json(judged),
        "claims.json": _json({"claims": [asdict(claim) for claim in claims], "abstract_claims": list(abstract)}),
        "settings.json": _json(attempt.ledger.settings),
        "environment.json": _json(_environment(attempt)),
        "values.csv": _values(attempt.ledger),
    }
    for other in others:
        files[f"{FOLDER}/{other.name}.json"] = other.text
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}"
        for path in _files(folder)
    ]
    (folder / _SUMS).write_text("\n".join(sums) + "\n", encoding="utf-8", newline="\n")


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _pack(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _files(folder):
            entry = zipfile.ZipInfo(path.relative_to(folder.parent).as_posix(), _SAME_TIME)
            entry.external_attr, entry.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())


def _readme(attempt: Attempt, title: str) -> str:
    ledger, maker = attempt.ledger, attempt.maker
    about = ledger.environment
    words = {
        "title": title,
        "slug": ledger.slug,
        "scale": ledger.scale,
        "arms": len(ledger.arms),
        "seeds": f"{ledger.seeds[0]} to {ledger.seeds[-1]}",
        "first": ledger.seeds[0],
        "by": maker.by,
        "where": maker.where or about.get("cpu", ""),
        "day": max(run.created[:10] for run in ledger.runs),
        "command": maker.command,
        "package": about.get("package", ""),
        "commit": about.get("commit") or "of the release",
    }
    # A name is text here, too: neither a heading nor a tag.
    escaped = {name: str(word).replace("&", "&amp;").replace("<", "&lt;") for name, word in words.items()}
    return _README.substitute(escaped)


def _environment(attempt: Attempt) -> dict[str, Any]:
    ledger = attempt.ledger
    return {
        "command": attempt.maker.command,
        "code_key": ledger.code_key,
        "versions": dict(ledger.runs[0].versions),
        "environments": attempt.data["environments"],
        "about": ledger.about,
        "data": {arm: {run.seed: run.data for run in ledger.runs if run.arm == arm} for arm in ledger.arms},
    }


def _values(ledger: Ledger) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["arm", "seed", "metric", "value"])
    for run in ledger.runs:
        rows.writerows([run.arm, run.seed, name, repr(value)] for name, value in run.metrics.items())
    return out.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"
