import logging
import math
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from regularized.evidence.reservations import Heart, Owner, holds
from regularized.evidence.store import Run, Store, StoreError, canonical, home

RUN = Run(
    slug="paper",
    scale="laptop",
    arm="plain",
    seed=0,
    code_key="k",
    versions={"torch": "2.13"},
    metrics={"accuracy": 0.1 + 0.2, "lost": math.inf},
    overrides={"rate": 0.1, "layers": [1, 2]},
    curves={"accuracy": [(0.0, 1.5), (1.0, 2.5)]},
    data="abc",
    settings={"arm": {"rate": 0.1}},
    environment={"cpu": "x"},
    seconds=1.25,
    peak_memory=12345,
)


def test_a_run_comes_back_as_it_was(tmp_path):
    """Fails when a column is mixed up or a number loses digits."""
    with Store(tmp_path / "s.sqlite3") as store:
        store.add(RUN)
    with Store(tmp_path / "s.sqlite3") as store:
        assert store.find("paper") == [RUN]


def test_nan_survives(tmp_path):
    """Fails when a diverged run comes back as a number or not at all."""
    with Store(tmp_path / "s.sqlite3") as store:
        store.add(replace(RUN, metrics={"loss": math.nan}))
        assert math.isnan(store.find("paper")[0].metrics["loss"])


def test_find_selects_by_what_makes_a_run_the_same(tmp_path):
    """Fails when runs of other code, scale or versions, or of uncommitted code, pass for the wanted ones."""
    with Store(tmp_path / "s.sqlite3") as store:
        for run in (
            RUN,
            replace(RUN, scale="smoke"),
            replace(RUN, code_key="other"),
            replace(RUN, versions={"torch": "2.14"}),
            replace(RUN, dirty=True),
            replace(RUN, slug="other"),
        ):
            store.add(run)
        assert store.find("paper", scale="laptop", code_key="k", versions={"torch": "2.13"}, dirty=False) == [RUN]
        assert len(store.find("paper")) == 5
        assert store.find("nothing") == []


def test_equal_settings_give_equal_text_in_every_process():
    """Fails when the order of keys, or the address of a function, makes equal settings differ."""
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})
    assert canonical({"loss": math.fsum}) == '{"loss":"fsum"}'


WRITER = """
import sys
import time
from dataclasses import replace
from regularized.evidence.reservations import Heart, Owner, holds
from regularized.evidence.store import Run, Store
for part in range(5):  # opened anew each time: making the file and switching to WAL are part of the race
    with Store(sys.argv[1]) as store:
        for i in range(20):
            store.add(Run("paper", "laptop", sys.argv[2], 20 * part + i, "k", {}, {"x": 1.0}))
"""


def test_processes_write_at_once(tmp_path):
    """Fails when one of several processes that share a new store gets "database is locked" or loses a row."""
    file = tmp_path / "s.sqlite3"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), arm]) for arm in "abc"]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    with Store(file) as store:
        assert {(run.arm, run.seed) for run in store.find("paper")} == {(a, s) for a in "abc" for s in range(100)}


OPENER = """
import sys, time
from regularized.evidence.store import Store
for i in range(20):
    while time.time() < float(sys.argv[2]) + 0.05 * i:  # all processes at the same moment
        pass
    Store(f"{sys.argv[1]}/{i}.sqlite3").close()
"""


def test_processes_make_a_new_store_at_once(tmp_path):
    """Fails when one process takes the store that another is just making for a foreign or a locked one."""
    start = str(time.time() + 1.5)
    openers = [
        subprocess.Popen([sys.executable, "-c", OPENER, str(tmp_path), start], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [opener.communicate(timeout=120)[1] for opener in openers] == [""] * 4


def filled(file, rows=200):
    with Store(file) as store:
        for seed in range(rows):
            store.add(replace(RUN, seed=seed, curves={"c": [(float(x), 0.5) for x in range(100)]}))
    return file.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "text", "hole"])
def test_a_damaged_file_is_named_with_the_mend_and_left_alone(tmp_path, damage):
    """Fails when a damaged store gives sqlite's bare message, or is deleted, emptied or "repaired"."""
    file = tmp_path / "s.sqlite3"
    whole = filled(file)
    middle = len(whole) // 2
    content = {
        "truncated": whole[:middle],
        "text": b"not a database " * 1000,
        "hole": whole[:4096] + b"\xff" * 8192 + whole[4096 + 8192 :],
    }[damage]
    file.write_bytes(content)

    def use():
        with Store(file) as store:
            store.find("paper")

    with pytest.raises(StoreError, match=r"is damaged .*Nothing in it was changed\. Move it aside") as caught:
        use()
    assert str(file) in str(caught.value)
    assert file.read_bytes() == content


