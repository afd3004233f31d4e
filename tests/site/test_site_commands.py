"""The commands of the site, as a person and a cron job call them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tests.site.test_importing import ARXIV_ENTRY, DAILY, arxiv_feed, server  # noqa: F401 - a fixture
from typer.testing import CliRunner

from regularized.cli.app import app
from regularized.papers.catalogue import load_catalogue
from regularized.site import remote

ENTRIES = load_catalogue()
PAGE = Path(__file__).parent / "daily_papers_page.txt"


def call(*arguments: str):
    return CliRunner().invoke(app, arguments, prog_name="regularized")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("REGULARIZED_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path))
    monkeypatch.setenv("REGULARIZED_SITE_ENCODER", "off")
    return tmp_path


@pytest.mark.usefixtures("filled_home")
def test_import(tmp_path):
    """Fails when a saved page does not come in, or a second import says anything but known."""
    first = call("papers", "import", str(PAGE), "--json")
    assert first.exit_code == 0, first.output
    rows = json.loads(first.stdout)
    assert len(rows) == 44
    assert {row["slug"] for row in rows} <= {entry.slug for entry in ENTRIES}
    assert "44 papers: 0 added" in first.stderr
    again = call("papers", "import", str(PAGE), "--saved", "2026-03-02")
    assert "44 papers: 0 added, 0 updated, 44 known" in again.stderr
    assert again.stdout.splitlines()[0].split("\t") == ["outcome", "slug", "title"]
    new = tmp_path / "new.txt"
    new.write_text("Something new\n\nText.\n\n• 1 author\n·\nMar 1\n", encoding="utf-8")
    added = json.loads(call("papers", "import", str(new), "--saved", "2026-03-02", "--json").stdout)
    assert added == [{"slug": "paper-something-new", "title": "Something new", "outcome": "added"}]


@pytest.mark.usefixtures("filled_home")
def test_what_is_skipped_is_said(tmp_path):
    """Fails when one bad entry goes in silently, or keeps the others out although they were asked for."""
    file = tmp_path / "bad.txt"
    good = "Good {}\n\nText.\n\n• 1 author\n·\nMar 1 1.2k\n\n"
    file.write_text(f"{good.format('A')}Bad\n\nText.\n\n• 1 author\n·\nFeb 30\n\n{good.format('B')}", encoding="utf-8")
    refused = call("papers", "import", str(file), "--saved", "2026-03-02")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "Feb 30" in refused.stderr
    assert "--skip-bad" in refused.stderr
    done = call("papers", "import", str(file), "--saved", "2026-03-02", "--skip-bad", "--json")
    assert [row["title"] for row in json.loads(done.stdout)] == ["Good A", "Good B"]
    assert "skipped: " in done.stderr
    assert "Bad" in done.stderr


def test_what_cannot_be_imported(tmp_path):
    """Fails when a wrong call ends in a traceback or the wrong exit code."""
    assert call("papers", "import", str(tmp_path / "missing")).exit_code == 3
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    assert call("papers", "import", str(tmp_path / "x")).exit_code == 1
    (tmp_path / "y").write_text("nothing")
    wrong = call("papers", "import", str(tmp_path / "y"))
    assert (wrong.exit_code, "no entry" in wrong.stderr) == (1, True)
    assert call("papers", "import", str(PAGE), "--saved", "x").exit_code == 2
    assert call("papers", "add", "x").exit_code == 1
    assert call("papers", "fetch", "--day", "x").exit_code == 2
    assert call("papers", "fetch", "--week", "2026-W99").exit_code == 2
    assert call("papers", "fetch", "--day", "2026-03-02", "--week", "2026-W10").exit_code == 2


@pytest.mark.usefixtures("filled_home")
def test_add_and_fetch(server, monkeypatch):  # noqa: F811
    """Fails when a command does not ask, or does not store what it was told."""
    monkeypatch.setattr(remote, "ARXIV", server.url)
    monkeypatch.setattr(remote, "DAILY_PAPERS", server.url)
    server.answers["/api/query"] = [(200, "application/atom+xml", arxiv_feed(ARXIV_ENTRY))]
    server.answers["/api/daily_papers"] = [(200, "application/json", json.dumps([DAILY]))]
    added = json.loads(call("papers", "add", "arXiv:2603.01234v1", "--json").stdout)
    assert [(row["slug"], row["outcome"]) for row in added] == [("arxiv-2603.01234", "added")]
    for arguments in (("--day", "2026-03-02"), ("--week", "2026-W10"), ()):
        assert call("papers", "fetch", *arguments).exit_code == 0
    assert [re.search(r"(date|week)=", path)[1] for path in server.asked[1:]] == ["date", "week", "date"]
    server.answers["/api/query"] = [(503, "text/plain", "")]
    offline = call("papers", "add", "2603.01234")
    assert (offline.exit_code, "does not answer" in offline.stderr) == (4, True)


def test_papers_still_lists():
    """Fails when the commands below `papers` change what `papers` itself prints."""
    assert len(json.loads(call("papers", "--json").stdout)) == len(ENTRIES)
    found = json.loads(call("papers", "--search", "import labels that are wrong", "--limit", "3", "--json").stdout)
    assert len(found) == 3
    helped = call("papers", "--help").stdout
    assert all(name in helped for name in ("import", "add", "fetch", "--search"))


def test_digest_send():
    """Fails when a cron job without subscriptions fails."""
    result = call("digest", "send", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"written": 0, "nothing_new": 0, "sent": 0, "later": 0, "refused": 0}


@pytest.mark.usefixtures("filled_home")
def test_what_waits_in_the_outbox(home):
    """Fails when an operator cannot see what waits and why, or send it."""
    from regularized.site import outbox
    from regularized.site.opening import open_site
    from regularized.site.settings import Settings

    site = open_site(Settings.from_environment())
    with site.write.begin() as session:
        outbox.put(session, site, "ada@example.org", "S", "secret words", "<p>secret words</p>")
    listed = call("mail", "list", "--json").stdout
    ((row),) = json.loads(listed)
    assert (row["recipient"], row["tries"], "secret" in listed) == ("ada@example.org", 0, False)
    assert json.loads(call("mail", "send", "--json").stdout) == {"sent": 1, "later": 0, "refused": 0}
    assert json.loads(call("mail", "list", "--json").stdout) == []
    assert len(list((home / "site" / "outbox").glob("*.eml"))) == 1
    site.engine.dispose()


def test_wrong_settings(monkeypatch):
    """Fails when a wrong setting shows as a traceback."""
    monkeypatch.setenv("REGULARIZED_SITE_URL", "nonsense")
    wrong = call("digest", "send")
    assert (wrong.exit_code, "REGULARIZED_SITE_URL" in wrong.stderr) == (2, True)


def test_a_home_that_cannot_be_written(home, monkeypatch, read_only):
    """Fails when a folder that cannot be made, or is read-only, ends in a traceback before the server starts."""
    command = [sys.executable, "-m", "regularized", "digest", "send"]
    result = read_only(home, command)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "Set REGULARIZED_HOME to a folder that you may write to" in result.stderr
    monkeypatch.setenv("REGULARIZED_HOME", "/proc/nowhere")
    result = call("site", "--port", "0")
    assert result.exit_code == 1
    assert "Set REGULARIZED_HOME to a folder that you may write to" in result.stderr


def test_without_the_extra(monkeypatch):
    """Fails when a missing package shows as a traceback instead of the command that installs it."""
    monkeypatch.setitem(sys.modules, "fastapi", None)
    missing = call("papers", "import", str(PAGE))
    assert (missing.exit_code, 'pip install "regularized[site]"' in missing.stderr) == (4, True)


@pytest.mark.usefixtures("filled_home")
def test_help_stays_light():
    """Fails when listing the commands, or the papers, loads the site's packages or torch."""
    code = (
        "import sys; from typer.testing import CliRunner; from regularized.cli.app import app\n"
        "CliRunner().invoke(app, ['--help']); CliRunner().invoke(app, ['papers', '--limit', '1'])\n"
        "print(*({'fastapi', 'sqlalchemy', 'jinja2', 'torch', 'arxiv', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [], done.stdout + done.stderr


def test_sending_stays_light(home, filled):
    """Fails when a command that cron calls every hour loads the web framework, alembic, numpy or the catalogue."""
    (home / "site").mkdir()
    shutil.copy(filled, home / "site" / "site.sqlite")
    code = (
        "import sys; from typer.testing import CliRunner; from regularized.cli.app import app\n"
        "print(CliRunner().invoke(app, ['digest', 'send']).exit_code)\n"
        "print(*({'fastapi', 'starlette', 'alembic', 'numpy', 'regularized.papers.catalogue'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["0"], done.stdout + done.stderr


@pytest.mark.usefixtures("filled_home")
def test_a_start_stays_light():
    """Fails when a server whose catalogue has not changed reads ledgers, or loads what computes, draws or migrates."""
    code = (
        "import sys; from regularized.site.app import from_environment; from_environment()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'alembic', 'matplotlib', 'markdown_it'}\n"
        "print(*((heavy | {'regularized.evidence.ledger'}) & set(sys.modules)))"
    )

    def loaded() -> list[str]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert not loaded() or not loaded()  # at the latest from the second one on


@pytest.mark.usefixtures("filled_home")
def test_the_server_starts_and_stops(home):
    """Fails when the command does not serve, listens to more than this machine, or does not say where it is.

    Or when the process that draws meanwhile is not started, or stays behind.
    """
    command = [sys.executable, "-m", "regularized.cli", "site", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"the catalogue is at (http://127\.0\.0\.1:\d+)", line):
                    break
            assert found, said
            assert any(str(home / "site" / "outbox") in line for line in said)
            with urllib.request.urlopen(f"{found[1]}/health", timeout=120) as answer:
                assert answer.read() == b"ok\n"
                assert "server" not in {name.lower() for name in answer.headers}
            (meanwhile,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        finally:
            process.send_signal(signal.SIGINT)
            process.stderr.read()
        assert process.wait(timeout=120) in (0, 130, -signal.SIGINT)
        for _ in range(600):
            try:
                state = Path(f"/proc/{meanwhile}/stat").read_text(encoding="ascii").rpartition(") ")[2][0]
            except FileNotFoundError:
                break
            if state in "ZX":
                break
            time.sleep(0.1)
        else:
            pytest.fail("what is done meanwhile goes on without the server")


def test_a_port_that_is_taken():
    """Fails when the message for the most usual mistake is a traceback."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = call("site", "--port", str(taken.getsockname()[1]))
    assert (result.exit_code, "another --port" in result.stderr) == (1, True)
