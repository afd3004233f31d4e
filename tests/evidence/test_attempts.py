"""Evidence of other machines and persons: hostile files, what fits, and claims on which attempts disagree."""

import hashlib
import importlib
import json
import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from regularized.cli import attempts as commands
from regularized.cli.app import app
from regularized.cli.errors import CommandError
from regularized.cli.scaffold import lay_out
from regularized.evidence import ledger, provenance, report
from regularized.evidence.attempts import bundle, files, fitting, form, judging, kept
from regularized.evidence.attempts.files import AttemptError
from regularized.evidence.claims import Attempted, Claim, Outcome, Verdict, count_verdicts, reason_text
from regularized.evidence.experiment import block_of, resolve
from regularized.evidence.provenance import code_key, environment, versions
from regularized.papers.card import Card, CardError

NAME = "fake_experiment"
MAKER = form.Maker("Ada Lovelace", "a laptop", "2026-03-02T12:00:00+00:00", "", "regularized reproduce paper")


@pytest.fixture
def experiment(fake):
    return importlib.import_module(fake)


@pytest.fixture
def measured(experiment, make_runs, claim):
    """A ledger as plain data: how much better its arm is, on which block of seeds, and when it was made."""
    about = {**dict.fromkeys(form.ENVIRONMENT, "x"), **versions(), "commit": "abcdef1", "cpu": "a processor"}
    about |= {"dirty": False, "cores": 2, "threads": 1, "device": "cpu"}

    def make(gain=5.0, *, first=0, tuned=False, **changes):
        rng = np.random.default_rng(first)
        levels = {"plain": 70.0, "better": 70.0 + gain, "control": 70.5}
        rows = [
            replace(
                run,
                seed=first + run.seed,
                metrics={"accuracy": levels[run.arm] + 0.1 * rng.normal(), "validation": 1.0},
                curves={"accuracy": [(0.0, 1.0), (1.0, math.nan)]},
                data=f"data{first + run.seed}",
                environment=about,
                created=f"2026-01-0{1 + first % 7}T03:04:05+00:00",
            )
            for run in make_runs(code_key=code_key(NAME), versions=versions())
        ]
        trials = [
            replace(
                rows[0],
                arm=arm,
                seed=seed,
                overrides=overrides,
                settings=resolve(experiment, arm, "laptop", overrides),
                metrics={"validation": 1.0},
            )
            for arm, grid in experiment.TUNING.grids.items()
            for overrides in grid
            for seed in experiment.TUNING.seeds
        ]
        store = SimpleNamespace(find=lambda *_, **__: rows + trials)
        seeds = block_of(experiment, first)
        return {**ledger.collect("paper", NAME, [claim], store=store, seeds=seeds, tuned=tuned), **changes}

    return make


@pytest.fixture
def shipped(measured):
    return ledger.parse(measured())


@pytest.fixture
def text(measured):
    """A fresh attempt on seeds of its own."""
    return form.of_data(measured(first=100), MAKER).text


def problems(attempt, experiment, claim, shipped, key=None):
    found = fitting.misfits(attempt, experiment, [claim], code_key=key or code_key(NAME), shipped=shipped)
    return "; ".join(found)


# -- form ---------------------------------------------------------------------------------------


def put(*path, value):
    """Changes what stands at a place."""

    def change(data):
        *way, last = path
        for step in way:
            data = data[step]
        data[last] = value

    return change


def drop(*path):
    def change(data):
        *way, last = path
        for step in way:
            data = data[step]
        del data[last]

    return change