def test_one_damaged_row_is_left_out_and_the_rest_stays(tmp_path, caplog):
    """Fails when a flipped bit passes for a measurement, or takes the readable rows with it."""
    file = tmp_path / "s.sqlite3"
    filled(file, rows=3)
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE runs SET metrics = replace(metrics, '0.3', '0.9') WHERE id = 2")
        connection.execute("UPDATE runs SET curves = 'nonsense' WHERE id = 3")
    with Store(file) as store, caplog.at_level(logging.WARNING):
        assert [run.seed for run in store.find("paper")] == [0]
    assert "row 2" in caplog.text
    assert "row 3" in caplog.text


def test_a_byte_that_is_no_utf8_costs_its_row_alone(tmp_path, caplog):
    """Fails when one flipped bit in a text makes the whole store unreadable."""
    file = tmp_path / "s.sqlite3"
    filled(file, rows=3)
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE runs SET data = CAST(x'61ff62' AS TEXT) WHERE id = 2")
    with Store(file) as store, caplog.at_level(logging.WARNING):
        assert [run.seed for run in store.find("paper")] == [0, 2]
    assert "row 2" in caplog.text


def test_damage_is_told_on_opening(tmp_path):
    """Fails when runs are made for hours before a damaged page of the store shows."""
    file = tmp_path / "s.sqlite3"
    whole = filled(file)
    last = len(whole) - 4096  # far from what opening reads anyway
    file.write_bytes(whole[:last] + b"\xff" * 4096)
    with pytest.raises(StoreError, match="is damaged"):
        Store(file)


def test_half_a_surrogate_pair_is_kept(tmp_path):
    """Fails when a finished run is lost because a name in it, such as that of a file, is no valid Unicode."""
    run = replace(RUN, metrics={"loss of \udc80": 1.0}, environment={"cpu": "\udcff"}, data="x\udc80")
    with Store(tmp_path / "s.sqlite3") as store:
        store.add(run)
        assert store.find("paper") == [replace(run, data="x\\udc80")]


READER = """
import sys
from regularized.evidence.store import Store, StoreError
with Store(sys.argv[1]) as store:
    print(len(store.find("paper")))
    try:
        store.reserve("key")
    except StoreError as error:
        print(error)
"""


def test_runs_are_read_from_a_read_only_disk(tmp_path, read_only):
    """Fails when runs that lie on a disk that may not be written cannot be shown."""
    file = tmp_path / "s.sqlite3"
    filled(file, rows=3)
    done = read_only(tmp_path, [sys.executable, "-c", READER, str(file)])
    assert done.returncode == 0, done.stderr
    count, refused = done.stdout.splitlines()
    assert count == "3"
    assert "cannot use the store" in refused
    assert "read-only" in refused


# What wrote the first format, as it was.
FIRST_FORMAT = """
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY, created TEXT NOT NULL, slug TEXT NOT NULL, scale TEXT NOT NULL, arm TEXT NOT NULL,
        overrides TEXT NOT NULL, seed INTEGER NOT NULL, code_key TEXT NOT NULL, versions TEXT NOT NULL,
        dirty INTEGER NOT NULL, metrics TEXT NOT NULL, curves TEXT NOT NULL, curve_unit TEXT NOT NULL,
        data TEXT NOT NULL, settings TEXT NOT NULL, environment TEXT NOT NULL, seconds REAL NOT NULL,
        peak_memory INTEGER NOT NULL, checksum TEXT NOT NULL
    );
    CREATE INDEX runs_by_paper ON runs (slug, scale, code_key);
    INSERT INTO runs VALUES (1, '2025-01-02T03:04:05+00:00', 'paper', 'laptop', 'plain', '{}', 0, 'k',
        '{"torch":"2.13"}', 0, '{"accuracy":0.5}', '{}', 'epoch', '', '{}', '{}', 1.5, 7, '3f4ed69dfbbd543b');
    PRAGMA application_id = 1380271957;
    PRAGMA user_version = 1;
"""


