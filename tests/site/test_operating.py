"""What an operator relies on: backup of a running site and the way back, metrics, access log, several workers."""

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from sqlalchemy import func, select, text
from starlette.testclient import TestClient
from tests.site.helpers import send, settings_in
from tests.site.test_site_commands import call

from regularized.papers.catalogue import load_catalogue
from regularized.site.app import create_app
from regularized.site.backup import BackupError, backup, restore
from regularized.site.database import open_database, sessions
from regularized.site.models import Comment
from regularized.site.observing import open_access_log
from regularized.site.opening import open_site
from regularized.site.settings import Settings

PAGE = f"/papers/{load_catalogue()[-1].slug}"


def comments(engine):
    with sessions(engine)() as session:
        return session.scalar(select(func.count()).select_from(Comment))


def test_a_backup_of_a_running_site_has_everything(person, site, tmp_path):
    """Fails when what was written last is not in it: the bare file of a running site kept 11 of 34 comments."""
    with site.write() as session:
        session.execute(text("PRAGMA wal_autocheckpoint=0"))  # nothing gets from the log into the file by itself
    for number in range(9):
        send(person, PAGE, f"{PAGE}/comments", body=f"number {number}")
    file = tmp_path / "backup.tar.gz"
    saved = backup(site.settings, file)
    assert saved.rows["comment"] == comments(site.engine) == 9
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(BackupError, match="there already"):
        backup(site.settings, file)
    (tmp_path / "other").mkdir()
    elsewhere = settings_in(tmp_path / "other")
    restored = restore(elsewhere, file)
    assert (restored.contents.rows, restored.kept, restored.signed) == (saved.rows, (), True)
    assert (tmp_path / "other" / "secret").read_text() == site.settings.secret
    engine = open_database(elsewhere.database)
    assert comments(engine) == 9
    engine.dispose()


def test_a_restore_keeps_what_was_there(person, site, tmp_path):
    """Fails when restoring pulls the file away from under a running site, or what was there is gone afterwards."""
    file = tmp_path / "backup.tar.gz"
    backup(site.settings, file)
    send(person, PAGE, f"{PAGE}/comments", body="later")
    assert comments(site.engine) == 1
    with pytest.raises(BackupError, match="stop the site"):
        restore(site.settings, file)
    assert comments(site.engine) == 1
    site.engine.dispose()
    (secret := site.settings.folder / "secret").write_text("of another time")
    old, other = restore(site.settings, file).kept
    assert (other.read_text(), secret.read_text()) == ("of another time", site.settings.secret)
    assert comments(site.engine) == 0
    site.engine.dispose()
    (again,) = restore(site.settings, file).kept  # within the same second, too, nothing gives way
    assert again != old
    before = open_database(f"sqlite:///{old}")
    assert comments(before) == 1
    before.dispose()


def test_who_was_signed_in_still_is(person, site, tmp_path, monkeypatch):
    """Fails when a restored site turns out those whom the backup knows, or another secret does so without a word."""
    file = tmp_path / "backup.tar.gz"
    backup(site.settings, file)
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "other"))
    monkeypatch.delenv("REGULARIZED_SITE_DATABASE", raising=False)
    Settings.from_environment()  # makes a secret of its own
    restored = call("site", "restore", str(file))
    assert restored.stderr.count("before-restore") == 1  # that secret; there was no database
    there = dataclasses.replace(Settings.from_environment(), encoder="off", clock=site.settings.clock)
    opened = open_site(there, catalogue=False)
    client = TestClient(create_app(opened), cookies=person.cookies)
    assert client.get("/me", follow_redirects=False).status_code == 200
    opened.engine.dispose()
    monkeypatch.setenv("REGULARIZED_SITE_SECRET", "o" * 40)
    assert "everybody must sign in again" in call("site", "restore", str(file)).stderr


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_what_is_no_backup_is_refused(site, tmp_path, content):
    """Fails when a damaged file takes the place of a good database."""
    file = tmp_path / "bad.tar.gz"
    if content is None:
        backup(site.settings, file)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    else:
        file.write_bytes(content)
    site.engine.dispose()
    with pytest.raises(BackupError, match="no backup"):
        restore(site.settings, file)
    assert comments(site.engine) == 0


