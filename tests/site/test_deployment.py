"""The files for operators, and the page that leads through them: every command, setting and path in them is there."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer.main

from regularized.cli.app import app
from regularized.site import settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGE = ROOT / "docs" / "use" / "operating.md"
FILES = [PAGE, ROOT / "docs" / "use" / "site.md", *sorted(DEPLOY.iterdir())]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_and_settings_are_there(file):
    """Fails when a command, an option or a variable was renamed and an operator is told the old one."""
    text = file.read_text(encoding="utf-8")
    for call in re.findall(r"(?:^|[`/ ])regularized ([a-z][a-z-]+(?: [a-z][a-z-]+)?)", text, re.MULTILINE):
        command = typer.main.get_command(app)
        for word in call.split():
            if not hasattr(command, "commands") or word not in command.commands:
                break
            command = command.commands[word]
        assert getattr(command, "name", None) in call.split(), call
    for option in set(re.findall(r"regularized site (?:[^\n`]*?)(--[a-z-]+)", text)):
        served = typer.main.get_command(app).commands["site"]
        assert option in {name for parameter in served.params for name in parameter.opts}, option
    known = set(re.findall(r"REGULARIZED_\w+", settings.__doc__)) | {"REGULARIZED_HOME", "REGULARIZED_SCREENSHOTS"}
    assert set(re.findall(r"REGULARIZED_\w*[A-Z]\b", text)) <= known


def test_the_page_names_every_file():
    """Fails when a file for operators is forgotten on their page, or the page names one that is not there."""
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"deploy/([\w.-]+(?:\*|\w))", text))
    for file in DEPLOY.iterdir():
        assert any(Path(file.name).match(pattern) for pattern in named), file.name
    for pattern in named:
        assert list(DEPLOY.glob(pattern)), pattern


def test_the_container_copies_what_is_there():
    """Fails when the container file copies a path that the repository has not, or the build would miss a file."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    told = tomllib.loads(project)
    hatch = told["tool"]["hatch"]
    # Without what the wheel includes from elsewhere, and what finds out its README, it is not built.
    included = hatch["build"]["targets"]["wheel"]["force-include"]
    hook = hatch["metadata"]["hooks"]["custom"].get("path", "hatch_build.py")
    assert {"pyproject.toml", "README.md", "src", hook, *told["project"]["license-files"], *included} <= copied
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in copied} <= set(sent)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_units_are_read_by_systemd(tmp_path):
    """Fails when systemd does not know a key of a unit."""
    for unit in (*DEPLOY.glob("*.service"), *DEPLOY.glob("*.timer")):
        text = unit.read_text(encoding="utf-8").replace("/opt/regularized/bin/regularized", "/bin/true")
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    for unit in sorted(tmp_path.iterdir()):
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if unit.name in line and "EnvironmentFile" not in line]
        assert said == [], said