def deep(levels):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (put("extra", value=1), "'extra': is no field"),
        (drop("seeds"), "'seeds': is missing"),
        (put("format", value=3), "format: got 3; this version of regularized reads 2"),
        (put("slug", value="../../etc"), "slug: got '../../etc'; must be the short name of a paper"),
        (put("code_key", value="zz"), "code_key: got 'zz'; must be 16 hexadecimal digits"),
        (put("attempt", "by", value=""), "attempt.by: is empty; must say who made it"),
        (put("attempt", "by", value="\x1b[2Jgone"), r"got '\x1b[2Jgone'; must be printable"),
        (put("attempt", "by", value="evil\u202etxt"), r"got 'evil\u202etxt'; must be printable"),
        (put("attempt", "by", value="a\nb"), r"got 'a\nb'; must be printable, in one line"),
        (put("attempt", "by", value="x" * 81), "must be a text of at most 80 characters"),
        (put("attempt", "by", value=["x"]), "attempt.by: got ['x']; must be a text"),
        (put("attempt", "mail", value="x"), "'mail': is no field of attempt"),
        (put("attempt", "when", value="yesterday"), "attempt.when: got 'yesterday'; must be a moment"),
        (put("environments", 0, "cpu", value="\x9b31m"), "must be printable"),
        (put("environments", 0, "\x1b]0;t\x07", value=1), "must be printable"),
        (put("environments", 0, "host", value="x"), "'host': is no field of environments[0]"),
        (put("environments", 0, "dirty", value=True), "runs of uncommitted code are no evidence"),
        (put("environments", 0, "cores", value=True), "environments[0].cores: got True; must be a whole number"),
        (put("environments", 0, "torch", value="1.0"), "environments[0].torch: got '1.0'; must be that of versions"),
        (put("environments", 0, "confirmed", value=[1]), "must be a list of confirmations"),
        (put("versions", "torch", value="new"), "got 'new'; must be a version"),
        (drop("versions", "numpy"), "'numpy': is missing of versions"),
        (put("seeds", value=[1.5]), "seeds: got [1.5]; must be 1 to 100 whole numbers"),
        (put("seeds", value=[True] * 10), "seeds: got [True"),
        (put("settings", value=[]), "settings: got []; must be an object of objects"),
        (drop("settings", "control"), "settings: got ['plain', 'better']; must have an object for each of arms"),
        (put("settings", "plain", "rate", value=10**30), "must be a number of ordinary size"),
        (put("settings", "plain", "rate", value=deep(9)), "is nested too deeply"),
        (put("about", "plain", "resplit", value=-1), "about.'plain'.resplit: got -1; must be a share"),
        (put("about", "plain", "share", value=1.0), "about.'plain'.share: got 1.0; must be from 0 to below 1"),
        (drop("runs", 3), "runs: got 29; needed is one of each arm with each declared seed"),
        (put("runs", 1, "seed", value=100), "missing [('plain', 101)]"),
        (put("runs", 1, "seed", value=[1]), "runs[1].seed: got [1]; must be a whole number"),
        (put("runs", 0, "metrics", "accuracy", value=1e300), "must be a number of ordinary size"),
        (put("runs", 0, "metrics", "accuracy", value=5e-324), "must be a number of ordinary size"),
        (put("runs", 0, "metrics", "accuracy", value=True), "got True; must be a number, or null where it diverged"),
        (put("runs", 0, "metrics", "accuracy", value="71"), "got '71'; must be a number"),
        (put("runs", 0, "curves", "accuracy", value=[[0]]), "must be at most 60 points"),
        (put("runs", 0, "curves", "accuracy", value=[[0, 1]] * 61), "must be at most 60 points"),
        (put("runs", 0, "overrides", value={"rate": 9}), "must be {}: settings are those of the arm"),
        (put("runs", 0, "environment", value=1), "runs[0].environment: got 1; must be a place in environments"),
        (put("runs", 0, "seconds", value=-1), "runs[0].seconds: got -1"),
        (put("runs", 0, "created", value="2026-01-01T00:00:00"), "must be a moment"),
        (put("runs", 0, "data", value="<b>"), "got '<b>'; must be a fingerprint of data"),
        (put("runs", 0, "verdict", value="holds"), "'verdict': is no field of runs[0]"),
        (put("tuning", value=[]), "tuning: got []; must be null or an object"),
    ],
)
def test_a_field_that_is_wrong_is_named(text, spoil, says):
    """Fails when something that is no attempt is taken for one, or the refusal does not say what is wrong."""
    data = json.loads(text)
    spoil(data)
    with pytest.raises(AttemptError) as caught:
        form.parse(json.dumps(data))
    assert says in str(caught.value)
    assert str(caught.value).isprintable(), "what a stranger wrote reaches a terminal through the refusal"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"slug"', '"slug": "other", "slug"', "'slug': is there twice"),
        ('"seconds":1.23', '"seconds":NaN', "NaN is no JSON"),
        ('"seconds":1.23', '"seconds":1e999', "must be a number of ordinary size"),
        ('"seconds":1.23', f'"seconds":{"9" * 5000}', "must be JSON"),
        ('"note": ""', f'"note": {"[" * 100_000}', "nested too deeply"),
        ('"note": ""', '"note": "\\ud800"', r"got '\ud800'; must be printable"),
        ("{", "", "must be JSON"),
    ],
)
def test_json_that_is_a_trap(text, old, new, says):
    """Fails when a second value under one name, a number beyond all bounds or a tower of brackets gets through."""
    assert old in text
    with pytest.raises(AttemptError) as caught:
        form.parse(text.replace(old, new, 1))
    assert says in str(caught.value)


