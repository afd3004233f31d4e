import logging
import math
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

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