def test_metrics_are_for_who_knows_the_token(site):
    """Fails when anybody can read them, they lack what Prometheus asks for, or any address makes a new series."""
    assert TestClient(create_app(site)).get("/metrics").status_code == 404
    watched = dataclasses.replace(site, settings=dataclasses.replace(site.settings, metrics_token="m" * 20))
    client = TestClient(create_app(watched))
    for number in range(3):
        client.get(f"/papers/nothing-{number}")
        client.get(f"/nothing-{number}")
    assert client.get("/metrics").status_code == 404
    assert client.get("/metrics", headers={"authorization": "Bearer wrong"}).status_code == 404
    answer = client.get("/metrics", headers={"authorization": f"Bearer {'m' * 20}"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert all(re.fullmatch(r"# TYPE \w+ \w+|\w+(\{.*\})? [\d.e+-]+", line) for line in lines), lines
    counted = [line for line in lines if 'route="/papers/{slug}",status="404"' in line]
    assert [line.rpartition(" ")[2] for line in counted] == ["3"]
    assert sum("nothing-" in line for line in lines) == 0
    values = dict(line.split() for line in lines if "{" not in line and "#" not in line)
    assert values["regularized_papers"] == str(len(load_catalogue()))
    assert values["regularized_mail_waiting"] == "0"


def test_access_log_can_be_moved_away(site, tmp_path):
    """Fails when requests are not logged, a log says what was searched for, or rotation loses lines."""
    file = tmp_path / "access.log"
    open_access_log(str(file))
    try:
        client = TestClient(create_app(site))
        client.get("/search?q=my+secret+problem")
        file.rename(tmp_path / "access.log.1")
        client.get("/nothing%0ahere")
    finally:
        open_access_log("")
    first, second = ((tmp_path / name).read_text() for name in ("access.log.1", "access.log"))
    assert re.search(r" GET /search 200 \d+ [\d.]+ ms\n$", first)
    assert "secret" not in first
    assert re.search(r" GET /nothing\?here 404 ", second)
    assert logging.getLogger("regularized.site.access").handlers == []


@pytest.mark.slow
def test_several_workers(filled_home):
    """Fails when several processes do not serve one site, or who comes before they are ready is turned away."""
    command = [sys.executable, "-m", "regularized.cli", "site", "--port", "0", "--workers", "2"]
    known = {name: value for name, value in os.environ.items() if not name.startswith("REGULARIZED_")}
    environment = known | {"REGULARIZED_HOME": str(filled_home), "REGULARIZED_SITE_ENCODER": "off"}
    environment |= {"REGULARIZED_METRICS_TOKEN": "m" * 20}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            found = next(m for line in process.stderr if (m := re.search(r"the catalogue is at (http://\S+)", line)))
            request = urllib.request.Request(f"{found[1]}/metrics", headers={"authorization": f"Bearer {'m' * 20}"})
            processes = set()
            for _ in range(600):
                with urllib.request.urlopen(request, timeout=120) as answer:
                    processes |= set(re.findall(r'process="(\d+)"', answer.read().decode()))
                if len(processes) == 2:
                    break
                time.sleep(0.1)  # the workers read the catalogue first
            assert len(processes) == 2
            assert str(process.pid) not in processes
        finally:
            process.terminate()  # whoever is started in the background of a shell ignores an interrupt
            try:
                process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert process.returncode in (0, 143, -signal.SIGTERM)


def test_commands(tmp_path, monkeypatch):
    """Fails when backup and restore are there for programs alone."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path))
    monkeypatch.setenv("REGULARIZED_SITE_ENCODER", "off")
    assert call("site", "backup", str(tmp_path / "a.tar.gz")).exit_code == 1
    open_site(Settings.from_environment()).engine.dispose()
    saved = call("site", "backup", str(tmp_path / "a.tar.gz"), "--json")
    assert json.loads(saved.stdout)["paper"] == len(load_catalogue())
    restored = call("site", "restore", str(tmp_path / "a.tar.gz"))
    assert (restored.exit_code, "before" in restored.stderr) == (0, True)
    monkeypatch.setenv("REGULARIZED_SITE_DATABASE", "postgresql://x@/y")
    assert "pg_dump" in call("site", "backup", str(tmp_path / "b.tar.gz")).stderr