@pytest.mark.parametrize("value", ["[]", "null", "1", '"x"', ""])
def test_json_of_another_kind(value):
    """Fails when what is no object ends in a traceback."""
    with pytest.raises(AttemptError, match="the file: must be"):
        form.parse(value)


def test_many_problems_are_told_in_part(text):
    """Fails when a file with a thousand faults fills the terminal."""
    data = json.loads(text)
    data |= {f"extra{n}": 1 for n in range(1000)}
    with pytest.raises(AttemptError) as caught:
        form.parse(json.dumps(data))
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "and more"


def test_a_name_is_plain_and_tells_evidence_apart(measured):
    """Fails when a maker's name leads to another folder, or two attempts of one maker have one name."""
    name = form.of_data(measured(first=100), replace(MAKER, by="../Żółw <b>")).name
    assert name.startswith("zow-b-"), name
    assert name != form.of_data(measured(first=200), replace(MAKER, by="../Żółw <b>")).name
    assert form.of_data(measured(first=100), replace(MAKER, by="日本")).name.startswith("attempt-")


# -- files --------------------------------------------------------------------------------------


def zipped(path, *entries, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = compression
            archive.writestr(info, content)
    return path


FILE, LINK = 0o100644, 0o120777


def test_an_attempt_is_read_from_a_file_a_folder_and_a_zip(tmp_path):
    """Fails when one of the forms that are promised cannot be read."""
    (tmp_path / "attempt.json").write_text("{}")
    (tmp_path / "mine.json").write_text("{}")
    for path in (
        tmp_path,
        tmp_path / "mine.json",
        zipped(tmp_path / "flat.zip", ("attempt.json", "{}", FILE)),
        zipped(tmp_path / "folder.zip", ("x/README.md", "r", FILE), ("x/attempt.json", "{}", FILE)),
    ):
        assert files.read(path) == "{}"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([("../attempt.json", "{}", FILE)], "must be a plain relative path"),
        ([("/attempt.json", "{}", FILE)], "must be a plain relative path"),
        ([("attempt.json", "{}", FILE), ("C:\\x", "", FILE)], "must be a plain relative path"),
        ([("attempt.json", "{}", FILE), ("a\x1b[31m", "", FILE)], "must be a plain relative path"),
        ([("attempt.json", "{}", FILE), ("x", "/etc/passwd", LINK)], "must be a file or a folder, no link"),
        ([("attempt.json", "{}", FILE), ("Attempt.json", "{}", FILE)], "is there twice"),
        ([("a/attempt.json", "{}", FILE), ("b/attempt.json", "{}", FILE)], "it has 2"),
        ([("README.md", "{}", FILE)], "it has 0"),
        ([("a/b/attempt.json", "{}", FILE)], "it has 0"),
        ([("attempt.json", " " * (files.LARGEST + 1), FILE)], "is larger than the"),
        ([(str(number), "", FILE) for number in range(2001)], "has 2001 entries; at most 2000"),
    ],
)
def test_zips_that_no_export_writes(tmp_path, entries, says):
    """Fails when a path out of the folder, a link or a bomb is read, or is passed on to whoever unpacks the zip."""
    with pytest.raises(AttemptError) as caught:
        files.read(zipped(tmp_path / "a.zip", *entries))
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_zip_that_would_fill_the_disk(tmp_path, monkeypatch):
    """Fails when what a zip would unpack to is not looked at."""
    monkeypatch.setattr(files, "_MOST_UNPACKED", 100)
    with pytest.raises(AttemptError, match="would unpack to 103 bytes"):
        files.read(zipped(tmp_path / "a.zip", ("attempt.json", "{}", FILE), ("zeros", "0" * 101, FILE)))