def test_a_store_of_the_first_format_is_taken_over(tmp_path):
    """Fails when a new version loses what users have measured, or two processes upgrade one file at once."""
    file = tmp_path / "s.sqlite3"
    with sqlite3.connect(file) as connection:
        connection.executescript(FIRST_FORMAT)
    program = [sys.executable, "-c", "import sys; from regularized.evidence.store import Store; Store(sys.argv[1])"]
    openers = [subprocess.Popen([*program, str(file)]) for _ in range(4)]
    assert [opener.wait(120) for opener in openers] == [0] * 4
    with Store(file) as store:
        assert [run.metrics for run in store.find("paper")] == [{"accuracy": 0.5}]
        assert store.reserve("key")


# -- reservations -------------------------------------------------------------------------------


def test_a_run_is_reserved_once(tmp_path):
    """Fails when two processes make the same run, or one that has given it back still blocks the other."""
    file = tmp_path / "s.sqlite3"
    with Store(file) as one, Store(file) as other:
        assert one.reserve("a")
        assert one.reserve("a"), "what one holds"
        assert not other.reserve("a")
        assert other.reserve("b")
        other.release("a")  # not its own: nothing happens
        assert not other.reserve("a")
        one.release("a")
        assert other.reserve("a")
        other.release()
        assert one.reserve("a")
        assert one.reserve("b")
    with Store(file) as later:
        assert later.reserve("a"), "closing gives back"


RESERVER = """
import os, signal, sys
from regularized.evidence.store import Store
store = Store(sys.argv[1])
assert store.reserve("a")
print("reserved", flush=True)
if sys.argv[2] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.readline()
os._exit(0)  # without closing
"""


def test_reservations_of_the_dead_are_void(tmp_path):
    """Fails when a killed process blocks its runs, or one that lives does not hold them."""
    file = tmp_path / "s.sqlite3"
    subprocess.run([sys.executable, "-c", RESERVER, str(file), "die"], check=False)
    with Store(file) as store:
        assert store.reserve("a")
    living = subprocess.Popen(
        [sys.executable, "-c", RESERVER, str(file), "live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert living.stdout.readline() == "reserved\n"
    with Store(file) as store:
        assert not store.reserve("a")
        living.communicate("\n")
        assert store.reserve("a")


def test_a_number_that_went_to_another_process_is_no_life(tmp_path):
    """Fails when a new process that got the number of a dead one keeps its reservations."""
    owner = Owner.here()
    assert holds(owner.to_text(), time.time())
    assert not holds(replace(owner, born="earlier").to_text(), time.time())


def test_elsewhere_the_heart_decides(tmp_path):
    """Fails when a machine that went away holds its reservations for ever, or a living one loses them."""
    elsewhere = replace(Owner.here(), place="another machine", process=1).to_text()
    assert holds(elsewhere, time.time() - 60)
    assert not holds(elsewhere, time.time() - 600)
    assert not holds(elsewhere, time.time() + 600), "a clock that jumped back"
    assert not holds("damaged", time.time())
    assert not holds('{"place": "x"}', time.time())
    file = tmp_path / "s.sqlite3"
    with Store(file) as store:
        assert store.reserve("a")
        connection = sqlite3.connect(file, isolation_level=None)
        connection.execute("UPDATE reservations SET owner = ?, beat = 0", (elsewhere,))
        heart = Heart(file, elsewhere, seconds=0.01)
        deadline = time.monotonic() + 60
        while (beat := connection.execute("SELECT beat FROM reservations").fetchone()[0]) == 0:
            assert time.monotonic() < deadline, "the heart does not beat"
            time.sleep(0.01)
        heart.stop()
        connection.close()
        assert abs(time.time() - beat) < 60
        assert not store.reserve("a")


def test_foreign_and_newer_files_are_refused(tmp_path):
    """Fails when a table is made in another program's database, or rows of a newer format are misread."""
    foreign = tmp_path / "foreign.sqlite3"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StoreError, match="another program"):
        Store(foreign)
    newer = tmp_path / "newer.sqlite3"
    filled(newer, rows=1)
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="format 99"):
        Store(newer)


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    """Fails when a bad REGULARIZED_HOME gives a traceback about mkdir."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="REGULARIZED_HOME"):
        Store(tmp_path / "file" / "s.sqlite3")


def test_home_follows_the_environment(monkeypatch, tmp_path):
    """Fails when runs land in a folder that the user did not choose."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "mine"))
    assert home() == tmp_path / "mine"
    monkeypatch.delenv("REGULARIZED_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home() == tmp_path / "data" / "regularized"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert home().parts[-3:] == (".local", "share", "regularized")