def test_a_damaged_zip(tmp_path):
    """Fails when half a zip, or one whose content was changed, ends in a traceback."""
    path = zipped(tmp_path / "a.zip", ("attempt.json", "{}" + " " * 1000, FILE))
    content = path.read_bytes()
    for spoilt in (
        content[:60],
        content.replace(b"attempt.json", b"attempt.jsno", 1),
        content[:45] + b"\xff\xff" + content[47:],
    ):
        path.write_bytes(spoilt)
        with pytest.raises(AttemptError, match=r"a\.zip"):
            files.read(path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """Fails when a pipe hangs the command, a link leads out of the folder, or a huge file is read whole."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * (files.LARGEST + 1))
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "attempt.json").symlink_to("/etc/hostname")
    for name, says in {
        "pipe": "must be a file",
        "large": "an attempt has at most",
        "bytes": "must be JSON in UTF-8",
        "linked": "cannot be read",
        "nowhere": "cannot be read",
    }.items():
        with pytest.raises(AttemptError, match=says):
            files.read(tmp_path / name)


# -- fitting ------------------------------------------------------------------------------------


def test_an_environment_has_the_keys_that_are_known():
    """Fails when runs of today's code say more of their machine than an attempt may, so that all are refused."""
    assert set(environment("regularized.evidence.baselines")) == set(form.ENVIRONMENT)
    assert set(versions()) == set(form.VERSIONS)


def test_what_was_exported_fits(measured, experiment, claim, shipped):
    """Fails when an honest attempt is refused: with tuning or without, on the same seeds or others, beside none."""
    for data in (measured(first=100), measured(first=100, tuned=True), measured()):
        attempt = form.of_data(data, MAKER)
        assert problems(attempt, experiment, claim, shipped) == ""
        assert problems(attempt, experiment, claim, None) == ""


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (put("scale", value="smoke"), "scale: got 'smoke'; needed is 'laptop'"),
        (put("settings", "better", "gain", value=9.0), "settings.better.gain: got 9.0; needed is 5.0"),
        (put("settings", "better", "more", value=1), "settings.better.'more': is unknown"),
        (drop("settings", "better", "gain"), "settings.better.gain: is missing; needed is 5.0"),
        (put("about", "better", "weights", value=7), "about.better.weights: got 7; needed is 1000000"),
        (put("claims", "end", "smallest_effect", value=0.1), "claims.end.smallest_effect: got 0.1; needed is 2.0"),
        (drop("claims", "end"), "claims.end: is missing"),
        (put("code_key", value="0" * 16), "code_key: got 0000000000000000 ('abcdef1'); needed is "),
        (drop("runs", 0, "metrics", "accuracy"), "arm plain, seed 100: metric 'accuracy' is missing"),
        (put("runs", 0, "metrics", "luck", value=1.0), "got metrics ['luck']; there are ['accuracy', 'validation']"),
        (put("runs", 0, "curves", "luck", value=[]), "got curves ['luck']; there are ['accuracy']"),
        (put("runs", 0, "curve_unit", value="year"), "curve_unit: got 'year'; needed is one of ['epoch']"),
        (put("runs", 0, "created", value="2999-01-01T00:00:00+00:00"), "which is yet to come"),
        (put("runs", 0, "data", value="data101"), "needed are data of its own for each seed"),
        (put("runs", 0, "data", value="data3"), "needed are data of its own for each seed, not the ledger's"),
        (put("runs", 0, "data", value="data999"), "seed 100: data: arms share them otherwise than in the ledger"),
    ],
)
def test_an_attempt_of_something_else_is_refused(text, experiment, claim, shipped, spoil, says):
    """Fails when other settings, code, thresholds, metrics or data stand beside the ledger as if they were the same."""
    data = json.loads(text)
    spoil(data)
    assert says in problems(form.parse(json.dumps(data)), experiment, claim, shipped)


def reseeded(text, numbers):
    data = json.loads(text)
    data["seeds"] = numbers
    data["runs"] = [
        {**data["runs"][0], "arm": arm, "seed": seed, "data": f"data{seed}"} for arm in data["arms"] for seed in numbers
    ]
    return form.parse(json.dumps(data))


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        (range(5, 15), "a block of seeds starts at 0, as declared, or at one of [0, 100,"),
        (range(100, 109), "needed is the whole block, [100, 101,"),
        ([100, *range(102, 111)], "needed is the whole block"),
        (range(100, 120), "needed is the whole block"),
        (range(1000, 1010), "a block of seeds starts at"),
    ],
)
def test_seeds_are_a_whole_block(text, experiment, claim, shipped, numbers, says):
    """Fails when seeds can be left out, added or chosen by where they start."""
    assert says in problems(reseeded(text, list(numbers)), experiment, claim, shipped)


def test_the_same_seeds_have_seen_the_same_data(measured, experiment, claim, shipped):
    """Fails when a replication of the ledger's seeds was made on other data."""
    data = measured()
    data["runs"][0]["data"] = "data77"
    assert "arm plain, seed 0: data: got 'data77'; needed is 'data0'" in problems(
        form.of_data(data, MAKER), experiment, claim, shipped
    )


def test_versions_may_be_others_but_not_too_old(measured, experiment, claim, shipped):
    """Fails when evidence cannot come from the next torch, or comes from one that this package does not run with."""

    def with_torch(version):
        data = measured(first=100)
        data["versions"] = {**data["versions"], "torch": version}
        data["environments"][0] = {**data["environments"][0], "torch": version}
        return problems(form.of_data(data, MAKER), experiment, claim, shipped)

    assert with_torch("99.1.0+cu999") == ""
    assert "versions.torch: got '1.13.0'; needed is at least" in with_torch("1.13.0")


def test_trials_of_another_grid_are_refused(measured, experiment, claim, shipped):
    """Fails when settings could be said to have been chosen from more trials than there were."""
    data = measured(first=100, tuned=True)
    data["tuning_runs"][0]["overrides"] = {"rate": 0.9}
    assert "tuning_runs[0].overrides.rate: got 0.9; needed is 0.1" in problems(
        form.of_data(data, MAKER), experiment, claim, shipped
    )
    data["tuning_runs"] = data["tuning_runs"][1:]
    assert "tuning_runs: got 7; needed are 8" in problems(form.of_data(data, MAKER), experiment, claim, shipped)


def confirmed(data, before, arms):
    record = {"at": "2026-01-09", "from": before, "to": data["code_key"], "arms": arms, "seed": 0}
    return {**data, "environments": [{**data["environments"][0], "confirmed": [record]}]}


@pytest.mark.parametrize(("arms", "fits"), [(["plain", "better", "control"], True), (["plain", "better"], False)])
def test_earlier_code_that_was_confirmed_is_the_same_code(measured, experiment, claim, arms, fits):
    """Fails when a refactor makes honest attempts worthless, or a confirmation of some arms passes for all."""
    ours = ledger.parse(confirmed(measured(), "0" * 16, arms))
    attempt = form.of_data(measured(first=100, code_key="0" * 16), MAKER)
    assert ("code_key: got" not in problems(attempt, experiment, claim, ours)) is fits
    (outcome,) = judging.together([claim], ours, [attempt])
    assert (outcome.attempts[1].apart == "") is fits


def test_a_run_counts_once(measured, shipped):
    """Fails when the ledger, or an attempt under another name, comes back as an attempt of its own."""
    again = form.of_data(measured(), MAKER)
    assert fitting.seen_before(again, {"shipped": shipped}) == (
        "runs: 30 of 30 are runs of 'shipped'; needed are runs of its own: a run counts once"
    )
    assert fitting.seen_before(form.of_data(measured(first=100), MAKER), {"shipped": shipped}) == ""


# -- judging ------------------------------------------------------------------------------------

H, S, N, U, X = Verdict.HOLDS, Verdict.SMALLER, Verdict.NO_EFFECT, Verdict.OPEN, Verdict.OPPOSITE


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([H], False),
        ([H, H], False),
        ([H, U], False),
        ([U, X], False),
        ([N, S], False),
        ([N, X], False),
        ([H, N], True),
        ([H, X], True),
        ([S, H], True),
        ([S, X], True),
        ([U, H, U, N], True),
        ([Verdict.NOT_RUN, H], False),
    ],
)
def test_verdicts_that_cannot_both_be_true(verdicts, expected):
    """Fails when an open verdict contests a decided one, or "surely enough" and "surely less" pass for agreement."""
    assert judging.disagree(verdicts) is expected


def test_a_claim_is_contested_where_attempts_contradict_each_other(measured, shipped, claim):
    """Fails when a contradiction is hidden, when agreement is called one, or when one of the two is not shown."""
    against = form.of_data(measured(0.0, first=100), MAKER)
    agreeing = form.of_data(measured(5.0, first=200), MAKER)
    (alone,) = judging.together([claim], shipped, [])
    (agreed,) = judging.together([claim], shipped, [agreeing])
    (contested,) = judging.together([claim], shipped, [agreeing, against])
    assert (alone.verdict, agreed.verdict, contested.verdict) == (H, H, Verdict.CONTESTED)
    assert [one.verdict for one in contested.attempts] == [H, H, N]
    assert contested.effect == alone.effect, "the effect is that of the runs that ship"
    one = contested.attempts[2]
    assert (one.by, one.where, one.when) == ("Ada Lovelace", "a laptop", "2026-01-03")
    assert one.beside == "other seeds, with data of their own; the same kind of machine; the same versions"


def test_an_attempt_does_not_decide_what_is_open_here(measured, claim):
    """Fails when whichever attempt has an answer gives the verdict: a choice after a look."""
    far = replace(claim, smallest_effect=0.03)
    undecided = ledger.parse(measured(0.03))
    (outcome,) = judging.together([far], undecided, [form.of_data(measured(5.0, first=100), MAKER)])
    assert outcome.verdict is U
    assert len(outcome.attempts) == 2


def test_the_same_seeds_repeat_the_numerics_alone(measured, shipped, claim):
    """Fails when a repetition on the same seeds passes for independent evidence."""
    data = measured(0.0)
    data["environments"][0] = {**data["environments"][0], "cpu": "another"}
    (outcome,) = judging.together([claim], shipped, [form.of_data(data, replace(MAKER, where=""))])
    said = outcome.attempts[1]
    assert said.beside.startswith("the same seeds, and so the same data: it repeats the numerics, not the draw")
    assert "another machine" in said.beside
    assert said.where == "another"
    assert outcome.verdict is Verdict.CONTESTED, "a verdict that hangs on rounding is contested"


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"code_key": "0" * 16}, "it measured other code"), ({"claims": {}}, "the claim was stated otherwise")],
)
def test_an_attempt_at_something_else_contests_nothing(measured, shipped, claim, changes, says):
    """Fails when an attempt that was kept goes on to contest a claim after code or threshold have changed."""
    (outcome,) = judging.together([claim], shipped, [form.of_data(measured(0.0, first=100, **changes), MAKER)])
    assert outcome.verdict is H
    assert outcome.attempts[1].verdict is N, "it is shown all the same"
    assert says in outcome.attempts[1].apart


def test_without_a_ledger_nothing_is_decided(measured, claim):
    """Fails when a stranger's runs pass for ours."""
    (outcome,) = judging.together([claim], None, [form.of_data(measured(first=100), MAKER)])
    assert outcome.verdict is Verdict.NOT_RUN
    assert outcome.attempts[0].apart


def test_each_attempt_is_corrected_by_itself(measured, shipped, claim):
    """Fails when the number of attempts, and not that of claims, moves a verdict."""
    attempt = form.of_data(measured(2.06, first=100), MAKER)
    claims = [claim, *(replace(claim, id=f"c{n}") for n in range(8))]
    for others in ([], [form.of_data(measured(first=200), MAKER)] * 5):
        told = judging.together(claims, shipped, [attempt, *others])
        assert [o.attempts[1].verdict for o in told] == [o.verdict for o in attempt.ledger.outcomes(claims)]


# -- kept ---------------------------------------------------------------------------------------


def test_what_is_kept_is_what_was_read(measured, tmp_path, caplog):
    """Fails when bytes that nobody checked are kept, or a file that is damaged or was edited takes the others along."""
    folder = tmp_path / "paper"
    folder.mkdir()
    attempts = [form.of_data(measured(first=first), MAKER) for first in (100, 200)]
    paths = [kept.keep(attempt, folder) for attempt in attempts]
    assert {one.name for one in kept.load(folder)} == {one.name for one in attempts}
    assert paths[0].read_text(encoding="utf-8") == attempts[0].text
    paths[0].write_text(attempts[0].text.replace('"accuracy":7', '"accuracy":9', 1), encoding="utf-8")
    (folder / "attempts" / "half.json").write_text("{", encoding="utf-8")
    assert [one.name for one in kept.load(folder)] == [attempts[1].name]
    assert "was renamed, or changed by hand" in caplog.text
    assert "half.json" in caplog.text
    assert kept.load(tmp_path / "nowhere") == ()


# -- bundle -------------------------------------------------------------------------------------


def test_a_bundle_tells_people_what_it_tells_programs(measured, claim, tmp_path):
    """Fails when a file that its README names is missing, checksums are wrong, or a name is markup in the report."""
    attempt = form.of_data(measured(first=100), replace(MAKER, by="<script>x</script>"))
    other = form.of_data(measured(0.0, first=200), MAKER)
    outcomes = judging.together([claim], attempt.ledger, [other])
    folder = bundle.write(tmp_path / "new" / "out", attempt, outcomes, title="A paper", others=[other])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    readme = (folder / "README.md").read_text()
    for name in there - {"README.md"}:
        assert name in readme or name.startswith("attempts/"), name
    assert "<script>" not in readme + (folder / "report.html").read_text()
    assert "contested" in (folder / "report.html").read_text()
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == there - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    assert form.parse(files.read(folder)).name == attempt.name
    (verdict,) = json.loads((folder / "verdicts.json").read_text())
    assert verdict["verdict"] == "holds", "of these runs by themselves"
    values = (folder / "values.csv").read_text().splitlines()
    assert len(values) == 1 + 2 * len(attempt.ledger.runs)
    with pytest.raises(bundle.BundleError, match="exists already"):
        bundle.write(folder, attempt, outcomes, title="A paper")


def test_a_zip_is_the_same_each_time(measured, claim, tmp_path, monkeypatch):
    """Fails when a zip cannot be read again, or hangs on when it was made."""
    monkeypatch.setattr(report, "write", lambda *_, **__: None)
    attempt = form.of_data(measured(first=100), MAKER)
    packed = [
        bundle.write(tmp_path / str(n) / "out.zip", attempt, [Outcome(claim, H)], title="A paper") for n in range(2)
    ]
    assert form.parse(files.read(packed[0])).name == attempt.name
    with zipfile.ZipFile(packed[0]) as one, zipfile.ZipFile(packed[1]) as other:
        assert one.namelist() == other.namelist()
        assert one.read("out/attempt.json") == other.read("out/attempt.json")
    assert not [path for path in (tmp_path / "0").iterdir() if path.name != "out.zip"], "something is left behind"


def test_texts_of_a_claim_that_is_contested():
    """Fails when a stranger's words reach places that expect ours: only names of files, which are plain, do."""
    claim = Claim("c", "s", "m", "higher", "a", "b", smallest_effect=1.0)
    said = (Attempted("shipped", H), Attempted("x-1", N, by="<b>[red]", where="](x)"))
    outcome = Outcome(claim, Verdict.CONTESTED, attempts=said)
    assert reason_text(outcome) == "attempts disagree: shipped holds; x-1 no effect shown"
    assert count_verdicts([outcome])[Verdict.CONTESTED] == 1
    assert Attempted.from_dict(json.loads(json.dumps(said[1].to_dict()))) == said[1]


# -- commands -----------------------------------------------------------------------------------


@pytest.fixture
def paper(measured, experiment, claim, tmp_path, monkeypatch):
    """The fake experiment as a paper of the catalogue, with a ledger."""
    folder = tmp_path / "papers" / "paper"
    folder.mkdir(parents=True)
    (folder / "ledger.json").write_text(ledger.laid_out(measured()), encoding="utf-8")

    def load():
        return ledger.load(folder / "ledger.json")

    entry = SimpleNamespace(
        slug="paper",
        card=SimpleNamespace(title="A paper", claims=(claim,)),
        abstract=(),
        folder=folder,
        ledger=folder / "ledger.json",
        code_key=code_key(NAME),
        experiment=lambda: experiment,
        module_name=lambda part: NAME,
        load_ledger=load,
        load_attempts=lambda: kept.load(folder),
        outcomes=judging.together([claim], load(), []),
    )
    monkeypatch.setattr(commands, "implemented", lambda slug: entry)
    return entry


def call(*arguments):
    return CliRunner().invoke(app, ["ledger", *map(str, arguments)], prog_name="regularized")


def test_one_bad_file_never_stops_the_rest(measured, paper, tmp_path):
    """Fails when a refused file takes others along, what was refused is kept, or its words reach the terminal."""
    against = form.of_data(measured(0.0, first=100), MAKER)
    good, odd, other = tmp_path / "good.json", tmp_path / "odd\x1b[31m.json", tmp_path / "other.json"
    good.write_text(against.text, encoding="utf-8")
    odd.write_text(against.text.replace("Ada Lovelace", "\\u001b[2J"), encoding="utf-8")
    other.write_text(form.of_data(measured(first=200, scale="smoke"), MAKER).text, encoding="utf-8")
    done = call("import", odd, tmp_path / "nowhere", good, other, "--json")
    assert done.exit_code == 1
    rows = json.loads(done.stdout)
    assert ["refused" in row for row in rows] == [True, True, False, True]
    assert (rows[2]["status"], rows[2]["contested"], rows[2]["verdicts"]) == (
        "kept",
        ["end"],
        {"end": "no effect shown"},
    )
    assert "scale: got 'smoke'; needed is 'laptop'" in rows[3]["refused"][0]
    assert "3 of 4 refused" in done.stderr
    assert all(line.isprintable() for line in (done.stderr + done.stdout).splitlines())
    assert [one.name for one in paper.load_attempts()] == [against.name]
    again = call("import", good)
    assert again.exit_code == 0
    assert f"{good}\tpaper\t{against.name}\tknown\t1 no effect shown\tend" in again.stdout.splitlines()
    renamed = form.of_data(measured(0.0, first=100), replace(MAKER, by="Somebody else"))
    other.write_text(renamed.text.replace('"peak_memory":', '"peak_memory":1', 1), encoding="utf-8")
    assert f"are runs of '{against.name}'" in call("import", other).stderr, "a run counts once"


def test_a_look_writes_nothing_and_needs_no_checkout(measured, paper, tmp_path, monkeypatch):
    """Fails when `--check` keeps something, or an installed package is written into."""
    file = tmp_path / "attempt.json"
    file.write_text(form.of_data(measured(first=100), MAKER).text, encoding="utf-8")
    monkeypatch.setattr(provenance, "is_checkout", lambda: False)
    looked = call("import", "--check", tmp_path)
    assert looked.exit_code == 0, looked.stderr
    assert "checked\t1 holds" in looked.stdout
    refused = call("import", file)
    assert (refused.exit_code, refused.stdout) == (4, "")
    assert "In a clone" in refused.stderr
    assert paper.load_attempts() == ()


def test_export_of_what_ships_and_of_ones_own(measured, paper, tmp_path, monkeypatch):
    """Fails when an export cannot be checked, names another maker, or takes the runs that ship for one's own."""
    monkeypatch.setattr(report, "write", lambda *_, **__: None)
    shipped = call("export", "paper", tmp_path / "shipped.zip", "--json")
    assert shipped.exit_code == 0, shipped.stderr
    assert json.loads(shipped.stdout)["verdicts"] == {"end": "holds"}
    looked = call("import", "--check", tmp_path / "shipped.zip")
    assert "30 of 30 are runs of 'shipped'" in looked.stdout
    assert call("import", tmp_path / "shipped.zip").exit_code == 1
    for arguments, says in (
        (["--by", "Ada"], "go with --mine"),
        (["--mine"], '--mine needs --by "NAME"'),
        (["--mine", "--by", "Ada", "--first", "7"], "a block of seeds starts at 0"),
    ):
        wrong = call("export", "paper", tmp_path / "mine", *arguments)
        assert (wrong.exit_code, says in wrong.stderr) == (2, True), wrong.stderr
    lacking = call("export", "paper", tmp_path / "mine", "--mine", "--by", "Ada", "--first", "300")
    assert lacking.exit_code == 1
    assert "Make them: regularized reproduce paper --scale laptop --first 300" in lacking.stderr
    data = measured(first=300)
    monkeypatch.setattr(ledger, "collect", lambda *_, seeds, **__: data if seeds.first == 300 else None)
    done = call("export", "paper", tmp_path / "mine", "--mine", "--by", " Ada ", "--first", "300", "--note", "n")
    assert done.exit_code == 0, done.stderr
    maker = form.parse(files.read(tmp_path / "mine")).maker
    assert (maker.by, maker.where, maker.note) == ("Ada", "a processor", "n")
    assert maker.command == "regularized reproduce paper --scale laptop --first 300"
    assert call("import", tmp_path / "mine").exit_code == 0
    assert len(paper.load_attempts()) == 1


def test_export_and_import_are_no_papers():
    """Fails when the words after `ledger` could be a paper, or the plain command is another one now."""
    for word in ("export", "import"):
        asked = call(word)
        assert asked.exit_code == 2
        assert f"regularized ledger {word}" in asked.stderr, "the usage line names the command"
        assert call("--json", word).exit_code == 3, "behind an option it is a paper, and there is none"
        with pytest.raises(CardError, match="it is a word of the commands"):
            Card.parse(f'slug = "{word}"', source="card.toml")
        with pytest.raises(CommandError, match="no word of Python or of the commands"):
            lay_out(word, family="overfitting", title="A title", checkout=Path())
